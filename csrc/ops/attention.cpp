// SPDX-License-Identifier: Apache-2.0
// Softmax attention over states between torch and the kernels: checks, allocation, threads.
#include "cpu/attention.h"

#include <algorithm>
#include <tuple>

#include "ops/tensor.h"

namespace dien_ops::ops {
namespace {

using cpu::BilinearAttentionBackward;
using cpu::BilinearAttentionForward;
using cpu::BilinearAttentionProblem;

// The tensors of a call, checked and contiguous. Owns what a BilinearAttentionProblem borrows.
struct Arguments {
    int64_t B, C, T, H, A;
    ScalarType dtype;
    Tensor states, target, weight;
    std::vector<int64_t> lengths;
};

Arguments read_arguments(const Tensor& states, const Tensor& target, const Tensor& weight, const OptionalTensor& lengths) {
    Arguments a;
    check(states.dim() == 3, "states must be 3-D, got shape ", to_string(sizes_of(states)));
    check(target.dim() == 3, "target must be 3-D, got shape ", to_string(sizes_of(target)));
    a.B = states.size(0), a.T = states.size(1), a.H = states.size(2);
    a.C = target.size(1), a.A = target.size(2);
    a.dtype = states.scalar_type();
    a.states = checked(states, "states", sizes_of(states), a.dtype);
    a.target = checked(target, "target", {a.B, a.C, a.A}, a.dtype);
    a.weight = checked(weight, "weight", {a.H, a.A}, a.dtype);
    a.lengths = read_lengths(lengths, a.B, a.T);
    return a;
}

template <typename T>
BilinearAttentionProblem<T> problem(const Arguments& a) {
    // Every block has a copy of the weight's gradient: many enough to share out to threads, but not too many to sum up.
    constexpr int64_t kFewestSequences = 16, kMostBlocks = 64;
    BilinearAttentionProblem<T> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.hidden_size = a.H, p.target_size = a.A;
    p.sequences_per_block = a.C >= kFewestSequences ? 1 : kFewestSequences / std::max<int64_t>(a.C, 1);
    p.sequences_per_block = std::max(p.sequences_per_block, divide_up(a.B, kMostBlocks));
    p.lengths = a.lengths.data();
    p.states = pointer<T>(a.states);
    p.target = pointer<T>(a.target);
    p.weight = pointer<T>(a.weight);
    return p;
}

std::tuple<Tensor, Tensor> bilinear_attention(const Tensor& states, const Tensor& target, const Tensor& weight,
                                              const OptionalTensor& lengths, [[maybe_unused]] bool allow_tf32) {
    const Arguments a = read_arguments(states, target, weight, lengths);
    const Tensor scores = empty({a.B, a.C, a.T}, a.dtype), projected = empty({a.B, a.C, a.H}, a.dtype);
    with_floating_type(a.dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        BilinearAttentionForward<T> p{problem<T>(a)};
        p.scores = mutable_pointer<T>(scores);
        p.projected = mutable_pointer<T>(projected);
        cpu::with_capability([&](auto target) {
            const Tensor packed = empty({cpu::bilinear_attention_packed_size<target(), T>(a.H, a.A)}, a.dtype);
            p.packed = mutable_pointer<T>(packed);
            cpu::bilinear_attention_pack<target()>(p);
            parallel_tasks(p.blocks(), [&](int64_t i) { cpu::bilinear_attention_forward<target()>(p, i, i + 1); });
        });
    });
    return {scores, projected};
}

std::tuple<Tensor, Tensor, Tensor> bilinear_attention_backward(const Tensor& grad_scores, const Tensor& states,
                                                               const Tensor& target, const Tensor& weight,
                                                               const Tensor& projected, const Tensor& scores,
                                                               const OptionalTensor& lengths,
                                                               [[maybe_unused]] bool allow_tf32) {
    const Arguments a = read_arguments(states, target, weight, lengths);
    const Tensor dense_grad_scores = checked(grad_scores, "grad_scores", {a.B, a.C, a.T}, a.dtype);
    const Tensor dense_projected = checked(projected, "projected", {a.B, a.C, a.H}, a.dtype);
    const Tensor dense_scores = checked(scores, "scores", {a.B, a.C, a.T}, a.dtype);
    const Tensor grad_states = empty(sizes_of(states), a.dtype), grad_target = empty(sizes_of(target), a.dtype);
    const Tensor grad_weight = zeros(sizes_of(weight), a.dtype), grad_projected = empty({a.B, a.C, a.H}, a.dtype);
    with_floating_type(a.dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        BilinearAttentionBackward<T> p{problem<T>(a)};
        const Tensor partial_weights = zeros({p.blocks(), a.H, a.A}, a.dtype);
        p.projected = pointer<T>(dense_projected);
        p.scores = pointer<T>(dense_scores);
        p.grad_scores = pointer<T>(dense_grad_scores);
        p.grad_projected = mutable_pointer<T>(grad_projected);
        p.partial_weights = mutable_pointer<T>(partial_weights);
        p.grad_states = mutable_pointer<T>(grad_states);
        p.grad_target = mutable_pointer<T>(grad_target);
        p.grad_weight = mutable_pointer<T>(grad_weight);
        cpu::with_capability([&](auto target) {
            const Tensor packed = empty({cpu::bilinear_attention_packed_size<target(), T>(a.H, a.A)}, a.dtype);
            p.packed = mutable_pointer<T>(packed);
            cpu::bilinear_attention_backward_pack<target()>(p);
            parallel_tasks(p.blocks(), [&](int64_t i) { cpu::bilinear_attention_backward<target()>(p, i, i + 1); });
            cpu::bilinear_attention_reduce<target()>(p);
        });
    });
    return {grad_states, grad_target, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("bilinear_attention", TORCH_BOX(&bilinear_attention));
    m.impl("bilinear_attention_backward", TORCH_BOX(&bilinear_attention_backward));
}

}  // namespace dien_ops::ops
