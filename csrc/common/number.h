// SPDX-License-Identifier: Apache-2.0
// How numbers are stored, and what they are computed in. The 16-bit formats are formats of storage: every sum, product and
// state is float.
#pragma once

#include <cstdint>

namespace dien_ops {

struct BFloat16 {
    uint16_t bits;  // the upper half of a float
};

struct Half {
    uint16_t bits;  // IEEE 754 binary16
};

template <typename S>
struct ComputeType {
    using Type = float;
};

template <>
struct ComputeType<double> {
    using Type = double;
};

// float for float, BFloat16 and Half; double for double.
template <typename S>
using Compute = typename ComputeType<S>::Type;

}  // namespace dien_ops
