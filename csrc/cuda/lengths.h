// SPDX-License-Identifier: Apache-2.0
// Lengths on CUDA, and the steps that are valid by them. Everything queues work on a stream and returns.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace dien_ops::cuda {

// The valid steps of a batch, numbered without gaps: step t of sequence b has the number first[b] + t, in 0..E-1, where E is
// the sum of lengths.
struct StepNumbers {
    const int64_t* lengths;  // [B], each in 0..T
    const int64_t* first;    // [B]
    const int64_t* place;    // [B * T], of the first E: b * T + t
    const int64_t* total;    // [1], E
    // All null: every length is T, first[b] is b * T.
};

// lengths [B], int32 or int64, each in 0..steps, to checked [B]. Throws nothing: a length outside of that is a device-side
// assertion that names it.
void check_lengths(Stream stream, const void* lengths, bool int32, int64_t batch, int64_t steps, int64_t* checked);

// Writes the other members of a StepNumbers from checked lengths.
void number_steps(Stream stream, const int64_t* lengths, int64_t batch, int64_t steps, int64_t* first, int64_t* place,
                  int64_t* total);

}  // namespace dien_ops::cuda
