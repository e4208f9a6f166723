// SPDX-License-Identifier: Apache-2.0
// Sparse updates of embedding tables with mini-batch aware L2 (DIN eq. 7) on CUDA: contracts. Design: embedding.cu. Every
// function queues work on a stream and returns; nothing waits for the device. Pointers are device memory, borrowed until the
// work is done; tensors may begin at any number. S is what weights and gradients are stored in, Compute<S> what is computed in
// and what states are (common/number.h).
//
//   embedding_check    all that can be wrong with a call's ids, counts and gradients: device-side assertions; writes nothing of
//                      the caller's. Before the update, which counts on what it leaves in the scratch memory
//   embedding_update   the rows that the mini-batches name, by a rule
#pragma once

#include <cstdint>

#include "common/embedding.h"
#include "common/number.h"
#include "cuda/stream.h"

namespace dien_ops::cuda {

enum class CountType : uint8_t { int32, int64, float32, float64 };

// One table and its mini-batch.
struct EmbeddingTable {
    int64_t rows, dim, batch;  // num_embeddings, D, N
    int64_t padding;           // the id whose row never changes, or -1
    const void* ids;           // [N], int32_t or int64_t
    const void* counts;        // [num_embeddings], n_j; or null (all are 1)
    const void* grad;          // [N, D] of S
    void* weight;              // [num_embeddings, D] of S
    void* states[2];           // [num_embeddings, D] of Compute<S> each: those that the rule has, the others null
    void* row_state;           // [num_embeddings], or null: see the rules
    uint64_t seed;             // of the noise, where the call is stochastic
    double log_decay;          // with Decay::lazy
    bool int32_ids;
    CountType count_type;
};

// Memory that a call needs beside its tensors.
struct EmbeddingSizes {
    int64_t words;       // in each of the two buffers
    int64_t sort_bytes;  // of the sort's workspace
    int64_t sums;        // Compute<S>
    int64_t flags;       // int32_t
};

struct EmbeddingCall {
    const EmbeddingTable* tables;
    int64_t count;
    bool check_ids;           // an id outside of 0..rows-1 is an error, else it is left out
    bool refuse_nonfinite;    // a gradient that is NaN or infinite is an error; but not those of rows that are left out
    bool skip_nonfinite;      // a table with such a gradient stays as it is
    bool stochastic;          // 16-bit weights are rounded with noise
    const float* grad_scale;  // [1] or null: gradients are divided by it
    const float* found_inf;   // [1] or null: where it is not 0 no table changes, and no gradient is refused

    uint64_t* words[2];  // scratch memory, as EmbeddingSizes says
    void* workspace;
    int64_t workspace_bytes;
    void* sums;
    int32_t* flags;
};

// Of a call without its scratch memory. Throws std::runtime_error where the call has more rows and positions than there are
// numbers for.
template <typename S>
EmbeddingSizes embedding_sizes(const EmbeddingCall& call);

template <typename S>
void embedding_check(Stream stream, const EmbeddingCall& call);

// The rules: common/embedding.h has the equations, and these say where the states are.

// states[0]: the momentum buffer, or null. row_state: double, with Decay::lazy: log_decay when the row was last updated.
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const SgdRule<Compute<S>>& rule);
// states[0]: the sums of squares.
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const AdagradRule<Compute<S>>& rule);
// row_state: Compute<S>, the sums of the means of squares.
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay,
                      const RowwiseAdagradRule<Compute<S>>& rule);
// states: exp_avg and exp_avg_sq. row_state: int64_t, how often the row was updated.
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const AdamRule& rule);

}  // namespace dien_ops::cuda
