// SPDX-License-Identifier: Apache-2.0
// The dice column between torch and the kernels: checks, allocation, threads.
#include "cpu/dice.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ops/tensor.h"

namespace dien_ops::ops {
namespace {

using cpu::DiceBackward;
using cpu::DiceForward;
using cpu::DiceProblem;

// The tensors of a call, checked and contiguous. Owns what a DiceProblem borrows.
struct Arguments {
    int64_t B, T, C;  // an [N, C] input is one sequence of N steps
    ScalarType dtype;
    DiceEps eps;
    Tensor input, alpha;
    OptionalTensor weight, bias;
    std::vector<int64_t> lengths;
};

Arguments read_arguments(const Tensor& input, const Tensor& alpha, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& lengths, double eps, double variance_eps) {
    Arguments a;
    check(input.dim() == 2 || input.dim() == 3, "input must be 2-D or 3-D, got shape ", to_string(sizes_of(input)));
    check(input.dim() == 3 || !lengths.has_value(), "lengths need a 3-D input, got shape ", to_string(sizes_of(input)));
    a.B = input.dim() == 3 ? input.size(0) : 1;
    a.T = input.size(input.dim() - 2);
    a.C = input.size(input.dim() - 1);
    a.dtype = input.scalar_type();
    a.eps = {eps, variance_eps};
    a.input = checked(input, "input", sizes_of(input), a.dtype);
    a.alpha = checked(alpha, "alpha", {a.C}, a.dtype);
    a.weight = checked(weight, "weight", {a.C}, a.dtype);
    a.bias = checked(bias, "bias", {a.C}, a.dtype);
    a.lengths = read_lengths(lengths, a.B, a.T);
    return a;
}

template <typename T>
DiceProblem<T> problem(const Arguments& a) {
    // Large enough that a block's sums are small beside it, small enough for the second cache and to share out to threads.
    constexpr int64_t kValuesPerBlock = 16384, kFewestRows = 64, kMostRows = 1024;
    DiceProblem<T> p{};
    p.batch = a.B, p.steps = a.T, p.channels = a.C;
    p.lengths = a.lengths.data();
    p.count = std::accumulate(a.lengths.begin(), a.lengths.end(), int64_t{0});
    p.rows_per_block = std::clamp(kValuesPerBlock / std::max<int64_t>(a.C, 1), kFewestRows, kMostRows);
    p.eps = a.eps;
    p.input = pointer<T>(a.input);
    p.alpha = pointer<T>(a.alpha);
    p.weight = pointer<T>(a.weight);
    p.bias = pointer<T>(a.bias);
    return p;
}

std::tuple<Tensor, Tensor, Tensor> dice(const Tensor& input, const Tensor& alpha, const OptionalTensor& mean,
                                        const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& lengths, double eps, double variance_eps) {
    const Arguments a = read_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    check(mean.has_value() == var.has_value(), "mean and var must be given together");
    const OptionalTensor fixed_mean = checked(mean, "mean", {a.C}, a.dtype), fixed_var = checked(var, "var", {a.C}, a.dtype);
    const Tensor output = empty(sizes_of(input), a.dtype), columns = empty({4, a.C}, a.dtype);
    const Tensor used_mean = empty({a.C}, a.dtype), used_var = empty({a.C}, a.dtype);
    with_floating_type(a.dtype, "input", [&](auto zero) {
        using T = decltype(zero);
        DiceForward<T> p{problem<T>(a)};
        p.columns = mutable_pointer<T>(columns);
        p.mean = mutable_pointer<T>(used_mean);
        p.var = mutable_pointer<T>(used_var);
        p.output = mutable_pointer<T>(output);
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
            cpu::dice_prepare<target(), T>(p, p.mean, p.var);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_forward<target()>(p, begin, end); });
        });
    });
    return {output, used_mean, used_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dice_backward(const Tensor& grad_output, const Tensor& input, const Tensor& alpha,
                                                         const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& lengths,
                                                         bool batch_statistics, double eps, double variance_eps) {
    const Arguments a = read_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    const Tensor dense_grad_output = checked(grad_output, "grad_output", sizes_of(input), a.dtype);
    const Tensor dense_mean = checked(mean, "mean", {a.C}, a.dtype), dense_var = checked(var, "var", {a.C}, a.dtype);
    const Tensor grad_input = empty(sizes_of(input), a.dtype), grad_alpha = empty({a.C}, a.dtype);
    const Tensor grad_weight = empty({a.C}, a.dtype), grad_bias = empty({a.C}, a.dtype);
    const Tensor columns = empty({4, a.C}, a.dtype), feedback = empty({2, a.C}, a.dtype);
    with_floating_type(a.dtype, "input", [&](auto zero) {
        using T = decltype(zero);
        DiceBackward<T> p{problem<T>(a)};
        const Tensor sums = zeros({std::max<int64_t>(p.blocks(), 1), 3, a.C}, ScalarType::Double);
        p.columns = mutable_pointer<T>(columns);
        p.var = pointer<T>(dense_var);
        p.grad_output = pointer<T>(dense_grad_output);
        p.batch_statistics = batch_statistics;
        p.sums = mutable_pointer<double>(sums);
        p.feedback = mutable_pointer<T>(feedback);
        p.grad_input = mutable_pointer<T>(grad_input);
        p.grad_alpha = mutable_pointer<T>(grad_alpha);
        p.grad_weight = mutable_pointer<T>(grad_weight);
        p.grad_bias = mutable_pointer<T>(grad_bias);
        cpu::with_capability([&](auto target) {
            cpu::dice_prepare<target(), T>(p, pointer<T>(dense_mean), p.var);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_sums<target()>(p, begin, end); });
            cpu::dice_reduce<target()>(p);
            parallel_ranges(p.blocks(), [&](int64_t begin, int64_t end) { cpu::dice_backward<target()>(p, begin, end); });
        });
    });
    const Tensor absent = empty({0}, a.dtype);
    return {grad_input, grad_alpha, weight.has_value() ? grad_weight : absent, bias.has_value() ? grad_bias : absent};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("dice", TORCH_BOX(&dice));
    m.impl("dice_backward", TORCH_BOX(&dice_backward));
}

}  // namespace dien_ops::ops
