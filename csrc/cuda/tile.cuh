// SPDX-License-Identifier: Apache-2.0
// Products of small matrices in registers: what the kernels multiply with, one policy for each precision.
//
// A warp computes tiles of 16 rows x 8 columns, D += A B, over kDepth values of k at a time. Every policy has D where
// mma.sync has it: of the warp's 32 lanes, lane 4 g + q holds
//     d[0] (g, 2q)   d[1] (g, 2q + 1)   d[2] (g + 8, 2q)   d[3] (g + 8, 2q + 1)
// so that what follows a product does not depend on how it was made.
//
// A lies row by row, `stride` numbers apart; a stride that ends in a 16-byte pad (padded_stride) keeps the lanes of one load
// in different banks. B lies in packed tiles of 8 columns x kDepth, in the order in which lanes load them; position(n, k)
// says where in a tile a number is. Numbers are rounded to the operand type when they are stored, never when they are loaded.
#pragma once

#include "common/number.h"
#include "cuda/primitives.cuh"

namespace dien_ops::cuda {

constexpr int kTileRows = 16, kTileColumns = 8;

DIEN_OPS_DEVICE int tile_row() { return lane_index() / 4; }         // of d[0] and d[1]; 8 less than that of d[2] and d[3]
DIEN_OPS_DEVICE int tile_column() { return lane_index() % 4 * 2; }  // of d[0] and d[2]; 1 less than that of d[1] and d[3]

// Exact: multiply-adds of float or double in any order of k. The same numbers as torch without tf32, and gradcheck's.
template <typename T>
struct ExactMath {
    using Storage = T;
    using Operand = T;
    static constexpr bool kMatrixUnit = false;
    static constexpr int kDepth = 16 / sizeof(T);
    using Vector = Pack<T, kDepth>;
    struct A {
        Vector row[2];
    };
    struct B {
        Vector column[2];
    };

    DIEN_OPS_DEVICE static Operand operand(T x) { return x; }
    DIEN_OPS_DEVICE static T sigmoid(T x) { return T(1) / (T(1) + exp_exact(-x)); }
    DIEN_OPS_DEVICE static T tanh(T x) { return tanh_exact(x); }

    template <typename Memory>
    DIEN_OPS_DEVICE static A load_a(const Memory& a, int first, int stride) {
        const int i = first + tile_row() * stride;
        return {a.template ld_as<Vector>(i), a.template ld_as<Vector>(i + 8 * stride)};
    }
    DIEN_OPS_DEVICE static constexpr int position(int n, int k) { return n * kDepth + k; }
    template <typename Memory, typename Index>
    DIEN_OPS_DEVICE static B load_b(const Memory& b, Index tile) {
        const Index i = (tile * kTileColumns + tile_column()) * kDepth;
        return {b.template ld_as<Vector>(i), b.template ld_as<Vector>(i + kDepth)};
    }
    DIEN_OPS_DEVICE static void multiply(T (&d)[4], const A& a, const B& b) {
        for (int k = 0; k < kDepth; ++k) {
            for (int i = 0; i < 4; ++i) d[i] += a.row[i / 2].v[k] * b.column[i % 2].v[k];
        }
    }
};

// float rounded to tf32 (11 significant bits), summed in float.
struct Tf32Math {
    using Storage = float;
    using Operand = float;
    static constexpr bool kMatrixUnit = true;
    static constexpr int kDepth = 8;
    struct A {
        float v[4];
    };
    struct B {
        float v[2];
    };

    DIEN_OPS_DEVICE static Operand operand(float x) { return to_tf32(x); }
    DIEN_OPS_DEVICE static float sigmoid(float x) { return divide_approx(1.0f, 1.0f + exp_approx(-x)); }
    DIEN_OPS_DEVICE static float tanh(float x) { return 1.0f - divide_approx(2.0f, 1.0f + exp_approx(2.0f * x)); }

    template <typename Memory>
    DIEN_OPS_DEVICE static A load_a(const Memory& a, int first, int stride) {
        const int i = first + tile_row() * stride + lane_index() % 4;
        return {a.ld(i), a.ld(i + 8 * stride), a.ld(i + 4), a.ld(i + 8 * stride + 4)};
    }
    DIEN_OPS_DEVICE static constexpr int position(int n, int k) { return (4 * n + k % 4) * 2 + k / 4; }
    template <typename Memory, typename Index>
    DIEN_OPS_DEVICE static B load_b(const Memory& b, Index tile) {
        const auto both = b.template ld_as<Pack<float, 2>>(tile * (kTileColumns * kDepth) + lane_index() * 2);
        return {both.v[0], both.v[1]};
    }
    DIEN_OPS_DEVICE static void multiply(float (&d)[4], const A& a, const B& b) { mma_m16n8k8_tf32(d, a.v, b.v); }
};

// bfloat16 or float16, summed in float.
template <typename S>
struct HalfMath {
    using Storage = S;
    using Operand = S;
    static constexpr bool kMatrixUnit = true;
    static constexpr int kDepth = 16;
    struct A {
        uint32_t v[4];
    };
    struct B {
        uint32_t v[2];
    };

    DIEN_OPS_DEVICE static Operand operand(float x) { return to_storage<S>(x); }
    DIEN_OPS_DEVICE static float sigmoid(float x) { return Tf32Math::sigmoid(x); }
    DIEN_OPS_DEVICE static float tanh(float x) { return Tf32Math::tanh(x); }

    template <typename Memory>
    DIEN_OPS_DEVICE static A load_a(const Memory& a, int first, int stride) {
        const int i = first + tile_row() * stride + tile_column();
        return {a.template ld_as<uint32_t>(i), a.template ld_as<uint32_t>(i + 8 * stride), a.template ld_as<uint32_t>(i + 8),
                a.template ld_as<uint32_t>(i + 8 * stride + 8)};
    }
    DIEN_OPS_DEVICE static constexpr int position(int n, int k) { return (4 * n + k % 8 / 2) * 4 + k / 8 * 2 + k % 2; }
    template <typename Memory, typename Index>
    DIEN_OPS_DEVICE static B load_b(const Memory& b, Index tile) {
        const auto both = b.template ld_as<Pack<uint32_t, 2>>(tile * (kTileColumns * kDepth) + lane_index() * 4);
        return {both.v[0], both.v[1]};
    }
    DIEN_OPS_DEVICE static void multiply(float (&d)[4], const A& a, const B& b) { mma_m16n8k16<S>(d, a.v, b.v); }
};

template <typename Math>
using Accumulator = Compute<typename Math::Storage>;

template <typename Math>
constexpr int kTileNumbers = kTileColumns * Math::kDepth;  // of a packed tile of B

template <typename T>
DIEN_OPS_HOST_DEVICE constexpr T divide_up(T a, T b) {
    return (a + b - 1) / b;
}
template <typename T>
DIEN_OPS_HOST_DEVICE constexpr T round_up(T a, T b) {
    return divide_up(a, b) * b;
}

// The tiles that k numbers make, and the numbers from one row of A to the next.
template <typename Math>
DIEN_OPS_HOST_DEVICE constexpr int depth_tiles(int64_t k) {
    return static_cast<int>(divide_up<int64_t>(k, Math::kDepth));
}
template <typename Math>
DIEN_OPS_HOST_DEVICE constexpr int padded_stride(int tiles) {
    return tiles * Math::kDepth + static_cast<int>(16 / sizeof(typename Math::Operand));
}

// Calls f(m, half, row) for each row of which the lane has d[2 * half] and d[2 * half + 1] of row tile m.
template <int kRowTiles, typename F>
DIEN_OPS_DEVICE void for_lane_rows(const F& f) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) f(m, half, m * kTileRows + tile_row() + half * 8);
    }
}

// d[row tile][column tile] += A B for tiles [begin, end) of k: A's rows from `a`, B's tile (k, column tile) at
// first_tile + k * tile_stride + column tile.
template <typename Math, int kRowTiles, int kColumns, typename MemoryA, typename MemoryB, typename Index>
DIEN_OPS_DEVICE void multiply_tiles(Accumulator<Math> (&d)[kRowTiles][kColumns][4], const MemoryA& a, int a_first, int a_stride,
                                    const MemoryB& b, Index first_tile, int tile_stride, int begin, int end) {
#pragma unroll 2
    for (int k = begin; k < end; ++k) {
        typename Math::A rows[kRowTiles];
        for (int m = 0; m < kRowTiles; ++m) {
            rows[m] = Math::load_a(a, a_first + m * kTileRows * a_stride + k * Math::kDepth, a_stride);
        }
        for (int n = 0; n < kColumns; ++n) {
            const typename Math::B column = Math::load_b(b, first_tile + Index(k) * tile_stride + n);
            for (int m = 0; m < kRowTiles; ++m) Math::multiply(d[m][n], rows[m], column);
        }
    }
}

// Two numbers as they are loaded: in one word, where there is one. What a step loads for the next one is kept so until it is
// used, because whatever takes numbers apart, converts them or moves them to other registers waits for the memory first.
template <typename S>
using LoadedPair = std::conditional_t<sizeof(S) == 2, uint32_t, std::conditional_t<sizeof(S) == 4, uint64_t, Pack<S, 2>>>;

template <typename S>
DIEN_OPS_DEVICE Pack<Compute<S>, 2> unpack(const LoadedPair<S>& loaded) {
    Pack<S, 2> pair;
    const LoadedPair<S> word = keep_whole(loaded);
    memcpy(&pair, &word, sizeof(pair));
    return {to_compute(pair.v[0]), to_compute(pair.v[1])};
}

// Numbers i and i + 1 of a row as far as `count` says (0, 1 or 2), zeros for the others; `paired` promises that i and count are
// even, and the row's memory aligned to two numbers.
template <typename S>
DIEN_OPS_DEVICE LoadedPair<S> load_pair(const gmem<const S>& from, int64_t i, int count, bool paired) {
    LoadedPair<S> loaded = from.template ld_if<LoadedPair<S>>(paired && count > 0, i);
    if (!paired) {
        const Pack<S, 2> pair = {from.template ld_if<S>(count > 0, i), from.template ld_if<S>(count > 1, i + 1)};
        memcpy(&loaded, &pair, sizeof(pair));
    }
    return loaded;
}

template <typename S>
DIEN_OPS_DEVICE void store_pair(const gmem<S>& to, int64_t i, int count, bool paired, const Pack<Compute<S>, 2>& pair) {
    const Pack<S, 2> stored = {to_storage<S>(pair.v[0]), to_storage<S>(pair.v[1])};
    if (paired) {
        if (count > 0) to.st_as(i, stored);
    } else {
        if (count > 0) to.st(i, stored.v[0]);
        if (count > 1) to.st(i + 1, stored.v[1]);
    }
}

// How many of the numbers at `column` and behind it are among the first `columns`, at most 2.
DIEN_OPS_DEVICE int pair_count(int column, int columns) {
    const int left = columns - column;
    return left < 0 ? 0 : left < 2 ? left : 2;
}

// Calls f with the policy for numbers stored as S.
template <typename S, typename F>
void with_math([[maybe_unused]] bool tf32, F&& f) {
    if constexpr (sizeof(S) == 2) {
        f(HalfMath<S>{});
    } else if constexpr (sizeof(S) == 8) {
        f(ExactMath<S>{});
    } else if (tf32) {
        f(Tf32Math{});
    } else {
        f(ExactMath<S>{});
    }
}

// Calls f with the condition as a constant.
template <typename F>
void with_constant(bool condition, F&& f) {
    condition ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace dien_ops::cuda
