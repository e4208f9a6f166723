// SPDX-License-Identifier: Apache-2.0
// StepNumbers as kernels read them.
#pragma once

#include "cuda/lengths.h"
#include "cuda/primitives.cuh"

namespace dien_ops::cuda {

struct DeviceSteps {
    gmem<const int64_t> lengths, first, places, total;
    int64_t batch, steps;

    DeviceSteps(const StepNumbers& n, int64_t batch, int64_t steps)
        : lengths(n.lengths, batch, "lengths"),
          first(n.first, batch, "first"),
          places(n.place, batch * steps, "places"),
          total(n.total, 1, "total"),
          batch(batch),
          steps(steps) {}

    DIEN_OPS_DEVICE int64_t length(int64_t b) const { return lengths ? lengths.ld(b) : steps; }
    DIEN_OPS_DEVICE int64_t first_step(int64_t b) const { return first ? first.ld(b) : b * steps; }
    DIEN_OPS_DEVICE int64_t total_steps() const { return total ? total.ld(0) : batch * steps; }
    // b * T + t of a step.
    DIEN_OPS_DEVICE int64_t place(int64_t step) const { return places ? places.ld(step) : step; }
};

}  // namespace dien_ops::cuda
