// SPDX-License-Identifier: Apache-2.0
// Sorting on CUDA. Queues work on a stream and returns.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace dien_ops::cuda {

// Bytes of memory of the device that sort_words needs.
int64_t sort_workspace(int64_t n, int begin_bit, int end_bit);

// Sorts words [n] by the number in their bits begin_bit .. end_bit - 1; words of the same number keep their order. The result
// is in words or in other [n], whichever is returned; what the other one holds then is not said. workspace: [bytes], as
// sort_workspace says. Throws std::runtime_error where the launch fails.
uint64_t* sort_words(Stream stream, uint64_t* words, uint64_t* other, int64_t n, int begin_bit, int end_bit, void* workspace,
                     int64_t bytes);

}  // namespace dien_ops::cuda
