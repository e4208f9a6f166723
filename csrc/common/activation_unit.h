// SPDX-License-Identifier: Apache-2.0
// What every back end's local activation unit (DIN eq. 3) agrees on.
#pragma once

#include <cstdint>

namespace dien_ops {

enum class Activation { sigmoid, prelu, dice };

// A row of a layer's hidden values, where they are kept for the backward, has `outputs` rounded up to so many bytes.
constexpr int64_t kUnitAlignment = 64;

}  // namespace dien_ops
