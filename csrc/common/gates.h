// SPDX-License-Identifier: Apache-2.0
// The attentional gates of DIEN eq. 9-12 and their derivatives: one definition for every back end.
//
// Every cell of the recurrent column ends in h' = n + k (h - n), where n is the candidate and k the weight of the old state.
// The cells differ in k alone. z is torch.nn.GRU's gate (z keeps; the paper's update gate is u = 1 - z), a the attention
// score of the step.
//   none, input   k = z                 the GRU, and AIGRU, whose score scales the input instead
//   replace       k = 1 - a             AGRU, eq. 10
//   paper         k = 1 - a (1 - z)     AUGRU, eq. 11-12
//   authors       k = (1 - a) z         AUGRU as the authors released it; oneDNN's and OpenVINO's form
#pragma once

#include "common/macros.h"

namespace dien_ops {

enum class Gate { none, input, replace, paper, authors };

template <Gate kGate, typename V>
DIEN_OPS_HOST_DEVICE V keep_weight([[maybe_unused]] V z, [[maybe_unused]] V a) {
    if constexpr (kGate == Gate::replace) return V(1) - a;
    if constexpr (kGate == Gate::paper) return V(1) - a * (V(1) - z);
    if constexpr (kGate == Gate::authors) return (V(1) - a) * z;
    return z;
}

// The gradients of z and a where dk is that of k = keep_weight(z, a).
template <typename V>
struct KeepGradient {
    V dz, da;
};

template <Gate kGate, typename V>
DIEN_OPS_HOST_DEVICE KeepGradient<V> keep_gradient(V dk, [[maybe_unused]] V z, [[maybe_unused]] V a) {
    if constexpr (kGate == Gate::replace) return {V(0), -dk};
    if constexpr (kGate == Gate::paper) return {a * dk, (z - V(1)) * dk};
    if constexpr (kGate == Gate::authors) return {(V(1) - a) * dk, -(z * dk)};
    return {dk, V(0)};
}

}  // namespace dien_ops
