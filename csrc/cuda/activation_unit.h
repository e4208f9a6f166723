// SPDX-License-Identifier: Apache-2.0
// The local activation unit (DIN eq. 3) on CUDA: contracts. Every function queues work on a stream and returns; nothing waits
// for the device, so all of it can be captured in a graph. Pointers are device memory, borrowed until the work is done; tensors
// may begin at any number, what is written begins at a multiple of 16 bytes, as torch allocates. Callers fill a struct and run
//
//   unit_forward    scores and pooled vectors                                 activation_unit_forward.cu
//   unit_backward   all gradients                                             activation_unit_backward.cu
//
// A *step* is a sequence's valid step, by its number (lengths.h). A *pair* is b * C + c, target c of sequence b. A *row* is a
// step for one target; every sequence has all C targets, so rows are steps times targets.
//
// S is what query, keys, scores, pooled vectors and their gradients are stored in; parameters, statistics and their gradients
// are Compute<S> (common/number.h).
#pragma once

#include <cstdint>
#include <vector>

#include "common/activation_unit.h"
#include "common/dice.h"
#include "common/number.h"
#include "cuda/lengths.h"

namespace dien_ops::cuda {

constexpr int kMostUnitLayers = 32;  // hidden layers of a unit

template <typename S>
struct UnitProblem {
    int64_t batch, targets, steps, embedding_dim;  // B, C, T, D
    std::vector<int64_t> sizes;                    // of the hidden layers, at most kMostUnitLayers
    Activation activation;
    bool batch_statistics, softmax;
    bool tf32;  // float products may round their operands to tf32
    DiceEps eps;
    StepNumbers numbers;

    const S* query;                          // [B, C, D]
    const S* keys;                           // [B, T, D]
    std::vector<const Compute<S>*> weights;  // [H1, 4D], [H2, H1], .., [1, HL]
    std::vector<const Compute<S>*> biases;   // [H1], .., [HL], [1]
    std::vector<const Compute<S>*> alphas;   // [H1], .., [HL]; empty for the sigmoid
    S* packed;                               // unit_packed_size numbers, of the call's own
    Compute<S>* columns;                     // unit_columns_size numbers, of the call's own
    unsigned char* workspace;                // unit_forward_workspace or unit_backward_workspace bytes, of the call's own

    int64_t pairs() const { return batch * targets; }
    int64_t rows() const { return pairs() * steps; }
    int64_t total_size() const {
        int64_t total = 0;
        for (const int64_t size : sizes) total += size;
        return total;
    }
};

template <typename S>
int64_t unit_packed_size(const UnitProblem<S>& p);
template <typename S>
int64_t unit_columns_size(const UnitProblem<S>& p);

// Bytes of global memory for what does not fit into shared memory, else 0.
template <typename S>
int64_t unit_forward_workspace(const UnitProblem<S>& p);
template <typename S>
int64_t unit_backward_workspace(const UnitProblem<S>& p);

template <typename S>
struct UnitForward : UnitProblem<S> {
    std::vector<const Compute<S>*> means, vars;  // [H1], .., [HL]: Dice's, where they are given
    Compute<S>* logits;                          // [B, C, T], of the call's own
    double* moments;                             // unit_moments_size numbers, of the call's own
    S* scores;                                   // [B, C, T]
    S* pooled;                                   // [B, C, D]
    Compute<S>* statistics;                      // [2, H1 + .. + HL]: the means and variances used, 0 where none are
    Compute<S>* hidden;  // [B * C * T * sum of sizes padded to kUnitAlignment], with batch statistics: the values before the
                         // activations, layer by layer, a row per target and step; zeros where nothing belongs
};
// 0 without batch statistics.
template <typename S>
int64_t unit_moments_size(const UnitProblem<S>& p);
template <typename S>
void unit_forward(Stream stream, const UnitForward<S>& p);

template <typename S>
struct UnitBackward : UnitProblem<S> {
    const Compute<S>* statistics;  // the forward's
    const Compute<S>* hidden;      // the forward's
    const S* scores;               // the forward's
    const S* grad_pooled;          // [B, C, D] or null (zeros)
    const S* grad_scores;          // [B, C, T] or null (zeros)

    Compute<S>* grad_logits;      // [B, C, T], of the call's own
    Compute<S>* hidden_gradient;  // as hidden, of the call's own
    Compute<S>* partial;          // unit_backward_partial numbers, of the call's own

    S* grad_query;                          // [B, C, D]
    S* grad_keys;                           // [B, T, D]
    std::vector<Compute<S>*> grad_weights;  // as the parameters
    std::vector<Compute<S>*> grad_biases;
    std::vector<Compute<S>*> grad_alphas;
};
template <typename S>
int64_t unit_backward_partial(const UnitProblem<S>& p);
template <typename S>
void unit_backward(Stream stream, const UnitBackward<S>& p);

}  // namespace dien_ops::cuda
