// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) on the CPU: contracts. Design: dice.cpp. Callers fill a struct, then run its phases in the order in which
// they are declared; a phase that takes blocks may be split over threads along them.
#pragma once

#include <cstdint>

#include "common/dice.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// What forward and backward share. All pointers are borrowed for the duration of the call.
template <typename T>
struct DiceProblem {
    int64_t batch, steps, channels;  // B, T, C; rows b * T + t
    const int64_t* lengths;          // [B], each in 0..T: only the first steps of each sequence hold data
    int64_t count;                   // the sum of lengths
    int64_t rows_per_block;          // the same for forward and backward, and for any number of threads
    DiceEps eps;

    const T* input;   // [B, T, C]
    const T* alpha;   // [C]
    const T* weight;  // [C] or null (ones)
    const T* bias;    // [C] or null (zeros)
    T* columns;       // [4, C], written by dice_prepare

    int64_t blocks() const { return (batch * steps + rows_per_block - 1) / rows_per_block; }
};

template <typename T>
struct DiceForward : DiceProblem<T> {
    double* moments;  // [blocks, 1 + 2 C], zeros; used by dice_moments and dice_statistics only
    T* mean;          // [C]: given, or written by dice_statistics
    T* var;           // [C], the biased variance: likewise
    T* output;        // [B, T, C]; 0 behind a sequence's length
};

// With batch statistics only: a sum for each block, then the mean and the variance.
template <Capability kTarget, typename T>
void dice_moments(const DiceForward<T>& p, int64_t block_begin, int64_t block_end);
template <Capability kTarget, typename T>
void dice_statistics(const DiceForward<T>& p);

template <Capability kTarget, typename T>
void dice_prepare(const DiceProblem<T>& p, const T* mean, const T* var);
template <Capability kTarget, typename T>
void dice_forward(const DiceForward<T>& p, int64_t block_begin, int64_t block_end);

// Run dice_prepare first.
template <typename T>
struct DiceBackward : DiceProblem<T> {
    const T* var;           // [C], the forward's
    const T* grad_output;   // [B, T, C]
    bool batch_statistics;  // mean and var are those of the input, and the gradient flows through them
    double* sums;           // [blocks, 3, C], zeros
    T* feedback;            // [2, C], written by dice_reduce
    T* grad_input;          // [B, T, C]; 0 behind a sequence's length
    T* grad_alpha;          // [C]
    T* grad_weight;         // [C]
    T* grad_bias;           // [C]
};

template <Capability kTarget, typename T>
void dice_sums(const DiceBackward<T>& p, int64_t block_begin, int64_t block_end);
template <Capability kTarget, typename T>
void dice_reduce(const DiceBackward<T>& p);
template <Capability kTarget, typename T>
void dice_backward(const DiceBackward<T>& p, int64_t block_begin, int64_t block_end);

}  // namespace dien_ops::cpu
