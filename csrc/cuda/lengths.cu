// SPDX-License-Identifier: Apache-2.0
#include "cuda/lengths.h"

#include "cuda/elements.cuh"

namespace dien_ops::cuda {
namespace {

// stack allowed: 24 bytes (the arguments of the printf that names a wrong length)
template <typename Int>
DIEN_OPS_KERNEL(kElementThreads)
void copy_checked(gmem<const Int> lengths, int64_t batch, int64_t steps, gmem<int64_t> checked) {
    const int64_t b = element_index();
    if (b >= batch) return;
    const int64_t length = lengths.ld(b);
    require(length >= 0 && length <= steps, "lengths must be in 0..%lld (T), got %lld at row %lld", steps, length, b);
    checked.st(b, length);
}

}  // namespace

void check_lengths(Stream stream, const void* lengths, bool int32, int64_t batch, int64_t steps, int64_t* checked) {
    const gmem<int64_t> to = {checked, batch, "lengths"};
    const auto run = [&](auto zero) {
        using Int = decltype(zero);
        const gmem<const Int> from = {static_cast<const Int*>(lengths), batch, "lengths"};
        launch("check_lengths", copy_checked<Int>, element_grid(batch), stream, from, batch, steps, to);
    };
    int32 ? run(int32_t{}) : run(int64_t{});
}

}  // namespace dien_ops::cuda
