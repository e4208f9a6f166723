// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) on CUDA: contracts. Design: dice.cu. Every function queues work on a stream and returns; nothing waits for
// the device. Pointers are device memory, borrowed until the work is done; tensors may begin at any number. S is what tensors
// are stored in, Compute<S> what is computed in (common/number.h).
//
//   dice_moments    mean and variance of each channel: with batch statistics only
//   dice_forward    the output
//   dice_sums       the gradients of alpha, weight and bias, and what batch statistics need
//   dice_backward   the gradient of the input
#pragma once

#include <cstdint>

#include "common/dice.h"
#include "common/number.h"
#include "cuda/stream.h"

namespace dien_ops::cuda {

template <typename S>
struct DiceProblem {
    int64_t batch, steps, channels;  // B, T, C; rows b * T + t
    const int64_t* lengths;          // [B], each in 0..T, from lengths.h; or null (all are T)
    DiceEps eps;

    const S* input;            // [B, T, C]
    const Compute<S>* alpha;   // [C]
    const Compute<S>* weight;  // [C] or null (ones)
    const Compute<S>* bias;    // [C] or null (zeros)
    const Compute<S>* mean;    // [C]: given, or from dice_moments; so is
    const Compute<S>* var;     // [C], the biased variance

    int64_t rows() const { return batch * steps; }
};

// Numbers of the buffers `partial` of dice_moments and dice_sums.
template <typename S>
int64_t dice_moments_partial(const DiceProblem<S>& p);
template <typename S>
int64_t dice_sums_partial(const DiceProblem<S>& p);

template <typename S>
void dice_moments(Stream stream, const DiceProblem<S>& p, double* partial,  // dice_moments_partial
                  Compute<S>* mean, Compute<S>* var);                       // [C] each; 0 where there are no valid rows

template <typename S>
void dice_forward(Stream stream, const DiceProblem<S>& p, S* output,  // [B, T, C]; 0 behind a sequence's length
                  Compute<S>* mean, Compute<S>* var);                 // [C] each, or null: copies of those of the problem

template <typename S>
struct DiceBackward : DiceProblem<S> {
    const S* grad_output;     // [B, T, C]
    bool batch_statistics;    // mean and var are those of the input, and the gradient flows through them
    double* partial;          // dice_sums_partial
    Compute<S>* feedback;     // [2, C], written by dice_sums: mean(g_logit) and pull, see common/dice.h
    Compute<S>* grad_alpha;   // [C], as the next two written by dice_sums
    Compute<S>* grad_weight;  // [C]
    Compute<S>* grad_bias;    // [C]
    S* grad_input;            // [B, T, C]; 0 behind a sequence's length
};
template <typename S>
void dice_sums(Stream stream, const DiceBackward<S>& p);
template <typename S>
void dice_backward(Stream stream, const DiceBackward<S>& p);

}  // namespace dien_ops::cuda
