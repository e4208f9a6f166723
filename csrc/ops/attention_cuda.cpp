// SPDX-License-Identifier: Apache-2.0
// Softmax attention over states between torch and the CUDA kernels: checks, allocation, the order of launches. Nothing here
// waits for the device or reads its memory, so a call can be captured in a CUDA graph.
#include <tuple>

#include "cuda/attention.h"
#include "ops/attention_arguments.h"
#include "ops/cuda_device.h"

namespace dien_ops::ops {
namespace {

using cuda::BilinearAttentionBackward;
using cuda::BilinearAttentionProblem;

// lengths: checked, on the device.
template <typename S>
BilinearAttentionProblem<S> problem(const AttentionArguments& a, const OptionalTensor& lengths, const Tensor& projected,
                                    bool allow_tf32) {
    BilinearAttentionProblem<S> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.hidden_size = a.H, p.target_size = a.A;
    p.tf32 = allow_tf32;
    p.lengths = pointer<int64_t>(lengths);
    p.states = pointer<S>(a.states), p.state_stride_b = a.state_stride_b(), p.state_stride_t = a.state_stride_t();
    p.target = pointer<S>(a.target);
    p.weight = pointer<Compute<S>>(a.weight);
    p.projected = pointer<Compute<S>>(projected);
    return p;
}

std::tuple<Tensor, Tensor> bilinear_attention(const Tensor& states, const Tensor& target, const Tensor& weight,
                                              const OptionalTensor& given_lengths, bool allow_tf32) {
    const AttentionArguments a = read_attention_arguments(states, target, weight);
    const CudaDevice device(states);
    const OptionalTensor lengths = device.lengths(given_lengths, a.B, a.T);
    const Tensor scores = device.empty({a.B, a.C, a.T}, a.dtype), projected = device.empty({a.B, a.C, a.H}, a.compute_dtype);
    with_storage_type(a.dtype, "states", [&](auto zero) {
        using S = decltype(zero);
        const auto p = problem<S>(a, lengths, projected, allow_tf32);
        const Tensor workspace = device.empty({cuda::bilinear_attention_workspace(p)}, a.compute_dtype);
        cuda::bilinear_attention_project(device.stream(), p, mutable_pointer<Compute<S>>(projected));
        cuda::bilinear_attention_scores(device.stream(), p, mutable_pointer<Compute<S>>(workspace), mutable_pointer<S>(scores));
    });
    return {scores, projected};
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_backward(const Tensor& grad_scores, const Tensor& states,
                                                               const Tensor& target, const Tensor& weight,
                                                               const Tensor& projected, const Tensor& scores,
                                                               const OptionalTensor& given_lengths, bool allow_tf32) {
    const AttentionArguments a = read_attention_arguments(states, target, weight);
    const AttentionResults results(a, projected, scores, grad_scores);
    const CudaDevice device(states);
    const OptionalTensor lengths = device.lengths(given_lengths, a.B, a.T);
    const auto empty = [&](const std::vector<int64_t>& sizes) { return device.empty(sizes, a.compute_dtype); };
    const Tensor grad_states = a.like_states([&](const std::vector<int64_t>& sizes) { return device.empty(sizes, a.dtype); });
    const Tensor grad_target = device.empty({a.B, a.C, a.A}, a.dtype);
    const Tensor grad_weight = empty({a.H, a.A}), grad_projected = empty({a.B, a.C, a.H});
    with_storage_type(a.dtype, "states", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        BilinearAttentionBackward<S> p{problem<S>(a, lengths, results.projected, allow_tf32)};
        const Tensor workspace = empty({cuda::bilinear_attention_backward_workspace<S>(p)});
        const Tensor partial_weights = empty({cuda::bilinear_attention_weight_parts<S>(p), a.H, a.A});
        p.scores = pointer<S>(results.scores);
        p.grad_scores = pointer<S>(results.grad_scores);
        p.workspace = mutable_pointer<T>(workspace);
        p.grad_projected = mutable_pointer<T>(grad_projected);
        p.partial_weights = mutable_pointer<T>(partial_weights);
        p.grad_states = mutable_pointer<S>(grad_states);
        p.grad_target = mutable_pointer<S>(grad_target);
        p.grad_weight = mutable_pointer<T>(grad_weight);
        cuda::bilinear_attention_backward(device.stream(), p);
        cuda::bilinear_attention_project_backward(device.stream(), p);
    });
    return {grad_states, grad_target, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("bilinear_attention", TORCH_BOX(&bilinear_attention));
    m.impl("bilinear_attention_backward", TORCH_BOX(&bilinear_attention_backward));
}

}  // namespace dien_ops::ops
