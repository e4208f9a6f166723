// SPDX-License-Identifier: Apache-2.0
// The sparse updates of embedding tables (DIN eq. 7) for one number of one row: one definition for both back ends. g is a row's
// summed gradient, w the weight. With the row's decay,
//
//   g += coupled w        w <- kept w - step(g)
//
// where the rule says what the step is and what it does to its state.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/macros.h"

namespace dien_ops {

// mini_batch_aware: (l2 / n_j) w_j is part of the gradient. decoupled: w_j loses lr (l2 / n_j) w_j beside the step. lazy: w_j
// loses what it would have lost as a row of a dense table in all steps since it was updated last.
enum class Decay { mini_batch_aware, decoupled, lazy };

template <typename T>
struct RowDecay {
    T coupled, kept;
};

struct DecayRule {
    Decay mode;
    double lr, l2;

    // n: n_j. log_decay: the sum of log(1 - lr l2) over all steps up to this one, decayed: that up to the row's last update.
    template <typename T>
    DIEN_OPS_HOST_DEVICE RowDecay<T> of_row(double n, double log_decay, double decayed) const {
        if (mode == Decay::mini_batch_aware) return {T(l2 / n), T(1)};
        if (mode == Decay::decoupled) return {T(0), T(1 - lr * l2 / n)};
        return {T(0), T(exp(log_decay - decayed))};
    }
};

// The rules. V is T or a vector of it.

template <typename T>
struct SgdRule {
    T lr, momentum;

    template <typename V>
    DIEN_OPS_HOST_DEVICE V step(V g) const {
        return V(lr) * g;
    }
    template <typename V>
    DIEN_OPS_HOST_DEVICE V step(V g, V& buffer) const {
        buffer = V(momentum) * buffer + g;
        return V(lr) * buffer;
    }
};

template <typename T>
struct AdagradRule {
    T lr, eps;

    // state_sum: of this number.
    template <typename V>
    DIEN_OPS_HOST_DEVICE V step(V g, V& state_sum) const {
        state_sum += g * g;
        return V(lr) * g / (V(sqrt(state_sum)) + V(eps));
    }
};

template <typename T>
struct RowwiseAdagradRule {
    T lr, eps;

    // What a row's g is multiplied by. state_sum: of this row.
    DIEN_OPS_HOST_DEVICE T step_size(T mean_of_squares, T& state_sum) const {
        state_sum += mean_of_squares;
        return lr / (T(sqrt(state_sum)) + eps);
    }
};

struct AdamRule {
    double lr, beta1, beta2, eps;
    double log_beta1, log_beta2;  // what beta^t is computed from
};

// Adam for a row's update number t.
template <typename T>
struct AdamRow {
    T beta1, beta2, rest1, rest2, step_size, root_scale, eps;

    // The corrections are 1 - beta^t.
    DIEN_OPS_HOST_DEVICE AdamRow(const AdamRule& rule, double correction1, double correction2)
        : beta1(rule.beta1),
          beta2(rule.beta2),
          rest1(1 - rule.beta1),
          rest2(1 - rule.beta2),
          step_size(rule.lr / correction1),
          root_scale(1 / sqrt(correction2)),
          eps(rule.eps) {}

    template <typename V>
    DIEN_OPS_HOST_DEVICE V step(V g, V& exp_avg, V& exp_avg_sq) const {
        exp_avg = V(beta1) * exp_avg + V(rest1) * g;
        exp_avg_sq = V(beta2) * exp_avg_sq + V(rest2) * g * g;
        return V(step_size) * exp_avg / (V(sqrt(exp_avg_sq)) * V(root_scale) + V(eps));
    }
};

}  // namespace dien_ops
