// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) and its derivatives, for one value s of one channel: one definition for every operator and back end.
//
//   x = (s - E) / (sqrt(Var + variance_eps) + eps)      p = sigmoid(weight x + bias)      f = p s + (1 - p) alpha s
//
// weight and bias are the optional affine parameters (1 and 0 where there are none). V is a scalar or a vector of lanes. The
// gate p comes from the back end's own sigmoid.
#pragma once

#include <math.h>

#include "common/macros.h"

namespace dien_ops {

// What keeps the deviation from 0: the paper adds eps to the root, BatchNorm adds variance_eps below it.
struct DiceEps {
    double eps, variance_eps;

    // sqrt(Var + variance_eps)
    DIEN_OPS_HOST_DEVICE double root(double var) const { return sqrt(var + variance_eps); }
    // What s - E is divided by.
    DIEN_OPS_HOST_DEVICE double divisor(double var) const { return root(var) + eps; }
    // The pull of dice_gradient, from scale and the mean of g_logit * centered. A column without deviation has no derivative
    // there, as in reference.py: its pull is 0.
    DIEN_OPS_HOST_DEVICE double pull(double scale, double var, double mean) const {
        return root(var) > 0 ? scale / divisor(var) / root(var) * mean : 0;
    }
};

// Joins mean and sum of squared deviations of `count` values with those of `other_count` more (Chan, Golub, LeVeque 1979); not
// both counts are 0.
struct DiceJoin {
    double share, weight;

    DIEN_OPS_HOST_DEVICE DiceJoin(double count, double other_count)
        : share(other_count / (count + other_count)), weight(count * share) {}
    DIEN_OPS_HOST_DEVICE void operator()(double& mean, double& deviation, double other_mean, double other_deviation) const {
        const double delta = other_mean - mean;
        mean += delta * share;
        deviation += other_deviation + delta * delta * weight;
    }
};

// A column's values: how many, their mean and the sum of their squared deviations; these numbers one after another.
struct DiceMoments {
    static constexpr int kNumbers = 3;
    double v[kNumbers];

    DIEN_OPS_HOST_DEVICE void join(const DiceMoments& other) {
        const double count = v[0] + other.v[0];
        if (count == 0) return;
        DiceJoin(v[0], other.v[0])(v[1], v[2], other.v[1], other.v[2]);
        v[0] = count;
    }
    DIEN_OPS_HOST_DEVICE double mean() const { return v[1]; }
    // The biased one; 0 where there are no values.
    DIEN_OPS_HOST_DEVICE double var() const { return v[0] > 0 ? v[2] / v[0] : 0; }
};

// f(s). Also the factor of df/ds that does not go through the gate, where s is 1.
template <typename V>
DIEN_OPS_HOST_DEVICE V dice_value(V s, V p, V alpha) {
    return s * (p + alpha * (V(1) - p));
}

template <typename V>
DIEN_OPS_HOST_DEVICE V dice_slope_of_alpha(V s, V p) {
    return s * (V(1) - p);
}

// The gradient of weight x + bias, from g, that of f. Ends in a subtraction, not in a product: a multiply-add then rounds it
// the same wherever it is used, so that subtracting a mean of equal values leaves 0, which 1 / eps multiplies where Var is 0.
template <typename V>
DIEN_OPS_HOST_DEVICE V dice_logit_gradient(V g, V s, V p, V alpha) {
    const V q = g * s * (V(1) - alpha) * p;
    return q - q * p;
}

// The gradient of s, once the sums over the batch are known. g is the gradient of f, g_logit that of weight x + bias,
// scale = weight / divisor(Var), centered = s - E. Batch statistics depend on every s: E takes away mean(g_logit) and the
// deviation takes away pull * centered, pull = scale / divisor(Var) / root(Var) * mean(g_logit * centered); both are 0 with
// fixed statistics.
template <typename V>
DIEN_OPS_HOST_DEVICE V dice_gradient(V g, V g_logit, V p, V alpha, V scale, V centered, V mean_g_logit, V pull) {
    return dice_value(g, p, alpha) + scale * (g_logit - mean_g_logit) - pull * centered;
}

}  // namespace dien_ops
