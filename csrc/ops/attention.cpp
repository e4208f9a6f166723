// SPDX-License-Identifier: Apache-2.0
// Softmax attention over states between torch and the kernels: checks, allocation, threads.
#include "cpu/attention.h"

#include <algorithm>
#include <tuple>

#include "ops/attention_arguments.h"

namespace dien_ops::ops {
namespace {

using cpu::BilinearAttentionBackward;
using cpu::BilinearAttentionForward;
using cpu::BilinearAttentionProblem;

// The call as the kernels take it: what is stored in 16 bits is computed in float32, and converted before and after.
struct Arguments : AttentionArguments {
    std::vector<int64_t> lengths;

    Arguments(const AttentionArguments& arguments, const OptionalTensor& given_lengths)
        : AttentionArguments(arguments), lengths(read_lengths(given_lengths, B, T)) {
        states = converted(states, compute_dtype);
        target = converted(target, compute_dtype);
    }
    Tensor empty_like_states() const {
        return like_states([&](const std::vector<int64_t>& sizes) { return empty(sizes, compute_dtype); });
    }
};

template <typename T>
BilinearAttentionProblem<T> problem(const Arguments& a) {
    // Every block has a copy of the weight's gradient: many enough to share out to threads, but not too many to sum up.
    constexpr int64_t kFewestSequences = 16, kMostBlocks = 64;
    BilinearAttentionProblem<T> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.hidden_size = a.H, p.target_size = a.A;
    p.sequences_per_block = a.C >= kFewestSequences ? 1 : kFewestSequences / std::max<int64_t>(a.C, 1);
    p.sequences_per_block = std::max(p.sequences_per_block, divide_up(a.B, kMostBlocks));
    p.lengths = a.lengths.data();
    p.states = pointer<T>(a.states), p.state_stride_b = a.state_stride_b(), p.state_stride_t = a.state_stride_t();
    p.target = pointer<T>(a.target);
    p.weight = pointer<T>(a.weight);
    return p;
}

std::tuple<Tensor, Tensor> bilinear_attention(const Tensor& states, const Tensor& target, const Tensor& weight,
                                              const OptionalTensor& lengths, [[maybe_unused]] bool allow_tf32) {
    const Arguments a(read_attention_arguments(states, target, weight), lengths);
    const Tensor scores = empty({a.B, a.C, a.T}, a.compute_dtype), projected = empty({a.B, a.C, a.H}, a.compute_dtype);
    with_floating_type(a.compute_dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        BilinearAttentionForward<T> p{problem<T>(a)};
        p.scores = mutable_pointer<T>(scores);
        p.projected = mutable_pointer<T>(projected);
        cpu::with_capability([&](auto target) {
            const Tensor packed = empty({cpu::bilinear_attention_packed_size<target(), T>(a.H, a.A)}, a.compute_dtype);
            p.packed = mutable_pointer<T>(packed);
            cpu::bilinear_attention_pack<target()>(p);
            parallel_tasks(p.blocks(), [&](int64_t i) { cpu::bilinear_attention_forward<target()>(p, i, i + 1); });
        });
    });
    return {converted(scores, a.dtype), projected};
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_backward(const Tensor& grad_scores, const Tensor& states,
                                                               const Tensor& target, const Tensor& weight,
                                                               const Tensor& projected, const Tensor& scores,
                                                               const OptionalTensor& lengths,
                                                               [[maybe_unused]] bool allow_tf32) {
    const Arguments a(read_attention_arguments(states, target, weight), lengths);
    const AttentionResults results(a, projected, scores, grad_scores);
    const Tensor wide_scores = converted(results.scores, a.compute_dtype);
    const Tensor wide_grad_scores = converted(results.grad_scores, a.compute_dtype);
    const Tensor grad_states = a.empty_like_states(), grad_target = empty({a.B, a.C, a.A}, a.compute_dtype);
    const Tensor grad_weight = zeros({a.H, a.A}, a.compute_dtype), grad_projected = empty({a.B, a.C, a.H}, a.compute_dtype);
    with_floating_type(a.compute_dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        BilinearAttentionBackward<T> p{problem<T>(a)};
        const Tensor partial_weights = zeros({p.blocks(), a.H, a.A}, a.compute_dtype);
        p.projected = pointer<T>(results.projected);
        p.scores = pointer<T>(wide_scores);
        p.grad_scores = pointer<T>(wide_grad_scores);
        p.grad_projected = mutable_pointer<T>(grad_projected);
        p.partial_weights = mutable_pointer<T>(partial_weights);
        p.grad_states = mutable_pointer<T>(grad_states);
        p.grad_target = mutable_pointer<T>(grad_target);
        p.grad_weight = mutable_pointer<T>(grad_weight);
        cpu::with_capability([&](auto target) {
            const Tensor packed = empty({cpu::bilinear_attention_packed_size<target(), T>(a.H, a.A)}, a.compute_dtype);
            p.packed = mutable_pointer<T>(packed);
            cpu::bilinear_attention_backward_pack<target()>(p);
            parallel_tasks(p.blocks(), [&](int64_t i) { cpu::bilinear_attention_backward<target()>(p, i, i + 1); });
            cpu::bilinear_attention_reduce<target()>(p);
        });
    });
    return {converted(grad_states, a.dtype), converted(grad_target, a.dtype), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("bilinear_attention", TORCH_BOX(&bilinear_attention));
    m.impl("bilinear_attention_backward", TORCH_BOX(&bilinear_attention_backward));
}

}  // namespace dien_ops::ops
