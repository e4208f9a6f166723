// SPDX-License-Identifier: Apache-2.0
// The local activation unit between torch and the kernels: checks, allocation, threads.
#include "cpu/activation_unit.h"

#include <algorithm>
#include <tuple>

#include "ops/activation_unit_arguments.h"

namespace dien_ops::ops {
namespace {

using cpu::UnitBackward;
using cpu::UnitForward;
using cpu::UnitLayer;
using cpu::UnitMatrix;
using cpu::UnitPair;
using cpu::UnitProblem;

// The tensors of a call and the steps that are valid.
struct Arguments : UnitArguments {
    std::vector<int64_t> lengths;

    Arguments(const UnitArguments& a, const OptionalTensor& given) : UnitArguments(a), lengths(read_lengths(given, a.B, a.T)) {}
};

// The work, cut up. Depends on shapes and lengths alone.
struct Plan {
    std::vector<UnitPair> pairs;
    std::vector<int64_t> tiles = {0}, partitions = {0};
    int64_t rows = 0, most_tile_rows = 0, most_tile_pairs = 0;

    explicit Plan(const Arguments& a) {
        // A tile's hidden values should lie in the second cache. A partition has its own copy of the parameters' gradients.
        constexpr int64_t kRowsPerTile = 64, kRowsPerPartition = 1024, kMostPartitions = 64;
        int64_t total = 0;
        for (const int64_t length : a.lengths) total += length * a.C;
        const int64_t partition_rows = std::max(kRowsPerPartition, divide_up(total, kMostPartitions));
        int64_t tile_start = 0, partition_start = 0;
        const auto end_tile = [&] {
            if (rows == tile_start) return;
            most_tile_rows = std::max(most_tile_rows, rows - tile_start);
            most_tile_pairs = std::max(most_tile_pairs, int64_t(pairs.size()) - tiles.back());
            tiles.push_back(int64_t(pairs.size()));
            tile_start = rows;
        };
        const auto end_partition = [&] {
            end_tile();
            if (rows == partition_start) return;
            partitions.push_back(int64_t(tiles.size()) - 1);
            partition_start = rows;
        };
        for (int64_t b = 0; b < a.B; ++b) {
            for (int64_t c = 0; c < a.C && a.lengths[b] > 0; ++c) {
                pairs.push_back({b, b * a.C + c, rows, a.lengths[b]});
                rows += a.lengths[b];
                if (rows - tile_start >= kRowsPerTile) end_tile();
                if (rows - partition_start >= partition_rows) end_partition();
            }
        }
        end_partition();
    }
    int64_t tile_count() const { return int64_t(tiles.size()) - 1; }
    int64_t partition_count() const { return int64_t(partitions.size()) - 1; }
};

// A UnitProblem and the memory that it borrows.
template <typename T>
class Work {
  public:
    Work(const Arguments& a, const Plan& plan, bool backward) : a_(a), backward_(backward) {
        problem.targets = a.C, problem.steps = a.T, problem.embedding_dim = a.D, problem.hidden_layers = a.hidden_layers();
        problem.activation = a.activation, problem.batch_statistics = a.batch_statistics, problem.softmax = a.softmax;
        problem.eps = a.eps;
        problem.query = pointer<T>(a.query), problem.keys = pointer<T>(a.keys);
        problem.pairs = plan.pairs.data(), problem.tiles = plan.tiles.data();
        problem.tile_count = plan.tile_count(), problem.row_count = plan.rows;
        problem.most_tile_rows = plan.most_tile_rows, problem.most_tile_pairs = plan.most_tile_pairs;
        problem.hidden = nullptr, problem.hidden_rows = a.B * a.C * a.T;

        const int64_t D = a.D, outputs = a.sizes.empty() ? 1 : a.sizes[0];
        problem.query_matrix = matrix(D, D, outputs);
        problem.product_matrix = matrix(D, D, outputs);
        int64_t offset = 0;
        for (size_t i = 0; i < std::max<size_t>(a.sizes.size(), 1); ++i) {
            UnitLayer<T> l{};
            l.matrix = i == 0 ? matrix(D, D, outputs) : matrix(a.sizes[i - 1], a.padded(a.sizes[i - 1]), a.sizes[i]);
            const int64_t width = l.matrix.width;
            l.weight = pointer<T>(a.weights[i]), l.bias = pointer<T>(a.biases[i]);
            l.alpha = a.alphas.empty() ? nullptr : pointer<T>(a.alphas[i]);
            l.mean = memory(width), l.var = memory(width), l.padded_bias = memory(width);
            l.columns = memory(4 * width), l.feedback = backward ? memory(2 * width) : nullptr;
            l.offset = offset;
            offset += width;
            layers.push_back(l);
        }
        problem.layers = layers.data(), problem.total_width = offset;
        const int64_t last = layers.back().matrix.width;
        output_gradient = share(last);
        problem.output_weight = nullptr, problem.output_bias = 0;
        if (!a.sizes.empty()) {
            T* weight = memory(last);
            std::copy_n(pointer<T>(a.weights.back()), a.sizes.back(), weight);
            problem.output_weight = weight;
            problem.output_bias = *pointer<T>(a.biases.back());
        }
    }

    // Memory that starts as zeros and lives as long as this: many small pieces, of few allocations.
    T* memory(int64_t size) {
        constexpr int64_t kAligned = kUnitAlignment / sizeof(T), kChunk = 16384;
        size = divide_up(size, kAligned) * kAligned;
        if (size > left_) {
            left_ = std::max(size, kChunk);
            chunks_.push_back(zeros({left_}, a_.dtype));
            next_ = mutable_pointer<T>(chunks_.back());
        }
        left_ -= size;
        next_ += size;
        return next_ - size;
    }

    UnitProblem<T> problem{};
    std::vector<UnitLayer<T>> layers;
    int64_t output_gradient, share_size = 0;

  private:
    int64_t share(int64_t size) { return (share_size += size) - size; }

    UnitMatrix<T> matrix(int64_t inputs, int64_t input_width, int64_t outputs) {
        constexpr int64_t kPanel = cpu::kUnitLargestPanel / sizeof(T);
        const int64_t width = a_.padded(outputs);
        UnitMatrix<T> m{inputs, outputs, input_width, width};
        m.transposed = memory(input_width * width);
        m.forward = memory(divide_up(width, kPanel) * kPanel * inputs);
        m.backward = backward_ ? memory(divide_up(input_width, kPanel) * kPanel * outputs) : nullptr;
        m.gradient = share(input_width * width);
        return m;
    }

    const Arguments& a_;
    bool backward_;
    Tensors chunks_;
    T* next_ = nullptr;
    int64_t left_ = 0;
};

// Calls f(of the layer, of statistics [2, sum of hidden sizes], size) for the mean and the variance of every hidden layer.
template <typename T, typename F>
void for_statistics(const Work<T>& work, const Tensor& statistics, F&& f) {
    T* mean = mutable_pointer<T>(statistics);
    T* var = mean + statistics.size(1);
    for (int64_t i = 0; i < work.problem.hidden_layers; ++i) {
        const UnitLayer<T>& l = work.layers[i];
        f(l.mean, mean, l.matrix.outputs), f(l.var, var, l.matrix.outputs);
        mean += l.matrix.outputs, var += l.matrix.outputs;
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> local_activation_unit(const Tensor& query, const Tensor& keys,
                                                                 const Tensors& weights, const Tensors& biases,
                                                                 const Tensors& alphas, const Tensors& running_means,
                                                                 const Tensors& running_vars, const OptionalTensor& lengths,
                                                                 const std::string& activation, double eps, double variance_eps,
                                                                 bool softmax, [[maybe_unused]] bool allow_tf32) {
    if (const ScalarType stored = keys.scalar_type(); stored != compute_dtype(stored)) {
        const auto [pooled, scores, statistics, hidden] =
            local_activation_unit(widened(query, "query", stored), widened(keys, "keys", stored), weights, biases, alphas,
                                  running_means, running_vars, lengths, activation, eps, variance_eps, softmax, allow_tf32);
        return {converted(pooled, stored), converted(scores, stored), statistics, hidden};
    }
    const Arguments a(read_unit_arguments(query, keys, weights, biases, alphas, activation, running_means.empty(), eps,
                                          variance_eps, softmax),
                      lengths);
    const auto [means, vars] = read_running_statistics(a, running_means, running_vars);
    const Plan plan(a);
    const Tensor pooled = zeros(a.pooled_sizes(), a.dtype), scores = zeros(a.score_sizes(), a.dtype);
    const Tensor statistics = zeros(a.statistics_sizes(), a.dtype), hidden = empty(a.hidden_sizes(), a.dtype);
    with_floating_type(a.dtype, "keys", [&](auto zero) {
        using T = decltype(zero);
        Work<T> work(a, plan, false);
        for (size_t i = 0; i < means.size(); ++i) {
            std::copy_n(pointer<T>(means[i]), a.sizes[i], work.layers[i].mean);
            std::copy_n(pointer<T>(vars[i]), a.sizes[i], work.layers[i].var);
        }
        UnitForward<T> p{work.problem};
        int64_t widest = 0;
        for (const UnitLayer<T>& l : work.layers) widest = std::max(widest, l.matrix.width);
        const Tensor moments = zeros({a.batch_statistics ? plan.tile_count() * (1 + 2 * widest) : 0}, ScalarType::Double);
        if (a.batch_statistics) {
            p.hidden = mutable_pointer<T>(hidden);
            for (const UnitLayer<T>& l : work.layers) {  // rows that padding leaves over: what is returned must be defined
                T* rows = p.hidden + l.offset * p.hidden_rows;
                std::fill(rows + p.row_count * l.matrix.width, rows + p.hidden_rows * l.matrix.width, T(0));
            }
        }
        p.moments = mutable_pointer<double>(moments);
        p.scores = mutable_pointer<T>(scores);
        p.pooled = mutable_pointer<T>(pooled);
        cpu::with_capability([&](auto target) {
            const auto stages = [&](int64_t first, int64_t last) {
                parallel_ranges(plan.tile_count(),
                                [&](int64_t begin, int64_t end) { cpu::unit_forward<target()>(p, first, last, begin, end); });
            };
            cpu::unit_prepare<target(), T>(p);
            if (!a.batch_statistics) return stages(0, a.hidden_layers());
            for (int64_t layer = 0; layer < a.hidden_layers(); ++layer) {
                stages(layer, layer);
                cpu::unit_statistics<target()>(p, layer);
            }
            stages(a.hidden_layers(), a.hidden_layers());
        });
        for_statistics(work, statistics, [](const T* used, T* out, int64_t size) { std::copy_n(used, size, out); });
    });
    return {pooled, scores, statistics, hidden};
}

// The gradients of the parameters in torch's layout, from the sum of the partitions' shares.
template <typename T>
void write_parameter_gradients(const Arguments& a, const Work<T>& work, const UnitBackward<T>& p, const UnitGradients& grads) {
    const auto write = [&](const UnitMatrix<T>& m, const UnitMatrix<T>* subtract, T* out, int64_t stride) {
        for (int64_t o = 0; o < m.outputs; ++o) {
            for (int64_t i = 0; i < m.inputs; ++i) {
                const int64_t at = i * m.width + o;
                out[o * stride + i] =
                    p.shares[m.gradient + at] - (subtract != nullptr ? p.shares[subtract->gradient + at] : T(0));
            }
        }
    };
    T* first = mutable_pointer<T>(grads.weights[0]);
    write(p.query_matrix, nullptr, first, 4 * a.D);
    write(work.layers[0].matrix, nullptr, first + a.D, 4 * a.D);
    write(p.query_matrix, &work.layers[0].matrix, first + 2 * a.D, 4 * a.D);  // d: in W_q + W_d and in W_k - W_d
    write(p.product_matrix, nullptr, first + 3 * a.D, 4 * a.D);
    for (size_t i = 0; i < work.layers.size(); ++i) {
        const UnitLayer<T>& l = work.layers[i];
        if (i > 0) write(l.matrix, nullptr, mutable_pointer<T>(grads.weights[i]), l.matrix.inputs);
        const double* sums = p.sums + 4 * l.offset;
        std::copy_n(sums + 3 * l.matrix.width, l.matrix.outputs, mutable_pointer<T>(grads.biases[i]));
        if (!a.alphas.empty()) std::copy_n(sums, l.matrix.outputs, mutable_pointer<T>(grads.alphas[i]));
    }
    if (a.sizes.empty()) return;
    std::copy_n(p.shares + p.output_gradient, a.sizes.back(), mutable_pointer<T>(grads.weights.back()));
    *mutable_pointer<T>(grads.biases.back()) = T(p.sums[4 * p.total_width]);
}

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors> local_activation_unit_backward(
    const OptionalTensor& grad_pooled, const OptionalTensor& grad_scores, const Tensor& query, const Tensor& keys,
    const Tensors& weights, const Tensors& biases, const Tensors& alphas, const Tensor& statistics, const Tensor& hidden,
    const Tensor& scores, const OptionalTensor& lengths, const std::string& activation, bool batch_statistics, double eps,
    double variance_eps, bool softmax, [[maybe_unused]] bool allow_tf32) {
    if (const ScalarType stored = keys.scalar_type(); stored != compute_dtype(stored)) {
        const auto [of_query, of_keys, of_weights, of_biases, of_alphas] = local_activation_unit_backward(
            widened(grad_pooled, "grad_pooled", stored), widened(grad_scores, "grad_scores", stored),
            widened(query, "query", stored), widened(keys, "keys", stored), weights, biases, alphas, statistics, hidden,
            widened(scores, "scores", stored), lengths, activation, batch_statistics, eps, variance_eps, softmax, allow_tf32);
        return {converted(of_query, stored), converted(of_keys, stored), of_weights, of_biases, of_alphas};
    }
    const Arguments a(
        read_unit_arguments(query, keys, weights, biases, alphas, activation, batch_statistics, eps, variance_eps, softmax),
        lengths);
    const UnitBackwardArguments given(a, grad_pooled, grad_scores, statistics, hidden, scores);
    const Plan plan(a);
    const UnitGradients grads(a, zeros);
    with_floating_type(a.dtype, "keys", [&](auto zero) {
        using T = decltype(zero);
        Work<T> work(a, plan, true);
        for_statistics(work, given.statistics, [](T* used, const T* saved, int64_t size) { std::copy_n(saved, size, used); });
        UnitBackward<T> p{work.problem};
        const int64_t shares = std::max<int64_t>(plan.partition_count(), 1);
        const Tensor sums = zeros({shares, 4 * p.total_width + 1}, ScalarType::Double);
        const Tensor logit_gradient = empty({a.batch_statistics ? p.hidden_rows : 0}, a.dtype);
        p.hidden = a.batch_statistics ? mutable_pointer<T>(given.hidden) : nullptr;
        p.logit_gradient = a.batch_statistics ? mutable_pointer<T>(logit_gradient) : nullptr;
        p.scores = pointer<T>(given.scores);
        p.grad_pooled = pointer<T>(given.grad_pooled);
        p.grad_scores = pointer<T>(given.grad_scores);
        p.partitions = plan.partitions.data(), p.partition_count = plan.partition_count();
        p.shares = work.memory(shares * work.share_size), p.share_size = work.share_size;
        p.sums = mutable_pointer<double>(sums);
        p.output_gradient = work.output_gradient;
        p.grad_query = mutable_pointer<T>(grads.query);
        p.grad_keys = mutable_pointer<T>(grads.keys);
        p.continued_keys = a.C > 1 ? work.memory(shares * a.T * a.D) : nullptr;
        cpu::with_capability([&](auto target) {
            const auto stages = [&](int64_t first, int64_t last) {
                parallel_ranges(plan.partition_count(),
                                [&](int64_t begin, int64_t end) { cpu::unit_backward<target()>(p, first, last, begin, end); });
            };
            cpu::unit_prepare<target(), T>(p);
            const int64_t top = a.hidden_layers();
            if (!a.batch_statistics) stages(top, 0);
            for (int64_t layer = top - 1; layer >= 0; --layer) {
                if (a.batch_statistics) stages(layer + 1, layer + 1);
                cpu::unit_feedback<target()>(p, layer);
            }
            if (a.batch_statistics) stages(0, 0);
            cpu::unit_reduce<target()>(p);
        });
        write_parameter_gradients(a, work, p, grads);
    });
    return grads.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("local_activation_unit", TORCH_BOX(&local_activation_unit));
    m.impl("local_activation_unit_backward", TORCH_BOX(&local_activation_unit_backward));
}

}  // namespace dien_ops::ops
