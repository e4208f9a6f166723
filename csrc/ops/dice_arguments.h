// SPDX-License-Identifier: Apache-2.0
// The arguments of the Dice operators, checked alike for every back end.
#pragma once

#include <tuple>
#include <vector>

#include "common/dice.h"
#include "ops/tensor.h"

namespace dien_ops::ops {

// The tensors of a call but its lengths, checked and contiguous. Owns what the kernels borrow. Parameters and statistics are of
// the dtype that the input's is computed in.
struct DiceArguments {
    int64_t B, T, C;  // an [N, C] input is one sequence of N steps
    ScalarType dtype, compute_dtype;
    DiceEps eps;
    Device device;
    Tensor input, alpha;
    OptionalTensor weight, bias;

    std::vector<int64_t> sizes() const { return sizes_of(input); }
    // A parameter, or statistics.
    template <typename T>  // Tensor or OptionalTensor
    T columns(const T& t, const char* argument) const {
        return checked(t, argument, {C}, compute_dtype, device);
    }
};

inline DiceArguments read_dice_arguments(const Tensor& input, const Tensor& alpha, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& lengths, double eps,
                                         double variance_eps) {
    check(input.dim() == 2 || input.dim() == 3, "input must be 2-D or 3-D, got shape ", to_string(sizes_of(input)));
    check(input.dim() == 3 || !lengths.has_value(), "lengths need a 3-D input, got shape ", to_string(sizes_of(input)));
    DiceArguments a{.device = input.device()};
    a.B = input.dim() == 3 ? input.size(0) : 1;
    a.T = input.size(input.dim() - 2);
    a.C = input.size(input.dim() - 1);
    a.dtype = input.scalar_type();
    a.compute_dtype = ops::compute_dtype(a.dtype);
    a.eps = {eps, variance_eps};
    a.input = checked(input, "input", sizes_of(input), a.dtype, a.device);
    a.alpha = a.columns(alpha, "alpha");
    a.weight = a.columns(weight, "weight");
    a.bias = a.columns(bias, "bias");
    return a;
}

// The backward's results: all of them are written, and those of parameters that were left out are not handed on.
struct DiceGradients {
    Tensor input, alpha, weight, bias;

    // empty(sizes, dtype) allocates.
    template <typename Empty>
    DiceGradients(const DiceArguments& a, const Empty& empty)
        : input(empty(a.sizes(), a.dtype)),
          alpha(empty({a.C}, a.compute_dtype)),
          weight(empty({a.C}, a.compute_dtype)),
          bias(empty({a.C}, a.compute_dtype)),
          absent_(empty({0}, a.compute_dtype)) {}

    std::tuple<Tensor, Tensor, Tensor, Tensor> of(const DiceArguments& a) const {
        return {input, alpha, a.weight.has_value() ? weight : absent_, a.bias.has_value() ? bias : absent_};
    }

  private:
    Tensor absent_;
};

}  // namespace dien_ops::ops
