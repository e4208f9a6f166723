// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss (DIEN eq. 6) on CUDA: contracts. Functions queue work on a stream and return; nothing waits for the
// device, so a call can be captured in a graph. Pointers are device memory, borrowed until the work is done; tensors may begin
// at any number. Pairs are numbered as on the CPU: pair p of a sequence scores state p against item p + 1, and of a sequence of
// length n the pairs 0 .. n - 2 are valid. Design: aux_loss.cu.
//
// S is what tensors are stored in, Compute<S> what is computed in, and the dtype of loss and logits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/number.h"
#include "cuda/stream.h"

namespace dien_ops::cuda {

struct AuxiliaryPairs {
    int64_t batch, steps;    // B, T
    const int64_t* lengths;  // [B], each in 0..T: from lengths.h; null: all are T
    double denominator;      // what the sum over all pairs is divided by; 0: their number, or 1 where there is none

    int64_t pairs() const { return std::max<int64_t>(steps - 1, 0); }  // P
};

template <typename S>
struct AuxiliarySequences : AuxiliaryPairs {
    int64_t width;       // H
    const S* states;     // [B, T, H]
    const S* positives;  // [B, T, H]
    const S* negatives;  // [B, T, H]
};

// Numbers of `parts`: one for each block.
template <typename S>
int64_t auxiliary_inner_loss_parts(const AuxiliarySequences<S>& p);
template <typename S>
void auxiliary_inner_loss(Stream stream, const AuxiliarySequences<S>& p,
                          double* parts,       // auxiliary_inner_loss_parts, scratch
                          Compute<S>* logits,  // [B, 2, P] clicked, sampled; 0 in padding
                          Compute<S>* loss);   // [1]
template <typename S>
void auxiliary_inner_loss_backward(Stream stream, const AuxiliarySequences<S>& p,
                                   const Compute<S>* grad_loss,  // [1]
                                   const Compute<S>* logits,     // [B, 2, P], the forward's
                                   Compute<S>* scale,            // [1], scratch
                                   S* grad_states,               // [B, T, H]
                                   S* grad_positives,            // [B, T, H]
                                   S* grad_negatives);           // [B, T, H]; all of all three are written

// The loss of any scorer's logits; T is float or double.
int64_t auxiliary_loss_of_logits_parts(const AuxiliaryPairs& p);
template <typename T>
void auxiliary_loss_of_logits(Stream stream, const AuxiliaryPairs& p,
                              const T* logits,  // [B, 2, P]; padding does not matter
                              double* parts,    // auxiliary_loss_of_logits_parts, scratch
                              T* loss);         // [1]
template <typename T>
void auxiliary_loss_of_logits_backward(Stream stream, const AuxiliaryPairs& p,
                                       const T* grad_loss,  // [1]
                                       const T* logits,     // [B, 2, P]
                                       T* scale,            // [1], scratch
                                       T* grad_logits);     // [B, 2, P]; 0 in padding

}  // namespace dien_ops::cuda
