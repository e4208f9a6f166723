// SPDX-License-Identifier: Apache-2.0
// The bodies of cuda/primitives.cuh for the host executor. An access that is out of range or not aligned is reported and does
// not happen; what it would have read is NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda/host/executor.h"

namespace dien_ops::cuda {
namespace host {

// Whether the thread may touch count numbers from number i on, of n numbers at data.
template <typename T>
bool may_access(Use use, Memory memory, const T* data, int64_t i, int64_t count, int64_t n, const char* name,
                const Site& site) {
    static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
    const char* verb = use == Use::read ? "read '" : "write '";
    if (data == nullptr || i < 0 || i > n - count) {
        report("out of range",
               verb + std::string(name) + "' [" + std::to_string(i) + ", " + std::to_string(i + count) + ") of " +
                   std::to_string(data == nullptr ? 0 : n) + " numbers",
               name, site);
        return false;
    }
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (reinterpret_cast<uintptr_t>(data + i) % bytes != 0) {
        report("misaligned", verb + std::string(name) + "' " + std::to_string(bytes) + " bytes at number " + std::to_string(i),
               name, site);
        return false;
    }
    if (running.check) shadow_access({use, memory, data + i, static_cast<int>(bytes), static_cast<int>(sizeof(T)), name, site});
    return true;
}

template <typename V, typename T>
V load(Memory memory, const T* data, int64_t i, int64_t n, const char* name, const Site& site) {
    static_assert(kMovesAs<V, T>);
    V value;
    if (may_access(Use::read, memory, data, i, sizeof(V) / sizeof(T), n, name, site)) {
        std::memcpy(&value, data + i, sizeof(V));
    } else {
        std::memset(&value, 0xff, sizeof(V));
    }
    return value;
}

template <typename V, typename T>
void store(Memory memory, T* data, int64_t i, const V& value, int64_t n, const char* name, const Site& site) {
    static_assert(kMovesAs<V, T>);
    if (may_access(Use::write, memory, data, i, sizeof(V) / sizeof(T), n, name, site)) {
        std::memcpy(data + i, &value, sizeof(V));
    }
}

inline bool is_part(int64_t offset, int64_t count, int64_t n, const char* name, const Site& site) {
    if (offset >= 0 && count >= 0 && offset <= n - count) return true;
    const std::string detail = "part of '" + std::string(name) + "' [" + std::to_string(offset) + ", " +
                               std::to_string(offset + count) + ") of " + std::to_string(n) + " numbers";
    if (!in_kernel()) throw std::runtime_error("out of range: " + detail + " " + file_and_line(site));
    report("out of range", detail, name, site);
    return false;
}

}  // namespace host

inline int thread_index() { return host::running.thread; }
inline int block_threads() { return host::running.threads; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline int block_warps() { return block_threads() / kWarp; }
inline int64_t block_index() { return host::running.block[0]; }
inline int64_t block_index_y() { return host::running.block[1]; }
inline int64_t block_index_z() { return host::running.block[2]; }
inline int64_t grid_blocks() { return host::running.blocks; }

template <typename T>
std::remove_const_t<T> gmem<T>::ld(int64_t i, Site site) const {
    return host::load<std::remove_const_t<T>>(host::Memory::global, ptr, i, n, name, site);
}
template <typename T>
void gmem<T>::st(int64_t i, std::remove_const_t<T> value, Site site) const {
    host::store(host::Memory::global, ptr, i, value, n, name, site);
}
template <typename T>
template <typename V>
V gmem<T>::ld_as(int64_t i, Site site) const {
    return host::load<V>(host::Memory::global, ptr, i, n, name, site);
}
template <typename T>
template <typename V>
V gmem<T>::ld_if(bool condition, int64_t i, Site site) const {
    return condition ? ld_as<V>(i, site) : V{};
}
template <typename T>
template <typename V>
void gmem<T>::st_as(int64_t i, V value, Site site) const {
    host::store(host::Memory::global, ptr, i, value, n, name, site);
}
template <typename T>
gmem<T> gmem<T>::sub(int64_t offset, int64_t count, Site site) const {
    const bool inside = host::is_part(offset, count, n, name, site);
    return gmem(ptr == nullptr || !inside ? ptr : ptr + offset, inside ? count : 0, name);
}

template <typename T>
T view<T>::ld(int i, Site site) const {
    return host::load<T>(host::Memory::shared, data_, i, n_, name_, site);
}
template <typename T>
void view<T>::st(int i, T value, Site site) const {
    host::store(host::Memory::shared, data_, i, value, n_, name_, site);
}
template <typename T>
template <typename V>
V view<T>::ld_as(int i, Site site) const {
    return host::load<V>(host::Memory::shared, data_, i, n_, name_, site);
}
template <typename T>
template <typename V>
void view<T>::st_as(int i, V value, Site site) const {
    host::store(host::Memory::shared, data_, i, value, n_, name_, site);
}
template <typename T>
view<T> view<T>::sub(int offset, int count, Site site) const {
    view part = *this;
    const bool inside = host::is_part(offset, count, n_, name_, site);
    part.data_ = data_ + (inside ? offset : 0);
    part.n_ = inside ? count : 0;
    return part;
}

template <typename V>
V keep_whole(V value) {
    return value;
}

template <typename T>
view<T> Arena::take(int n, const char* name) {
    const int64_t end = used_ + arena_bytes<T>(n);
    if (n < 0 || end > host::running.shared_bytes) {
        host::fail("shared memory: '" + std::string(name) + "' ends at byte " + std::to_string(end) +
                   ", the launch asked for " + std::to_string(host::running.shared_bytes));
    }
    view<T> piece;
    piece.data_ = reinterpret_cast<T*>(host::running.shared + used_);
    piece.n_ = n;
    piece.name_ = name;
    used_ = static_cast<int>(end);
    return piece;
}

inline void sync_block(Site site) { host::wait_for_block(site); }
inline void sync_warp(Site site) { host::wait_for_warp("sync_warp", site, nullptr, host::order_warp); }

template <typename T>
T shuffle_xor(T value, int lane_mask, Site site) {
    struct Operands {
        T value, result;
        int lane_mask;
    };
    Operands mine = {value, {}, lane_mask};
    host::wait_for_warp("shuffle_xor", site, &mine, [](void* const* lanes) {
        for (int i = 0; i < kWarp; ++i) {
            auto* lane = static_cast<Operands*>(lanes[i]);
            lane->result = static_cast<Operands*>(lanes[(i ^ lane->lane_mask) & (kWarp - 1)])->value;
        }
    });
    return mine.result;
}

template <typename T>
void copy_async16(view<T> dst, int i, std::type_identity_t<gmem<const T>> src, int64_t j, Site site) {
    using host::Memory, host::Use;
    constexpr int64_t kCount = 16 / sizeof(T);
    if (host::may_access(Use::read, Memory::global, src.ptr, j, kCount, src.n, src.name, site) &&
        host::may_access(Use::copy, Memory::shared, dst.data_, i, kCount, dst.n_, dst.name_, site)) {
        host::copy_async16({Use::copy, Memory::shared, dst.data_ + i, 16, sizeof(T), dst.name_, site}, src.ptr + j);
    }
}
inline void copy_async_commit(Site) { host::commit_copies(); }
template <int N>
void copy_async_wait(Site) {
    host::wait_for_copies(N);
}

template <typename... Numbers>
void require(bool condition, const char* format, Numbers... numbers) {
    if (condition) return;
    char message[256];
    std::snprintf(message, sizeof(message), format, static_cast<Printed<Numbers>>(numbers)...);
    host::fail(message);
}

template <typename S>
Compute<S> to_compute(S x) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        return std::bit_cast<float>(uint32_t{x.bits} << 16);
    } else if constexpr (std::is_same_v<S, Half>) {
        const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
        // The exponent is 112 too small where float has its own; scaling mends that for subnormal numbers too.
        const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u
                                                         : std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
        return std::bit_cast<float>(sign | bits);
    } else {
        return x;
    }
}
template <typename S>
S to_storage(Compute<S> x) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        const uint32_t bits = std::bit_cast<uint32_t>(x);
        const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
        return {static_cast<uint16_t>((std::isnan(x) ? bits | 0x400000 : rounded) >> 16)};
    } else if constexpr (std::is_same_v<S, Half>) {
        const float magnitude = std::abs(x);
        const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000, bits = std::bit_cast<uint32_t>(magnitude);
        uint32_t half;
        if (std::isnan(x)) {
            half = 0x7e00;
        } else if (magnitude >= 65520.0f) {  // halfway between the largest number and what would follow it
            half = 0x7c00;
        } else if (magnitude < 0x1p-14f) {  // subnormal: 0.5 has the weight of their last bit in its own
            half = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
        } else {
            half = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
        }
        return {static_cast<uint16_t>(sign | half)};
    } else {
        return x;
    }
}

inline float to_tf32(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((std::isfinite(x) ? bits + 0x1000 : bits) & ~uint32_t{0x1fff});
}

inline float exp_approx(float x) { return std::exp(x); }
inline float divide_approx(float a, float b) { return a / b; }
inline float exp_exact(float x) { return std::exp(x); }
inline double exp_exact(double x) { return std::exp(x); }
inline float tanh_exact(float x) { return std::tanh(x); }
inline double tanh_exact(double x) { return std::tanh(x); }

namespace host {

// The operands of an mma, whole, and one lane's share of them.
template <int kDepth, typename Word>
struct Mma {
    struct Fragments {
        float* d;
        const Word *a, *b;
    };
    float a[16][kDepth], b[kDepth][8];

    // What each word of a lane's fragments holds: put(matrix row, column, word) for a and for b, at the first of its numbers.
    template <typename PutA, typename PutB>
    void gather(void* const* lanes, const PutA& put_a, const PutB& put_b) {
        constexpr int kNumbers = kDepth / 8;  // in a word
        for (int i = 0; i < kWarp; ++i) {
            const auto& lane = *static_cast<const Fragments*>(lanes[i]);
            const int g = i / 4, q = i % 4;
            for (int j = 0; j < 4; ++j) put_a(g + j % 2 * 8, kNumbers * (q + j / 2 * 4), lane.a[j]);
            for (int j = 0; j < 2; ++j) put_b(kNumbers * (q + j * 4), g, lane.b[j]);
        }
    }

    void multiply(void* const* lanes) const {
        float d[16][8] = {};
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < kDepth; ++k) {
                for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
            }
        }
        for (int i = 0; i < kWarp; ++i) {
            const auto& lane = *static_cast<const Fragments*>(lanes[i]);
            for (int j = 0; j < 4; ++j) lane.d[j] += d[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
        }
    }
};

inline void check_rounded(const char* operand, const float* fragment, int n, const Site& site) {
    for (int i = 0; i < n; ++i) {
        if ((std::bit_cast<uint32_t>(fragment[i]) & 0x1fff) == 0 || !std::isfinite(fragment[i])) continue;
        report("unrounded", operand + std::to_string(fragment[i]) + " of mma_m16n8k8_tf32", operand, site);
    }
}

}  // namespace host

inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], Site site) {
    using Mma = host::Mma<8, float>;
    host::check_rounded("a = ", a, 4, site);
    host::check_rounded("b = ", b, 2, site);
    Mma::Fragments mine = {d, a, b};
    host::wait_for_warp("mma_m16n8k8_tf32", site, &mine, [](void* const* lanes) {
        Mma mma;
        mma.gather(
            lanes, [&](int row, int column, float x) { mma.a[row][column] = x; },
            [&](int row, int column, float x) { mma.b[row][column] = x; });
        mma.multiply(lanes);
    });
}

template <typename S>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
    static_assert(std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>);
    using Mma = host::Mma<16, uint32_t>;
    Mma::Fragments mine = {d, a, b};
    host::wait_for_warp("mma_m16n8k16", site, &mine, [](void* const* lanes) {
        const auto low = [](uint32_t pair) { return to_compute(S{static_cast<uint16_t>(pair)}); };
        const auto high = [](uint32_t pair) { return to_compute(S{static_cast<uint16_t>(pair >> 16)}); };
        Mma mma;
        mma.gather(
            lanes, [&](int row, int column, uint32_t x) { mma.a[row][column] = low(x), mma.a[row][column + 1] = high(x); },
            [&](int row, int column, uint32_t x) { mma.b[row][column] = low(x), mma.b[row + 1][column] = high(x); });
        mma.multiply(lanes);
    });
}

}  // namespace dien_ops::cuda
