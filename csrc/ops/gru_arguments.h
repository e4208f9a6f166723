// SPDX-License-Identifier: Apache-2.0
// The arguments of the recurrent operators, checked alike for every back end.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/gates.h"
#include "ops/tensor.h"

namespace dien_ops::ops {

inline Gate parse_gate(const std::string& name) {
    if (name == "none") return Gate::none;
    if (name == "input") return Gate::input;
    if (name == "replace") return Gate::replace;
    if (name == "paper") return Gate::paper;
    if (name == "authors") return Gate::authors;
    throw std::runtime_error("gate must be one of none, input, replace, paper, authors; got " + name);
}

// t with time moved from its last axis to its first, or from its first to its last.
inline Tensor with_time_moved(const Tensor& t, bool to_first) {
    if (t.dim() == 2) return torch::stable::transpose(t, 0, 1);
    const int64_t near = to_first ? 1 : 0, far = to_first ? 0 : 1;
    return torch::stable::transpose(torch::stable::transpose(t, near, near + 1), far, far + 1);
}

// The tensors of a call, checked, and the layout they are in: contiguous, but for attention, which with its gradient may lie in
// memory as it would with the other batch_first. So scores come from the attention, and their gradient goes back, without a
// copy. Owns what a GruProblem borrows.
struct GruArguments {
    int64_t B, C, T, I, H;
    bool several;  // attention has a target axis
    Gate gate;
    bool reset_after, reverse, batch_first;
    bool attention_batch_first;  // in memory
    ScalarType dtype;
    Tensor input, weight_ih, weight_hh;
    OptionalTensor attention, hx, bias_ih, bias_hh;

    std::vector<int64_t> with_time(const std::vector<int64_t>& batch_axes, const std::vector<int64_t>& last,
                                   bool time_last) const {
        std::vector<int64_t> sizes = batch_axes;
        sizes.insert(time_last ? sizes.end() : sizes.begin(), T);
        sizes.insert(sizes.end(), last.begin(), last.end());
        return sizes;
    }
    std::vector<int64_t> rows() const { return several ? std::vector{B, C} : std::vector{B}; }
    std::vector<int64_t> state_sizes() const {
        std::vector<int64_t> sizes = rows();
        sizes.push_back(H);
        return sizes;
    }
    std::vector<int64_t> output_sizes() const { return with_time(rows(), {H}, batch_first); }
    std::vector<int64_t> attention_sizes() const { return with_time(rows(), {}, batch_first); }
    // A tensor of attention's shape, laid out as it is; empty(sizes) allocates.
    template <typename Empty>
    Tensor like_attention(const Empty& empty) const {
        const Tensor t = empty(with_time(rows(), {}, attention_batch_first));
        return attention_batch_first == batch_first ? t : with_time_moved(t, attention_batch_first);
    }
    std::vector<int64_t> gates_sizes() const { return {B, C, T, (reset_after ? 4 : 3) * H}; }
    // From one row, target or step to the next in a tensor [.., width] of this layout, with a target axis or without.
    struct Strides {
        int64_t b, c, t;
    };
    Strides strides(int64_t targets, int64_t width) const { return strides(targets, width, batch_first); }
    Strides attention_strides() const { return strides(C, 1, attention_batch_first); }
    Strides strides(int64_t targets, int64_t width, bool time_last) const {
        if (time_last) return {targets * T * width, T * width, width};  // [B, C, T, width]
        return {targets * width, width, B * targets * width};           // [T, B, C, width]
    }
    ScalarType compute_dtype() const { return ops::compute_dtype(dtype); }
};

inline GruArguments read_gru_arguments(const Tensor& input, const OptionalTensor& attention, const OptionalTensor& hx,
                                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, const std::string& gate, bool reset_after,
                                       bool batch_first, bool reverse) {
    GruArguments a;
    a.gate = parse_gate(gate);
    a.reset_after = reset_after;
    a.reverse = reverse;
    a.batch_first = batch_first;
    a.dtype = input.scalar_type();
    check(input.dim() == 3, "input must be 3-D, got shape ", to_string(sizes_of(input)));
    check(weight_hh.dim() == 2, "weight_hh must be 2-D, got shape ", to_string(sizes_of(weight_hh)));
    check(attention.has_value() == (a.gate != Gate::none), "attention must be given for every gate but none");
    check(!reverse || a.gate == Gate::none, "reverse must be false for every gate but none");
    a.B = input.size(batch_first ? 0 : 1);
    a.T = input.size(batch_first ? 1 : 0);
    a.I = input.size(2);
    a.H = weight_hh.size(1);
    a.several = attention.has_value() && attention->dim() == 3;
    a.C = a.several ? attention->size(batch_first ? 1 : 2) : 1;
    const Device device = input.device();
    a.input = checked(input, "input", sizes_of(input), a.dtype, device);
    a.attention = attention;
    a.attention_batch_first = batch_first;
    if (attention.has_value()) {
        check_tensor(*attention, "attention", a.attention_sizes(), a.dtype, device);
        if (!attention->is_contiguous() && with_time_moved(*attention, batch_first).is_contiguous()) {
            a.attention_batch_first = !batch_first;
        } else {
            a.attention = checked(attention, "attention", a.attention_sizes(), a.dtype, device);
        }
    }
    a.hx = checked(hx, "hx", a.state_sizes(), a.dtype, device);
    a.weight_ih = checked(weight_ih, "weight_ih", {3 * a.H, a.I}, a.dtype, device);
    a.weight_hh = checked(weight_hh, "weight_hh", {3 * a.H, a.H}, a.dtype, device);
    a.bias_ih = checked(bias_ih, "bias_ih", {3 * a.H}, a.dtype, device);
    a.bias_hh = checked(bias_hh, "bias_hh", {3 * a.H}, a.dtype, device);
    return a;
}

// The backward's results: all of them are written, and those of arguments that were left out are not handed on.
struct GruGradients {
    Tensor input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh;

    // empty(sizes) allocates.
    template <typename Empty>
    GruGradients(const GruArguments& a, const Empty& empty)
        : input(empty(sizes_of(a.input))),
          attention(a.attention.has_value() ? a.like_attention(empty) : empty({0})),
          hx(empty(a.state_sizes())),
          weight_ih(empty({3 * a.H, a.I})),
          weight_hh(empty({3 * a.H, a.H})),
          bias_ih(empty({3 * a.H})),
          bias_hh(empty({3 * a.H})),
          absent_(empty({0})) {}

    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> of(const GruArguments& a) const {
        return {input,
                attention,
                a.hx.has_value() ? hx : absent_,
                weight_ih,
                weight_hh,
                a.bias_ih.has_value() ? bias_ih : absent_,
                a.bias_hh.has_value() ? bias_hh : absent_};
    }

  private:
    Tensor absent_;
};

}  // namespace dien_ops::ops
