// SPDX-License-Identifier: Apache-2.0
// Sparse updates of an embedding table with mini-batch aware L2 (DIN eq. 7). Kernels: raw pointers, a range to work
// on. D embedding dimension, N gradient rows of the mini-batch. S is how weights and gradients are stored, T = Compute<S> what
// is computed in and what the rules keep of the past.
#pragma once

#include <cstdint>

#include "common/embedding.h"
#include "common/number.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// One distinct id of the mini-batch. Its gradient rows are those at positions[first] .. positions[the next segment's first -
// 1], at least one; behind the last segment stands one that only says where it ends.
template <typename T>
struct Segment {
    int64_t row;  // of the table
    int64_t first;
    RowDecay<T> decay;
};

// What an update reads and writes, whatever its rule.
template <typename S>
struct TableUpdate {
    const Segment<Compute<S>>* segments;  // each row of the table at most once
    const int64_t* positions;             // of gradient rows in the mini-batch: 0 .. N - 1
    const S* grads;                       // [N, D]
    Compute<S> grad_scale;                // divides the gradients
    const int64_t* summed;                // [L], ascending: the segments whose gradient rows are summed already ..
    const Compute<S>* sums;               // [L, padded(D)]: .. to this
    int64_t num_summed;                   // L
    S* weight;                            // [num_embeddings, D]
    int64_t dim;                          // D
    double* decayed;                      // [num_embeddings], set to log_decay, or null (common/embedding.h)
    double log_decay;
    bool stochastic;  // how weights of 16 bits are rounded; otherwise to the nearest, ties to even
    int64_t seed;
};

// The rules with their state; see common/embedding.h. Each names what it does to a row, and nothing else is touched.

template <typename T>
struct Sgd {
    SgdRule<T> rule;
    T* momentum_buffer;  // [num_embeddings, D] or null
};

template <typename T>
struct Adagrad {
    AdagradRule<T> rule;
    T* state_sum;  // [num_embeddings, D]
};

template <typename T>
struct RowwiseAdagrad {
    RowwiseAdagradRule<T> rule;
    T* state_sum;  // [num_embeddings]
};

template <typename T>
struct Adam {
    AdamRule rule;
    T* exp_avg;     // [num_embeddings, D]
    T* exp_avg_sq;  // [num_embeddings, D]
    int64_t* step;  // [num_embeddings], t: counts the row's own updates
};

// Room for a row that is written by whole vectors, of any instruction set.
constexpr int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// sum [D] = the rows [., D] at positions[0] + .. + positions[count - 1], in this order. sum has room for padded(D). known >=
// count: so many positions are there, the rows behind the first count being what is summed next.
template <Capability C, typename S>
void sum_rows(const S* rows, const int64_t* positions, int64_t count, int64_t known, int64_t dim, Compute<S>* sum);

// Whether none of the n numbers is infinite or NaN.
template <Capability C, typename S>
bool all_finite(const S* numbers, int64_t n);

// Updates the rows of the segments begin .. end - 1.
template <Capability C, typename S, template <typename> class Rule>
void update_rows(const TableUpdate<S>& update, const Rule<Compute<S>>& rule, int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
