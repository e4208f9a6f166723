// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss (DIEN eq. 6): with the inner product for a scorer, and of any scorer's logits. B batch, T time,
// P = max(T - 1, 0) pairs, H width of states and items. Pair p scores state p against item p + 1; of a row of length n the
// pairs 0 .. n - 2 are valid, the others are padding. Kernels work on the rows begin .. end - 1 of the batch.
//
// A row's loss is the sum over its valid pairs of softplus(-clicked) + softplus(sampled); the caller adds the rows and divides.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace dien_ops::cpu {

template <typename T>
struct AuxiliarySequences {
    const T* states;         // [B, T, H]
    const T* positives;      // [B, T, H] the behaviours themselves
    const T* negatives;      // [B, T, H] sampled ones
    const int64_t* lengths;  // [B], 0..T
    int64_t steps;           // T
    int64_t width;           // H
};

// logits[b][0][p] = <states[b][p], positives[b][p + 1]>, logits[b][1][p] likewise with negatives; 0 in padding.
template <Capability C, typename T>
void auxiliary_inner_loss(const AuxiliarySequences<T>& inputs,
                          T* logits,           // [B, 2, P]
                          double* row_losses,  // [B]
                          int64_t begin, int64_t end);

// The gradients of the three inputs; every element is written, 0 where no valid pair reads it.
template <Capability C, typename T>
void auxiliary_inner_loss_backward(const AuxiliarySequences<T>& inputs,
                                   const T* logits,    // [B, 2, P], the forward's; padding is not read
                                   T scale,            // gradient of the loss over the reduction's denominator
                                   T* grad_states,     // [B, T, H]
                                   T* grad_positives,  // [B, T, H]
                                   T* grad_negatives,  // [B, T, H]
                                   int64_t begin, int64_t end);

template <Capability C, typename T>
void auxiliary_loss_of_logits(const T* logits,         // [B, 2, P] clicked, sampled; padding does not matter
                              const int64_t* lengths,  // [B], 0..T
                              int64_t pairs,           // P
                              double* row_losses,      // [B]
                              int64_t begin, int64_t end);

template <Capability C, typename T>
void auxiliary_loss_of_logits_backward(const T* logits,         // [B, 2, P]
                                       const int64_t* lengths,  // [B], 0..T
                                       int64_t pairs,           // P
                                       T scale,                 // as above
                                       T* grad_logits,          // [B, 2, P]; 0 in padding
                                       int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
