// SPDX-License-Identifier: Apache-2.0
// The arguments of the auxiliary loss, checked alike for every back end.
#pragma once

#include <algorithm>
#include <string>

#include "ops/tensor.h"

namespace dien_ops::ops {

inline int64_t pairs_of(int64_t steps) { return std::max<int64_t>(steps - 1, 0); }

// What the sum over all valid pairs is divided by, where that follows from sizes alone; 0: the number of these pairs.
inline double denominator_of(const std::string& reduction, int64_t batch, int64_t steps) {
    if (reduction == "paper") return static_cast<double>(std::max<int64_t>(batch, 1));
    if (reduction == "authors") return static_cast<double>(std::max<int64_t>(batch * pairs_of(steps), 1));
    check(reduction == "mean", "reduction must be one of paper, mean, authors, got ", reduction);
    return 0;
}

// States and items of the inner products, checked and contiguous.
struct AuxiliaryInputs {
    int64_t batch, steps, width;
    ScalarType dtype, compute_dtype;
    Tensor states, positives, negatives;  // [B, T, H]

    AuxiliaryInputs(const Tensor& states_, const Tensor& positives_, const Tensor& negatives_) {
        check(states_.dim() == 3, "states must be 3-D, got ", states_.dim(), "-D");
        const std::vector<int64_t> sizes = sizes_of(states_);
        batch = sizes[0], steps = sizes[1], width = sizes[2];
        dtype = states_.scalar_type(), compute_dtype = ops::compute_dtype(dtype);
        states = checked(states_, "states", sizes, dtype, states_.device());
        positives = checked(positives_, "positives", sizes, dtype, states_.device());
        negatives = checked(negatives_, "negatives", sizes, dtype, states_.device());
    }
    std::vector<int64_t> sizes() const { return {batch, steps, width}; }
};

// Any scorer's logits, checked and contiguous: [B, 2, P] of the clicked and the sampled items.
struct AuxiliaryLogits {
    int64_t batch, pairs;
    ScalarType dtype;
    Tensor logits;

    AuxiliaryLogits(const Tensor& logits_, int64_t steps) {
        check(logits_.dim() == 3, "logits must be 3-D, got ", logits_.dim(), "-D");
        batch = logits_.size(0), pairs = pairs_of(steps), dtype = logits_.scalar_type();
        logits = checked(logits_, "logits", sizes(), dtype, logits_.device());
    }
    std::vector<int64_t> sizes() const { return {batch, 2, pairs}; }
};

}  // namespace dien_ops::ops
