// SPDX-License-Identifier: Apache-2.0
// log(1 + e^x), of which a loss of logits is made: one definition for every back end. V is a scalar or a vector of lanes of T.
//
//   softplus(x) = max(x, 0) + log(1 + u)      u = e^-|x|
#pragma once

#include "common/macros.h"

namespace dien_ops {

// log(1 + u) for 0 <= u <= 1, to full relative precision: 2 artanh(s) with s = u / (2 + u) <= 1/3, whose series
// s + s^3/3 + s^5/5 + ... needs terms up to s^(2 kTerms - 1).
template <typename T, typename V>
DIEN_OPS_HOST_DEVICE V log1p_of_fraction(V u) {
    constexpr int kTerms = sizeof(T) == sizeof(float) ? 8 : 17;  // the rest is below (1/9)^kTerms: 2e-8, 6e-17
    const V s = u / (V(T(2)) + u);
    const V square = s * s;
    V series(T(1) / T(2 * kTerms - 1));
    for (int k = kTerms - 1; k >= 1; --k) series = V(T(1) / T(2 * k - 1)) + series * square;
    return (s + s) * series;
}

}  // namespace dien_ops
