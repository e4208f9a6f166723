// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) on the CPU: contracts. Design: dice.cpp. Callers fill a struct, then run its phases in the order in which
// they are declared; a phase that takes blocks may be split over threads along them.
#pragma once

#include <cstdint>

#include "common/dice.h"
#include "common/number.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// What forward and backward share. S is what the tensors are stored in, Compute<S> what is computed in (common/number.h). All
// pointers are borrowed for the duration of the call.
template <typename S>
struct DiceProblem {
    int64_t batch, steps, channels;  // B, T, C; rows b * T + t
    const int64_t* lengths;          // [B], each in 0..T: only the first steps of each sequence hold data
    int64_t count;                   // the sum of lengths
    int64_t rows_per_block;          // the same for forward and backward, and for any number of threads
    int64_t fold;                    // how many rows that follow each other are computed as one
    DiceEps eps;

    const S* input;            // [B, T, C]
    const Compute<S>* alpha;   // [C]
    const Compute<S>* weight;  // [C] or null (ones)
    const Compute<S>* bias;    // [C] or null (zeros)
    Compute<S>* columns;       // [4, fold * C], written by dice_prepare

    int64_t blocks() const { return (batch * steps + rows_per_block - 1) / rows_per_block; }
    int64_t width() const { return fold * channels; }
};

// The rows that together fill whole vectors, groups of them if that is possible, of any instruction set.
inline int64_t dice_fold(int64_t channels) {
    constexpr int64_t kWidest = 1024;  // numbers: of columns that are at hand in the first cache beside the data
    for (const int64_t whole : {64, 16}) {
        for (int64_t fold = 1; fold <= whole && fold * channels <= kWidest; fold *= 2) {
            if (fold * channels % whole == 0) return fold;
        }
    }
    return 1;
}

template <typename S>
struct DiceForward : DiceProblem<S> {
    double* moments;   // [blocks, 1 + 2 C], zeros; used by dice_moments and dice_statistics only
    Compute<S>* mean;  // [C]: given, or written by dice_statistics
    Compute<S>* var;   // [C], the biased variance: likewise
    S* output;         // [B, T, C]; 0 behind a sequence's length
};

// With batch statistics only: a sum for each block, then the mean and the variance.
template <Capability kTarget, typename S>
void dice_moments(const DiceForward<S>& p, int64_t block_begin, int64_t block_end);
template <Capability kTarget, typename S>
void dice_statistics(const DiceForward<S>& p);

template <Capability kTarget, typename S>
void dice_prepare(const DiceProblem<S>& p, const Compute<S>* mean, const Compute<S>* var);
template <Capability kTarget, typename S>
void dice_forward(const DiceForward<S>& p, int64_t block_begin, int64_t block_end);

// Run dice_prepare first.
template <typename S>
struct DiceBackward : DiceProblem<S> {
    const Compute<S>* var;    // [C], the forward's
    const S* grad_output;     // [B, T, C]
    bool batch_statistics;    // mean and var are those of the input, and the gradient flows through them
    double* sums;             // [blocks, 3, C], zeros
    Compute<S>* feedback;     // [2, fold * C], written by dice_reduce
    S* grad_input;            // [B, T, C]; 0 behind a sequence's length
    Compute<S>* grad_alpha;   // [C]
    Compute<S>* grad_weight;  // [C]
    Compute<S>* grad_bias;    // [C]
};

template <Capability kTarget, typename S>
void dice_sums(const DiceBackward<S>& p, int64_t block_begin, int64_t block_end);
template <Capability kTarget, typename S>
void dice_reduce(const DiceBackward<S>& p);
template <Capability kTarget, typename S>
void dice_backward(const DiceBackward<S>& p, int64_t block_begin, int64_t block_end);

}  // namespace dien_ops::cpu
