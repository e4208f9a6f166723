// SPDX-License-Identifier: Apache-2.0
// The products of one step of the forward recurrence: [x, h] with the weights of all gates.
//
// A panel is a run of units of the state with the lanes of all their gates side by side, in four groups:
//
//     r | z | n's W x | n's U h
//
// The last two are kept apart, as the reset gate scales only the second. A panel has one vector per group, its width being a
// vector's; the last units, if they are few, take a panel of two vectors or of one, in which the groups share vectors, so that
// H = 36 with vectors of 16 costs 7 products per element of [x, h] rather than 9. For each element of x and then of h a panel
// stores its weights: a whole panel leaves out the groups that x or h has no share in. The biases of all groups follow. With
// the reset before the product n's U (r h) is not a panel's work, and h has a share in r and z alone.
#pragma once

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/storage.h"

namespace dien_ops::cpu {
namespace {

// The number of vectors of a panel that begins where `left` units are left: 4, 2 or 1.
template <typename T>
int64_t panel_vectors(int64_t left) {
    constexpr int64_t kSize = Vec<T>::kSize;
    if (kSize >= 4 && 4 * left <= kSize) return 1;
    return 2 * left <= kSize ? 2 : 4;
}

// The vectors stored for an element of x, and for one of h.
constexpr int64_t stored_for_x(int64_t vectors) { return vectors == 4 ? 3 : vectors; }
constexpr int64_t stored_for_h(int64_t vectors, bool reset_after) { return vectors < 4 ? vectors : reset_after ? 3 : 2; }

// Number of elements of a panel's packed weights and biases; I is 0 where x's share is computed elsewhere.
template <typename T>
int64_t panel_size(int64_t vectors, int64_t I, int64_t H, bool reset_after) {
    return (I * stored_for_x(vectors) + H * stored_for_h(vectors, reset_after) + vectors) * Vec<T>::kSize;
}

// Calls f.operator()<vectors>(first unit, units, offset of its weights) for each panel of H units. Returns the size of all.
template <typename T, typename F>
int64_t for_panels(int64_t I, int64_t H, bool reset_after, F&& f) {
    constexpr int64_t kSize = Vec<T>::kSize;
    int64_t offset = 0;
    for (int64_t first = 0; first < H; first += kSize) {
        const int64_t left = H - first, vectors = panel_vectors<T>(left), units = left < kSize ? left : kSize;
        if (vectors == 4) f.template operator()<4>(first, units, offset);
        if (vectors == 2) f.template operator()<2>(first, units, offset);
        if (vectors == 1) f.template operator()<1>(first, units, offset);
        offset += panel_size<T>(vectors, I, H, reset_after);
    }
    return offset;
}

template <typename T>
int64_t panels_size(int64_t I, int64_t H, bool reset_after) {
    return for_panels<T>(I, H, reset_after, []<int64_t kVectors>(int64_t, int64_t, int64_t) {});
}

// Number of lanes of all panels together. Those of a panel begin at four times its first unit.
template <typename T>
int64_t panels_width(int64_t H) {
    const int64_t whole = H / Vec<T>::kSize * Vec<T>::kSize, left = H - whole;
    return 4 * whole + (left > 0 ? panel_vectors<T>(left) * Vec<T>::kSize : 0);
}

// The row of weight_ih that a lane of the panels belongs to, or -1 where there is none.
template <typename T>
int64_t panel_lane_row(int64_t lane, int64_t H) {
    constexpr int64_t kSize = Vec<T>::kSize;
    const int64_t first = lane / (4 * kSize) * kSize, width = panel_vectors<T>(H - first) * kSize / 4;
    const int64_t group = (lane - 4 * first) / width, unit = first + (lane - 4 * first) % width;
    return group < 3 && unit < H ? group * H + unit : -1;
}

// weight_ih [3H, I], weight_hh [3H, H], and the biases [3H], which may be null; gates r, z, n.
template <typename T, typename S>
void pack_panels(const S* weight_ih, const S* weight_hh, const S* bias_ih, const S* bias_hh, int64_t I, int64_t H,
                 bool reset_after, T* packed) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for_panels<T>(I, H, reset_after, [&]<int64_t kVectors>(int64_t first, int64_t units, int64_t offset) {
        constexpr int64_t kWidth = kVectors * kSize / 4;
        const int64_t x_stride = stored_for_x(kVectors) * kSize, h_stride = stored_for_h(kVectors, reset_after) * kSize;
        T *const w = packed + offset, *const u = w + I * x_stride, *const bias = u + H * h_stride;
        std::memset(w, 0, panel_size<T>(kVectors, I, H, reset_after) * sizeof(T));
        const auto add = [&](const S* weight, int64_t depth, int64_t gate, int64_t group, T* to, int64_t stride) {
            for (int64_t i = 0; i < units && weight != nullptr; ++i) {
                const S* const row = weight + (gate * H + first + i) * depth;
                for (int64_t k = 0; k < depth; ++k) to[k * stride + group * kWidth + i] += load_one(row + k);
            }
        };
        for (int64_t gate = 0; gate < 3; ++gate) {
            add(weight_ih, I, gate, gate, w, x_stride);
            add(bias_ih, 1, gate, gate, bias, 0);
            if (gate == 2 && !reset_after) continue;
            add(weight_hh, H, gate, gate == 2 && kVectors < 4 ? 3 : gate, u, h_stride);
            add(bias_hh, 1, gate, gate == 2 ? 3 : gate, bias, 0);
        }
    });
}

// The part of a panel's weights that is worked on at a time: with 16-wide vectors 24 KiB, which stay in the first cache while
// all rows of a tile pass by.
constexpr int64_t kPanelDepth = 128;

// products [kRows][kVectors * kSize] += a [kRows, depth] times the panel's weights of these elements, kStored vectors for each.
// A whole panel has no more than three vectors of sums per row at work: the third is added to group kThird, 2 for elements of x
// and 3 for those of h.
template <int64_t kRows, int64_t kVectors, int64_t kStored, int64_t kThird, typename T>
void panel_products(const T* a, int64_t lda, const T* weights, int64_t depth, T* products) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> sums[kRows][kStored];
    add_register_products(a, lda, weights, kStored * kSize, depth, sums);
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
        for (int64_t v = 0; v < kStored; ++v) {
            T* const product = products + (m * kVectors + (kVectors == 4 && v == 2 ? kThird : v)) * kSize;
            (Vec<T>::load(product) + sums[m][v]).store(product);
        }
    }
}

}  // namespace
}  // namespace dien_ops::cpu
