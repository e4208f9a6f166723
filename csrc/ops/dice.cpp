// SPDX-License-Identifier: Apache-2.0
// The dice column between torch and the CPU kernels: allocation, threads.
#include "cpu/dice.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ops/dice_arguments.h"

namespace dien_ops::ops {
namespace {

using cpu::DiceBackward;
using cpu::DiceForward;
using cpu::DiceProblem;

// The pointers are borrowed from the arguments. `columns` is memory that the problem's user keeps: see columns_of.
template <typename S>
DiceProblem<S> problem(const DiceArguments& a, const std::vector<int64_t>& lengths) {
    // Large enough that a block's sums are small beside it, small enough to share out to threads. One thread joins the sums.
    constexpr int64_t kValuesPerBlock = 16384, kFewestRows = 64, kMostBlocks = 128;
    DiceProblem<S> p{};
    p.batch = a.B, p.steps = a.T, p.channels = a.C;
    p.lengths = lengths.data();
    p.count = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    p.fold = cpu::dice_fold(a.C);
    const int64_t rows =
        std::max({kValuesPerBlock / std::max<int64_t>(a.C, 1), kFewestRows, divide_up(a.B * a.T, kMostBlocks)});
    p.rows_per_block = divide_up(rows, p.fold) * p.fold;
    p.eps = a.eps;
    p.input = pointer<S>(a.input);
    p.alpha = pointer<Compute<S>>(a.alpha);
    p.weight = pointer<Compute<S>>(a.weight);
    p.bias = pointer<Compute<S>>(a.bias);
    return p;
}

template <typename S>
Tensor columns_of(const DiceProblem<S>& p, int64_t rows, const DiceArguments& a) {
    return empty({rows, p.width()}, a.compute_dtype);
}

std::tuple<Tensor, Tensor, Tensor> dice(const Tensor& input, const Tensor& alpha, const OptionalTensor& mean,
                                        const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& lengths, double eps, double variance_eps) {
    const DiceArguments a = read_dice_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    check(mean.has_value() == var.has_value(), "mean and var must be given together");
    const OptionalTensor fixed_mean = a.columns(mean, "mean"), fixed_var = a.columns(var, "var");
    const std::vector<int64_t> steps = read_lengths(lengths, a.B, a.T);
    const Tensor output = empty(a.sizes(), a.dtype);
    const Tensor used_mean = empty({a.C}, a.compute_dtype), used_var = empty({a.C}, a.compute_dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        DiceForward<S> p{problem<S>(a, steps)};
        const Tensor columns = columns_of(p, 4, a);
        p.columns = mutable_pointer<T>(columns);
        p.mean = mutable_pointer<T>(used_mean);
        p.var = mutable_pointer<T>(used_var);
        p.output = mutable_pointer<S>(output);
        cpu::with_capability([&](auto target) {
            if (mean.has_value()) {
                std::copy_n(pointer<T>(fixed_mean), a.C, p.mean);
                std::copy_n(pointer<T>(fixed_var), a.C, p.var);
            } else {
                const Tensor moments = zeros({std::max<int64_t>(p.blocks(), 1), 1 + 2 * a.C}, ScalarType::Double);
                p.moments = mutable_pointer<double>(moments);
                parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_moments<target()>(p, begin, end); });
                cpu::dice_statistics<target()>(p);
            }
            cpu::dice_prepare<target(), S>(p, p.mean, p.var);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_forward<target()>(p, begin, end); });
        });
    });
    return {output, used_mean, used_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dice_backward(const Tensor& grad_output, const Tensor& input, const Tensor& alpha,
                                                         const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& lengths,
                                                         bool batch_statistics, double eps, double variance_eps) {
    const DiceArguments a = read_dice_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    const Tensor dense_grad_output = checked(grad_output, "grad_output", a.sizes(), a.dtype);
    const Tensor dense_mean = a.columns(mean, "mean"), dense_var = a.columns(var, "var");
    const std::vector<int64_t> steps = read_lengths(lengths, a.B, a.T);
    const DiceGradients grads(a, [](const std::vector<int64_t>& sizes, ScalarType dtype) { return empty(sizes, dtype); });
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        DiceBackward<S> p{problem<S>(a, steps)};
        const Tensor columns = columns_of(p, 4, a), feedback = columns_of(p, 2, a);
        const Tensor sums = zeros({std::max<int64_t>(p.blocks(), 1), 3, a.C}, ScalarType::Double);
        p.columns = mutable_pointer<T>(columns);
        p.var = pointer<T>(dense_var);
        p.grad_output = pointer<S>(dense_grad_output);
        p.batch_statistics = batch_statistics;
        p.sums = mutable_pointer<double>(sums);
        p.feedback = mutable_pointer<T>(feedback);
        p.grad_input = mutable_pointer<S>(grads.input);
        p.grad_alpha = mutable_pointer<T>(grads.alpha);
        p.grad_weight = mutable_pointer<T>(grads.weight);
        p.grad_bias = mutable_pointer<T>(grads.bias);
        cpu::with_capability([&](auto target) {
            cpu::dice_prepare<target(), S>(p, pointer<T>(dense_mean), p.var);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_sums<target()>(p, begin, end); });
            cpu::dice_reduce<target()>(p);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_backward<target()>(p, begin, end); });
        });
    });
    return grads.of(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("dice", TORCH_BOX(&dice));
    m.impl("dice_backward", TORCH_BOX(&dice_backward));
}

}  // namespace dien_ops::ops
