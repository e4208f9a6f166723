// SPDX-License-Identifier: Apache-2.0
// The arguments of the sparse updates, checked alike for every back end: all that can be checked without reading a tensor. What
// an update writes is never copied, what it only reads is made contiguous.
#pragma once

#include <string>
#include <vector>

#include "common/embedding.h"
#include "ops/tensor.h"

namespace dien_ops::ops {

enum class Nonfinite { propagate, skip, error };

// One table and its mini-batch. Owns what the kernels borrow.
struct TableArguments {
    std::string name;             // precedes what is said of it: "table 2: ", or nothing where there is only one
    int64_t num_embeddings, dim;  // D
    Tensor weight;                // [num_embeddings, D]
    Tensor ids;                   // [N], int32 or int64
    Tensor grad;                  // [N, D]
    OptionalTensor counts;        // [num_embeddings], n_j
    int64_t padding;              // the row that never changes, or -1
    int64_t seed;
    double log_decay;

    int64_t batch() const { return ids.size(0); }
};

// The memory of a contiguous tensor.
struct Bytes {
    const char *begin, *end;

    explicit Bytes(const Tensor& t)
        : begin(static_cast<const char*>(t.const_data_ptr())), end(begin + t.numel() * t.element_size()) {}
    bool overlap(const Bytes& other) const { return begin < other.end && other.begin < end; }
};

inline Decay read_decay(const std::string& decay) {
    if (decay == "mini_batch_aware") return Decay::mini_batch_aware;
    if (decay == "decoupled") return Decay::decoupled;
    check(decay == "lazy", "decay must be mini_batch_aware, decoupled or lazy, got ", decay);
    return Decay::lazy;
}

inline Nonfinite read_nonfinite(const std::string& nonfinite) {
    if (nonfinite == "propagate") return Nonfinite::propagate;
    if (nonfinite == "skip") return Nonfinite::skip;
    check(nonfinite == "error", "nonfinite must be propagate, skip or error, got ", nonfinite);
    return Nonfinite::error;
}

// The tensors of a call, but those of the rule's state.
struct EmbeddingArguments {
    std::vector<TableArguments> tables;
    std::vector<Bytes> grads;              // of the tables: still read when rows are already written
    ScalarType dtype = ScalarType::Float;  // of the weights
    Device device = torch::headeronly::DeviceType::CPU;
    bool stochastic = false;
    Nonfinite nonfinite;
    bool check_ids;
    OptionalTensor grad_scale, found_inf;  // [1], float32

    // A list with a tensor of each table that is updated in place: of the weight's shape, or with per_row a number per row.
    void check_state(const Tensors& states, const char* argument, ScalarType expected, bool per_row = false) const {
        check(states.size() == tables.size(), argument, " must have one tensor of each of the ", tables.size(),
              " weights, got ", states.size());
        std::vector<Bytes> written;
        for (size_t i = 0; i < states.size(); ++i) {
            const TableArguments& t = tables[i];
            const std::string name = t.name + argument;
            const std::vector<int64_t> sizes =
                per_row ? std::vector<int64_t>{t.num_embeddings} : std::vector<int64_t>{t.num_embeddings, t.dim};
            check_tensor(states[i], name.c_str(), sizes, expected, device);
            check(states[i].is_contiguous(), name, " must be contiguous: it is updated in place");
            const Bytes bytes(states[i]);
            for (const Bytes& grad : grads) {
                check(!bytes.overlap(grad), t.name, "grad must not share memory with ", argument);
            }
            for (size_t j = 0; j < i; ++j) {
                check(!bytes.overlap(written[j]), name, " must not share memory with that of table ", j);
            }
            written.push_back(bytes);
        }
    }
    ScalarType state_dtype() const { return compute_dtype(dtype); }
};

inline OptionalTensor read_scalar(const OptionalTensor& t, const char* argument, const Device& device) {
    if (!t.has_value()) return std::nullopt;
    check(t->numel() == 1, argument, " must have one element, got shape ", to_string(sizes_of(*t)));
    check(t->device() == device, argument, " must be on the device of the weights");
    check(t->scalar_type() == ScalarType::Float, argument, " must be float32");
    return t;
}

inline EmbeddingArguments read_embedding_arguments(const Tensors& weights, const Tensors& ids, const Tensors& grads,
                                                   const Tensors& counts, const std::vector<int64_t>& padding_idx,
                                                   const std::vector<int64_t>& seeds, const std::vector<double>& log_decays,
                                                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                                                   const std::string& nonfinite, bool check_ids) {
    const size_t count = weights.size();
    const auto check_list = [&](size_t size, const char* argument, bool may_be_empty) {
        check(size == count || (may_be_empty && size == 0), argument, " must have one entry of each of the ", count,
              " weights, got ", size);
    };
    check_list(ids.size(), "ids", false);
    check_list(grads.size(), "grads", false);
    check_list(padding_idx.size(), "padding_idx", false);
    check_list(counts.size(), "counts", true);
    check_list(seeds.size(), "seeds", true);
    check_list(log_decays.size(), "log_decays", true);

    EmbeddingArguments a{.nonfinite = read_nonfinite(nonfinite), .check_ids = check_ids};
    if (count == 0) return a;
    a.dtype = weights[0].scalar_type();
    a.device = weights[0].device();
    a.stochastic = !seeds.empty();
    a.grad_scale = read_scalar(grad_scale, "grad_scale", a.device);
    a.found_inf = read_scalar(found_inf, "found_inf", a.device);
    a.tables.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const std::string name = count > 1 ? "table " + std::to_string(i) + ": " : "";
        const auto named = [&](const char* argument) { return name + argument; };
        check(weights[i].dim() == 2, name, "weight must be 2-D, got ", weights[i].dim(), "-D");
        check(ids[i].dim() == 1, name, "ids must be 1-D, got ", ids[i].dim(), "-D");
        const int64_t rows = weights[i].size(0), dim = weights[i].size(1);
        const ScalarType id_type = ids[i].scalar_type();
        check(is_integer(id_type), name, "ids must be int32 or int64");
        check(padding_idx[i] >= -1 && padding_idx[i] < rows, name, "padding_idx must be in -1..", rows - 1, ", got ",
              padding_idx[i]);
        OptionalTensor dense_counts;
        if (!counts.empty()) {
            const ScalarType type = counts[i].scalar_type();
            check(is_integer(type) || type == ScalarType::Float || type == ScalarType::Double, name,
                  "counts must be int32, int64, float32 or float64");
            dense_counts = checked(counts[i], named("counts").c_str(), {rows}, type, a.device);
        }
        a.tables.push_back({.name = name,
                            .num_embeddings = rows,
                            .dim = dim,
                            .weight = weights[i],
                            .ids = checked(ids[i], named("ids").c_str(), {ids[i].size(0)}, id_type, a.device),
                            .grad = checked(grads[i], named("grad").c_str(), {ids[i].size(0), dim}, a.dtype, a.device),
                            .counts = dense_counts,
                            .padding = padding_idx[i],
                            .seed = seeds.empty() ? 0 : seeds[i],
                            .log_decay = log_decays.empty() ? 0 : log_decays[i]});
    }
    for (const TableArguments& t : a.tables) a.grads.emplace_back(t.grad);
    a.check_state(weights, "weight", a.dtype);
    return a;
}

// decayed and log_decays: of mba_sgd_, which alone may be lazy.
inline DecayRule read_decay_rule(const std::string& decay, double lr, double l2, const EmbeddingArguments& a,
                                 const Tensors& decayed = {}, const std::vector<double>& log_decays = {}) {
    const DecayRule rule{read_decay(decay), lr, l2};
    const bool lazy = rule.mode == Decay::lazy;
    check(lazy == !decayed.empty() || a.tables.empty(), "decayed must be given with decay=lazy, and only with it");
    check(lazy == !log_decays.empty() || a.tables.empty(), "log_decays must be given with decay=lazy, and only with it");
    if (lazy) a.check_state(decayed, "decayed", ScalarType::Double, true);
    for (const TableArguments& t : a.tables) check(!lazy || !t.counts.has_value(), t.name, "decay=lazy takes no counts");
    return rule;
}

inline void check_momentum_buffers(const EmbeddingArguments& a, const DecayRule& decay, const Tensors& momentum_buffers,
                                   double momentum) {
    const bool given = !momentum_buffers.empty();
    check(given || momentum == 0 || a.tables.empty(),
          "momentum_buffer must be given where momentum is not 0, got momentum=", momentum);
    check(!given || decay.mode != Decay::lazy, "decay=lazy takes no momentum");
    if (given) a.check_state(momentum_buffers, "momentum_buffer", a.state_dtype());
}

}  // namespace dien_ops::ops
