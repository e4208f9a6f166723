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

constexpr int kScanThreads = 1024;

// first [B], the sum of the lengths before it, and their total: one block, a run of sequences for each thread.
DIEN_OPS_KERNEL(kScanThreads)
void scan_lengths(gmem<const int64_t> lengths, int64_t batch, gmem<int64_t> first, gmem<int64_t> total) {
    Arena arena;
    const auto sums = arena.take<int64_t>(2 * kScanThreads, "sums of runs");
    const int64_t begin = batch * thread_index() / kScanThreads, end = batch * (thread_index() + 1) / kScanThreads;
    int64_t sum = 0;
    for (int64_t b = begin; b < end; ++b) sum += lengths.ld(b);
    int64_t before = sum;
    int from = 0;
    sums.st(thread_index(), sum);
    sync_block();
    for (int distance = 1; distance < kScanThreads; distance *= 2) {
        if (thread_index() >= distance) before += sums.ld(from + thread_index() - distance);
        from = kScanThreads - from;
        sums.st(from + thread_index(), before);
        sync_block();
    }
    if (thread_index() == kScanThreads - 1) total.st(0, before);
    before -= sum;
    for (int64_t b = begin; b < end; ++b) {
        first.st(b, before);
        before += lengths.ld(b);
    }
}

DIEN_OPS_KERNEL(kElementThreads)
void write_places(gmem<const int64_t> lengths, gmem<const int64_t> first, int64_t steps, gmem<int64_t> place) {
    const int64_t b = block_index(), length = lengths.ld(b), begin = first.ld(b);
    for (int64_t t = thread_index(); t < length; t += kElementThreads) place.st(begin + t, b * steps + t);
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

void number_steps(Stream stream, const int64_t* lengths, int64_t batch, int64_t steps, int64_t* first, int64_t* place,
                  int64_t* total) {
    const gmem<const int64_t> from = {lengths, batch, "lengths"};
    launch("scan_lengths", scan_lengths, Grid{1, 1, 1, kScanThreads, arena_bytes<int64_t>(2 * kScanThreads)}, stream, from,
           batch, gmem<int64_t>{first, batch, "first"}, gmem<int64_t>{total, 1, "total"});
    launch("number_steps", write_places, Grid{batch, 1, 1, kElementThreads}, stream, from,
           gmem<const int64_t>{first, batch, "first"}, steps, gmem<int64_t>{place, batch * steps, "place"});
}

}  // namespace dien_ops::cuda
