// SPDX-License-Identifier: Apache-2.0
// The arguments of softmax attention over states, checked alike for every back end.
#pragma once

#include "ops/tensor.h"

namespace dien_ops::ops {

// A call's tensors, checked. All are contiguous but states, which may lie [T, B, H] in memory.
struct AttentionArguments {
    int64_t B, C, T, H, A;
    ScalarType dtype, compute_dtype;
    bool time_first;                // of states and their gradient
    Tensor states, target, weight;  // weight: of compute_dtype

    // From sequence to sequence and from step to step, in states.
    int64_t state_stride_b() const { return time_first ? H : T * H; }
    int64_t state_stride_t() const { return time_first ? B * H : H; }

    // A tensor of states' shape, laid out as they are; empty(sizes) allocates.
    template <typename Empty>
    Tensor like_states(const Empty& empty) const {
        return time_first ? torch::stable::transpose(empty({T, B, H}), 0, 1) : empty({B, T, H});
    }
};

inline AttentionArguments read_attention_arguments(const Tensor& states, const Tensor& target, const Tensor& weight) {
    AttentionArguments a;
    check(states.dim() == 3, "states must be 3-D, got shape ", to_string(sizes_of(states)));
    check(target.dim() == 3, "target must be 3-D, got shape ", to_string(sizes_of(target)));
    a.B = states.size(0), a.T = states.size(1), a.H = states.size(2);
    a.C = target.size(1), a.A = target.size(2);
    a.dtype = states.scalar_type(), a.compute_dtype = compute_dtype(a.dtype);
    a.time_first = !states.is_contiguous() && torch::stable::transpose(states, 0, 1).is_contiguous();
    a.states = a.time_first ? states : checked(states, "states", sizes_of(states), a.dtype, states.device());
    a.target = checked(target, "target", {a.B, a.C, a.A}, a.dtype, states.device());
    a.weight = checked(weight, "weight", {a.H, a.A}, a.compute_dtype, states.device());
    return a;
}

// The forward's results that the backward needs, and the gradient of the scores.
struct AttentionResults {
    Tensor projected, scores, grad_scores;

    AttentionResults(const AttentionArguments& a, const Tensor& projected_, const Tensor& scores_, const Tensor& grad_scores_)
        : projected(checked(projected_, "projected", {a.B, a.C, a.H}, a.compute_dtype, a.states.device())),
          scores(checked(scores_, "scores", {a.B, a.C, a.T}, a.dtype, a.states.device())),
          grad_scores(checked(grad_scores_, "grad_scores", {a.B, a.C, a.T}, a.dtype, a.states.device())) {}
};

}  // namespace dien_ops::ops
