// SPDX-License-Identifier: Apache-2.0
// Softmax attention over states (DIEN eq. 8) on the CPU: contracts. Design: attention.cpp. Callers fill a struct, then run its
// phases in the order in which they are declared; a phase that takes blocks may be split over threads along them.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace dien_ops::cpu {

// What forward and backward share. All pointers are borrowed for the duration of the call.
template <typename T>
struct BilinearAttentionProblem {
    int64_t batch, targets, steps, hidden_size, target_size;  // B, C, T, H, A
    int64_t sequences_per_block;                              // the same for any number of threads
    const int64_t* lengths;                                   // [B], each in 0..T

    const T* states;                         // [B, T, H]: a step's H numbers lie together,
    int64_t state_stride_b, state_stride_t;  // and sequences and steps so far apart
    const T* target;                         // [B, C, A]
    const T* weight;                         // [H, A]
    T* packed;                               // bilinear_attention_packed_size elements, written by the pack phase

    int64_t blocks() const { return (batch + sequences_per_block - 1) / sequences_per_block; }
};

template <typename T>
struct BilinearAttentionForward : BilinearAttentionProblem<T> {
    T* projected;  // [B, C, H]: W e_a, which the backward needs
    T* scores;     // [B, C, T]; 0 behind a sequence's length
};

template <Capability kTarget, typename T>
int64_t bilinear_attention_packed_size(int64_t hidden_size, int64_t target_size);
template <Capability kTarget, typename T>
void bilinear_attention_pack(const BilinearAttentionForward<T>& p);
template <Capability kTarget, typename T>
void bilinear_attention_forward(const BilinearAttentionForward<T>& p, int64_t block_begin, int64_t block_end);

template <typename T>
struct BilinearAttentionBackward : BilinearAttentionProblem<T> {
    const T* projected;    // [B, C, H], the forward's
    const T* scores;       // [B, C, T], the forward's
    const T* grad_scores;  // [B, C, T]
    T* grad_projected;     // [B, C, H], scratch
    T* partial_weights;    // [blocks, H, A], zeros: each block's share of grad_weight
    T* grad_states;        // [B, T, H] with the strides of states; 0 behind a sequence's length
    T* grad_target;        // [B, C, A]
    T* grad_weight;        // [H, A], zeros
};

template <Capability kTarget, typename T>
void bilinear_attention_backward_pack(const BilinearAttentionBackward<T>& p);
template <Capability kTarget, typename T>
void bilinear_attention_backward(const BilinearAttentionBackward<T>& p, int64_t block_begin, int64_t block_end);
// Sums the blocks' shares, in their order.
template <Capability kTarget, typename T>
void bilinear_attention_reduce(const BilinearAttentionBackward<T>& p);

}  // namespace dien_ops::cpu
