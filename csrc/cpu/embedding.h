// SPDX-License-Identifier: Apache-2.0
// Sparse updates of an embedding table with mini-batch aware L2 (DIN eq. 7). Kernels: raw pointers, no allocation.
// D embedding dimension, N gradient rows of the mini-batch, S distinct ids among them.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace dien_ops::cpu {

// One distinct id of the mini-batch.
template <typename T>
struct Segment {
    int64_t row;    // of the table
    int64_t first;  // its gradient rows are gradient_rows[first] .. gradient_rows[first + count - 1], count >= 1
    int64_t count;
    T decay;  // l2 / n_j
};

// What an update reads and writes, whatever its rule.
template <typename T>
struct TableUpdate {
    const Segment<T>* segments;     // [S], each row of the table at most once
    const T* const* gradient_rows;  // [N] pointers to [D]
    T* weight;                      // [num_embeddings, D]
    int64_t dim;                    // D
};

// The rules. g is a row's summed gradient plus decay * w; each names what it does to that row, and nothing else is touched.

// w -= lr g; with a momentum buffer b: b = momentum b + g, w -= lr b
template <typename T>
struct Sgd {
    T* momentum_buffer;  // [num_embeddings, D] or null
    T lr, momentum;
};

// s += g^2, w -= lr g / (sqrt(s) + eps)
template <typename T>
struct Adagrad {
    T* state_sum;  // [num_embeddings, D]
    T lr, eps;
};

// s += mean(g^2), w -= lr g / (sqrt(s) + eps): one number per row
template <typename T>
struct RowwiseAdagrad {
    T* state_sum;  // [num_embeddings]
    T lr, eps;
};

// t += 1, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
// w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps): t counts the row's own updates
template <typename T>
struct Adam {
    T* exp_avg;     // [num_embeddings, D]
    T* exp_avg_sq;  // [num_embeddings, D]
    int64_t* step;  // [num_embeddings]
    double lr, beta1, beta2, eps;
    double log_beta1, log_beta2;  // what beta^t is computed from
};

// sum[D] = rows[0] + rows[1] + ... + rows[count - 1], in this order; count >= 1.
template <Capability C, typename T>
void sum_gradient_rows(const T* const* rows, int64_t count, int64_t dim, T* sum);

// Updates the rows of the segments begin .. end - 1.
template <Capability C, typename T, template <typename> class Rule>
void update_rows(const TableUpdate<T>& update, const Rule<T>& rule, int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
