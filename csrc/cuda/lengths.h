// SPDX-License-Identifier: Apache-2.0
// Lengths on CUDA. Queues work on a stream and returns.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace dien_ops::cuda {

// lengths [B], int32 or int64, each in 0..steps, to checked [B]. Throws nothing: a length outside of that is a device-side
// assertion that names it.
void check_lengths(Stream stream, const void* lengths, bool int32, int64_t batch, int64_t steps, int64_t* checked);

}  // namespace dien_ops::cuda
