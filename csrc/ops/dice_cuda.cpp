// SPDX-License-Identifier: Apache-2.0
// The dice column between torch and the CUDA kernels: allocation, the order of launches. Nothing here waits for the device or
// reads its memory, so a call can be captured in a CUDA graph; memory is torch's.
#include <tuple>

#include "cuda/dice.h"
#include "ops/cuda_device.h"
#include "ops/dice_arguments.h"

namespace dien_ops::ops {
namespace {

using cuda::DiceBackward;
using cuda::DiceProblem;

template <typename S>
DiceProblem<S> problem(const DiceArguments& a, const OptionalTensor& lengths, const Tensor& mean, const Tensor& var) {
    DiceProblem<S> p{};
    p.batch = a.B, p.steps = a.T, p.channels = a.C;
    p.lengths = pointer<int64_t>(lengths);
    p.eps = a.eps;
    p.input = pointer<S>(a.input);
    p.alpha = pointer<Compute<S>>(a.alpha);
    p.weight = pointer<Compute<S>>(a.weight);
    p.bias = pointer<Compute<S>>(a.bias);
    p.mean = pointer<Compute<S>>(mean);
    p.var = pointer<Compute<S>>(var);
    return p;
}

std::tuple<Tensor, Tensor, Tensor> dice(const Tensor& input, const Tensor& alpha, const OptionalTensor& mean,
                                        const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& lengths, double eps, double variance_eps) {
    const DiceArguments a = read_dice_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    check(mean.has_value() == var.has_value(), "mean and var must be given together");
    const OptionalTensor fixed_mean = a.columns(mean, "mean"), fixed_var = a.columns(var, "var");
    const CudaDevice device(input);
    const OptionalTensor steps = device.lengths(lengths, a.B, a.T);
    const Tensor output = device.empty(a.sizes(), a.dtype);
    const Tensor used_mean = device.empty({a.C}, a.compute_dtype), used_var = device.empty({a.C}, a.compute_dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        const auto p = problem<S>(a, steps, fixed_mean.value_or(used_mean), fixed_var.value_or(used_var));
        if (!mean.has_value()) {
            const Tensor partial = device.empty({cuda::dice_moments_partial(p)}, ScalarType::Double);
            cuda::dice_moments(device.stream(), p, mutable_pointer<double>(partial), mutable_pointer<T>(used_mean),
                               mutable_pointer<T>(used_var));
        }
        const bool copied = mean.has_value();  // an operator's results are no aliases of its arguments
        cuda::dice_forward(device.stream(), p, mutable_pointer<S>(output), copied ? mutable_pointer<T>(used_mean) : nullptr,
                           copied ? mutable_pointer<T>(used_var) : nullptr);
    });
    return {output, used_mean, used_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dice_backward(const Tensor& grad_output, const Tensor& input, const Tensor& alpha,
                                                         const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, const OptionalTensor& lengths,
                                                         bool batch_statistics, double eps, double variance_eps) {
    const DiceArguments a = read_dice_arguments(input, alpha, weight, bias, lengths, eps, variance_eps);
    const Tensor dense_grad_output = checked(grad_output, "grad_output", a.sizes(), a.dtype, a.device);
    const Tensor dense_mean = a.columns(mean, "mean"), dense_var = a.columns(var, "var");
    const CudaDevice device(input);
    const OptionalTensor steps = device.lengths(lengths, a.B, a.T);
    const auto empty = [&](const std::vector<int64_t>& sizes, ScalarType dtype) { return device.empty(sizes, dtype); };
    const DiceGradients grads(a, empty);
    const Tensor feedback = device.empty({2, a.C}, a.compute_dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        DiceBackward<S> p{problem<S>(a, steps, dense_mean, dense_var)};
        const Tensor partial = device.empty({cuda::dice_sums_partial<S>(p)}, ScalarType::Double);
        p.grad_output = pointer<S>(dense_grad_output);
        p.batch_statistics = batch_statistics;
        p.partial = mutable_pointer<double>(partial);
        p.feedback = mutable_pointer<T>(feedback);
        p.grad_alpha = mutable_pointer<T>(grads.alpha);
        p.grad_weight = mutable_pointer<T>(grads.weight);
        p.grad_bias = mutable_pointer<T>(grads.bias);
        p.grad_input = mutable_pointer<S>(grads.input);
        cuda::dice_sums(device.stream(), p);
        cuda::dice_backward(device.stream(), p);
    });
    return grads.of(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("dice", TORCH_BOX(&dice));
    m.impl("dice_backward", TORCH_BOX(&dice_backward));
}

}  // namespace dien_ops::ops
