// SPDX-License-Identifier: Apache-2.0
// The arguments of the local activation unit, checked alike for every back end.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/activation_unit.h"
#include "common/dice.h"
#include "ops/tensor.h"

namespace dien_ops::ops {

inline Activation parse_activation(const std::string& name) {
    if (name == "sigmoid") return Activation::sigmoid;
    if (name == "prelu") return Activation::prelu;
    if (name == "dice") return Activation::dice;
    throw std::runtime_error("activation must be one of sigmoid, prelu, dice; got " + name);
}

inline void check_count(const char* argument, size_t count, size_t expected) {
    check(count == expected, argument, " must have ", expected, " tensors, got ", count);
}

// The tensors of a call, checked and contiguous. Query and keys have `dtype`, everything else is in what it is computed in.
struct UnitArguments {
    int64_t B, C, T, D;
    std::vector<int64_t> sizes;  // outputs of the hidden layers
    Activation activation;
    bool batch_statistics;  // Dice takes those of this batch
    bool softmax;
    DiceEps eps;
    ScalarType dtype;
    Tensor query, keys;
    Tensors weights, biases, alphas;

    int64_t hidden_layers() const { return static_cast<int64_t>(sizes.size()); }
    ScalarType compute_dtype() const { return ops::compute_dtype(dtype); }
    std::vector<int64_t> pooled_sizes() const { return {B, C, D}; }
    std::vector<int64_t> score_sizes() const { return {B, C, T}; }
    std::vector<int64_t> statistics_sizes() const {
        int64_t total = 0;
        for (const int64_t size : sizes) total += size;
        return {2, total};
    }
    int64_t padded(int64_t n) const {
        const int64_t bytes = compute_dtype() == ScalarType::Double ? sizeof(double) : sizeof(float);
        return divide_up(n * bytes, kUnitAlignment) * kUnitAlignment / bytes;
    }
    // The values before the activations are kept where they cannot be computed anew tile by tile.
    std::vector<int64_t> hidden_sizes() const {
        int64_t width = 0;
        for (const int64_t size : sizes) width += padded(size);
        return {batch_statistics ? B * C * T * width : 0};
    }
    // A parameter or a statistic, as query and keys are.
    Tensor parameter(const Tensor& t, const char* argument, const std::vector<int64_t>& expected) const {
        return checked(t, argument, expected, compute_dtype(), keys.device());
    }
};

// What forward and backward have in common. batch_statistics: whether Dice, if it is one, takes those of this batch.
inline UnitArguments read_unit_arguments(const Tensor& query, const Tensor& keys, const Tensors& weights, const Tensors& biases,
                                         const Tensors& alphas, const std::string& activation, bool batch_statistics,
                                         double eps, double variance_eps, bool softmax) {
    UnitArguments a;
    check(query.dim() == 3, "query must be 3-D, got shape ", to_string(sizes_of(query)));
    check(keys.dim() == 3, "keys must be 3-D, got shape ", to_string(sizes_of(keys)));
    check(!weights.empty(), "weights must have at least one tensor");
    a.B = keys.size(0), a.T = keys.size(1), a.D = keys.size(2), a.C = query.size(1);
    a.activation = parse_activation(activation);
    a.batch_statistics = batch_statistics && a.activation == Activation::dice && weights.size() > 1;
    a.softmax = softmax;
    a.eps = {eps, variance_eps};
    a.dtype = keys.scalar_type();
    a.keys = checked(keys, "keys", sizes_of(keys), a.dtype, keys.device());
    a.query = checked(query, "query", {a.B, a.C, a.D}, a.dtype, keys.device());
    check_count("biases", biases.size(), weights.size());
    check_count("alphas", alphas.size(), a.activation == Activation::sigmoid ? 0 : weights.size() - 1);
    int64_t inputs = 4 * a.D;
    for (size_t i = 0; i < weights.size(); ++i) {
        const bool last = i + 1 == weights.size();
        check(weights[i].dim() == 2, "weights must be 2-D, got shape ", to_string(sizes_of(weights[i])), " at layer ", i);
        const int64_t outputs = last ? 1 : weights[i].size(0);
        a.weights.push_back(a.parameter(weights[i], "weights", {outputs, inputs}));
        a.biases.push_back(a.parameter(biases[i], "biases", {outputs}));
        if (!last) a.sizes.push_back(outputs);
        if (!last && !alphas.empty()) a.alphas.push_back(a.parameter(alphas[i], "alphas", {outputs}));
        inputs = outputs;
    }
    return a;
}

// The given statistics of Dice's hidden layers: none for another activation, and none with those of the batch.
inline std::tuple<Tensors, Tensors> read_running_statistics(const UnitArguments& a, const Tensors& means, const Tensors& vars) {
    const size_t given = a.activation == Activation::dice && !a.batch_statistics ? a.sizes.size() : 0;
    check_count("running_means", means.size(), given);
    check_count("running_vars", vars.size(), given);
    Tensors dense_means, dense_vars;
    for (size_t i = 0; i < given; ++i) {
        dense_means.push_back(a.parameter(means[i], "running_means", {a.sizes[i]}));
        dense_vars.push_back(a.parameter(vars[i], "running_vars", {a.sizes[i]}));
    }
    return {dense_means, dense_vars};
}

// What the backward takes beside that.
struct UnitBackwardArguments {
    OptionalTensor grad_pooled, grad_scores;
    Tensor statistics, hidden, scores;

    UnitBackwardArguments(const UnitArguments& a, const OptionalTensor& grad_pooled, const OptionalTensor& grad_scores,
                          const Tensor& statistics, const Tensor& hidden, const Tensor& scores)
        : grad_pooled(checked(grad_pooled, "grad_pooled", a.pooled_sizes(), a.dtype, a.keys.device())),
          grad_scores(checked(grad_scores, "grad_scores", a.score_sizes(), a.dtype, a.keys.device())),
          statistics(a.parameter(statistics, "statistics", a.statistics_sizes())),
          hidden(a.parameter(hidden, "hidden", a.hidden_sizes())),
          scores(checked(scores, "scores", a.score_sizes(), a.dtype, a.keys.device())) {}
};

// The backward's results.
struct UnitGradients {
    Tensor query, keys;
    Tensors weights, biases, alphas;

    // allocate(sizes, dtype) allocates.
    template <typename Allocate>
    UnitGradients(const UnitArguments& a, const Allocate& allocate)
        : query(allocate(a.pooled_sizes(), a.dtype)), keys(allocate(sizes_of(a.keys), a.dtype)) {
        const auto like = [&](const Tensors& parameters) {
            Tensors gradients;
            for (const Tensor& t : parameters) gradients.push_back(allocate(sizes_of(t), a.compute_dtype()));
            return gradients;
        };
        weights = like(a.weights), biases = like(a.biases), alphas = like(a.alphas);
    }

    std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors> all() const { return {query, keys, weights, biases, alphas}; }
};

}  // namespace dien_ops::ops
