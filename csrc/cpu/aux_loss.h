// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss (DIEN eq. 6) in two steps: the logits of the inner-product scorer, and the loss of any scorer's logits.
// B batch, T time, P = max(T - 1, 0) pairs, H width of states and items. Pair p scores state p against item p + 1; of a row of
// length n the pairs 0 .. n - 2 are valid, the others are padding. Kernels work on the rows begin .. end - 1 of the batch.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace dien_ops::cpu {

template <typename T>
struct AuxiliaryLogits {
    const T* states;         // [B, T, H]
    const T* positives;      // [B, T, H] the behaviours themselves
    const T* negatives;      // [B, T, H] sampled ones
    const int64_t* lengths;  // [B], 0..T
    int64_t steps;           // T
    int64_t width;           // H
};

// logits[b][0][p] = <states[b][p], positives[b][p + 1]>, logits[b][1][p] likewise with negatives; 0 in padding.
template <Capability C, typename T>
void auxiliary_logits(const AuxiliaryLogits<T>& inputs,
                      T* logits,  // [B, 2, P]
                      int64_t begin, int64_t end);

// The gradients of the three inputs; every element is written, 0 where no valid pair reads it.
template <Capability C, typename T>
void auxiliary_logits_backward(const AuxiliaryLogits<T>& inputs,
                               const T* grad_logits,  // [B, 2, P]; padding is not read
                               T* grad_states,        // [B, T, H]
                               T* grad_positives,     // [B, T, H]
                               T* grad_negatives,     // [B, T, H]
                               int64_t begin, int64_t end);

// row_losses[b] = sum over the row's valid pairs of softplus(-clicked) + softplus(sampled).
template <Capability C, typename T>
void auxiliary_loss(const T* logits,         // [B, 2, P] clicked, sampled; padding does not matter
                    const int64_t* lengths,  // [B], 0..T
                    int64_t pairs,           // P
                    double* row_losses,      // [B]
                    int64_t begin, int64_t end);

// grad_logits[b] = scale * d row_losses[b] / d logits[b]; 0 in padding.
template <Capability C, typename T>
void auxiliary_loss_backward(const T* logits,         // [B, 2, P]
                             const int64_t* lengths,  // [B], 0..T
                             int64_t pairs,           // P
                             T scale,                 // gradient of the loss over the reduction's denominator
                             T* grad_logits,          // [B, 2, P]
                             int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
