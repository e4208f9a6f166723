// SPDX-License-Identifier: Apache-2.0
// Bringing memory into the cache where the processor cannot foresee that it will be needed: rows that lie anywhere, or many
// streams at once. Everything here is inlined always, and so must be what only calls it, lambdas too: GCC takes a function that
// does nothing but prefetch for one without effect, and drops the call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dien_ops::cpu {
namespace {

// Asks for all cache lines of n elements.
template <typename S>
[[gnu::always_inline]] inline void prefetch(const S* p, int64_t n) {
    constexpr uintptr_t kLine = 64;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + n * sizeof(S);
    for (uintptr_t line = begin / kLine * kLine; line < end; line += kLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(line));
    }
}

// For a loop over begin .. end - 1 each of whose turns reads addresses of its own in a large table: calls fetch(ahead), which
// prefetches those of a later turn, for many turns at once every so many turns. A prefetch from a page that the processor has
// no translation of is not over before the page table was walked, and holds up what comes after it: amid other work such walks
// take place one by one, in a row many at the same time.
template <typename F>
[[gnu::always_inline]] inline void prefetch_ahead(int64_t i, int64_t begin, int64_t end, F&& fetch) {
    constexpr int64_t kAtOnce = 128;
    if ((i - begin) % kAtOnce != 0) return;
    const int64_t last = std::min(i + 2 * kAtOnce, end);
    for (int64_t ahead = i == begin ? i : i + kAtOnce; ahead < last; ++ahead) fetch(ahead);
}

}  // namespace
}  // namespace dien_ops::cpu
