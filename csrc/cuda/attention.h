// SPDX-License-Identifier: Apache-2.0
// Softmax attention over states (DIEN eq. 8) on CUDA: contracts. Both functions queue work on a stream and return; nothing
// waits for the device, so a call can be captured in a graph. Pointers are device memory, borrowed until the work is done;
// tensors may begin at any number. Design: attention.cu; what is a product of matrices: attention_products.cu.
//
// S is what tensors are stored in, Compute<S> what is computed in (common/number.h).
#pragma once

#include <cstdint>

#include "common/number.h"
#include "cuda/stream.h"

namespace dien_ops::cuda {

template <typename S>
struct BilinearAttentionProblem {
    int64_t batch, targets, steps, hidden_size, target_size;  // B, C, T, H, A
    bool tf32;                                                // float products may round their operands to tf32

    const int64_t* lengths;            // [B], each in 0..T: from lengths.h; null: all are T
    const S* states;                   // [B, T, H]: a step's H numbers lie together,
    int64_t state_stride_b;            // and so far apart are sequences
    int64_t state_stride_t;            // and steps; both are multiples of H
    const S* target;                   // [B, C, A]
    const Compute<S>* weight;          // [H, A]
    const Compute<S>* projected = {};  // [B, C, H]: W e_a, which bilinear_attention_project writes

    int64_t rows() const { return batch * targets; }
};

template <typename S>
void bilinear_attention_project(Stream stream, const BilinearAttentionProblem<S>& p, Compute<S>* projected);

// Numbers of global memory that the forward wants where a block's logits do not fit on the chip, else 0.
template <typename S>
int64_t bilinear_attention_workspace(const BilinearAttentionProblem<S>& p);
template <typename S>
void bilinear_attention_scores(Stream stream, const BilinearAttentionProblem<S>& p, Compute<S>* workspace,
                               S* scores);  // [B, C, T]; 0 behind a sequence's length

template <typename S>
struct BilinearAttentionBackward : BilinearAttentionProblem<S> {
    const S* scores;              // [B, C, T], the forward's
    const S* grad_scores;         // [B, C, T]
    Compute<S>* workspace;        // bilinear_attention_backward_workspace
    Compute<S>* grad_projected;   // [B, C, H], scratch
    Compute<S>* partial_weights;  // [bilinear_attention_weight_parts, H, A], scratch
    S* grad_states;               // [B, T, H] with the strides of states; 0 behind a sequence's length
    S* grad_target;               // [B, C, A]
    Compute<S>* grad_weight;      // [H, A]
};
template <typename S>
int64_t bilinear_attention_backward_workspace(const BilinearAttentionProblem<S>& p);
template <typename S>
int64_t bilinear_attention_weight_parts(const BilinearAttentionProblem<S>& p);

// The gradients of states and W e_a: softmax and logits.
template <typename S>
void bilinear_attention_backward(Stream stream, const BilinearAttentionBackward<S>& p);
// Of many targets, these from the gradient of the logits; for bilinear_attention_backward.
template <typename S>
void bilinear_attention_product_gradients(Stream stream, const BilinearAttentionBackward<S>& p,
                                          const Compute<S>* grad_logits);  // [B, C, T]; padding is not read
// Then the gradients of target and W, from that of W e_a.
template <typename S>
void bilinear_attention_project_backward(Stream stream, const BilinearAttentionBackward<S>& p);

}  // namespace dien_ops::cuda
