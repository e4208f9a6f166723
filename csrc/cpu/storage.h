// SPDX-License-Identifier: Apache-2.0
// Vectors from and to memory in any format of storage (common/number.h): what is computed in float may be stored in 16 bits.
#pragma once

#include <type_traits>

#include "common/number.h"
#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
using Bits32 = NativeVector<float>::Bits;

// The first n of a vector's 16-bit lanes, from and to memory, by powers of two: memcpy with a variable size would be a call.
// (A masked store of 16-bit lanes takes some processors two hundred cycles; a masked load is as good as any.)
inline void copy_first(const uint16_t* source, uint16_t* destination, int64_t n) {
    constexpr int64_t kSize = Vec<float>::kSize;
    if (n == kSize) {
        std::memcpy(destination, source, 2 * kSize);
        return;
    }
    if (kSize > 8 && (n & 8) != 0) std::memcpy(destination, source, 16), source += 8, destination += 8;
    if (kSize > 4 && (n & 4) != 0) std::memcpy(destination, source, 8), source += 4, destination += 4;
    if ((n & 2) != 0) std::memcpy(destination, source, 4), source += 2, destination += 2;
    if ((n & 1) != 0) *destination = *source;
}
inline void store_bits(Bits16 bits, uint16_t* p, int64_t n) { copy_first(reinterpret_cast<const uint16_t*>(&bits), p, n); }

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Bits16 load_bits(const uint16_t* p, int64_t n) {
    return (Bits16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
#else
inline Bits16 load_bits(const uint16_t* p, int64_t n) {
    Bits16 bits{};
    copy_first(p, reinterpret_cast<uint16_t*>(&bits), n);
    return bits;
}
#endif

// To the lower halves of 32 bits, and from there; the compiler takes several instructions where AVX-512 has one. (Masks:
// simd.h.)
#if defined(__AVX512F__)
inline Bits32 widen_bits(Bits16 bits) { return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits); }
inline Bits16 narrow_bits(Bits32 bits) { return (Bits16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits); }
#else
inline Bits32 widen_bits(Bits16 bits) { return __builtin_convertvector(bits, Bits32); }
inline Bits16 narrow_bits(Bits32 bits) { return __builtin_convertvector(bits, Bits16); }
#endif

inline Vec<float> widen(Bits16 bits, BFloat16) { return from_bits<float>(widen_bits(bits) << 16); }

// To the nearest, ties to even; a NaN stays one.
inline Bits16 narrow(Vec<float> x, BFloat16) {
    const Bits32 bits = bits_of(x);
    const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits32 result = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    return narrow_bits(result);
}

#if defined(__AVX512F__)
inline Vec<float> widen(Bits16 half, Half) { return Vec<float>(_mm512_maskz_cvtph_ps(0xffff, (__m256i)half)); }
inline Bits16 narrow(Vec<float> x, Half) {
    return (Bits16)_mm512_maskz_cvtps_ph(0xffff, x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Half's exponent, moved to where float has its own, is 112 too small; scaling mends that for subnormal numbers too. What was
// infinite or NaN has an exponent of 143 then and gets 255. (With torch.set_flush_denormal they are zero, as float's are.)
inline Vec<float> widen(Bits16 half, Half) {
    const Bits32 wide = widen_bits(half);
    const Bits32 sign = (wide & 0x8000) << 16;
    const Vec<float> scaled = from_bits<float>((wide & 0x7fff) << 13) * Vec<float>(0x1p112f);
    const Bits32 bits = bits_of(scaled);
    return from_bits<float>((bits >= 0x47800000 ? bits | 0x7f800000 : bits) | sign);
}

// To the nearest, ties to even; infinite from 65520 on; a NaN stays one.
inline Bits16 narrow(Vec<float> x, Half) {
    const Bits32 bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    // From 2^-14 on: the exponent moved, 13 bits rounded off; a carry runs into the exponent, as it should.
    const Bits32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below: added to 0.5, whose last place is 2^-24, the processor's own rounding leaves the result in the last bits.
    const Bits32 subnormal = bits_of(from_bits<float>(magnitude) + Vec<float>(0.5f)) - 0x3f000000;
    const Bits32 finite = magnitude < 0x38800000 ? subnormal : normal;
    const Bits32 infinite = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : Bits32{} + 0x7c00;
    return narrow_bits((magnitude >= 0x477ff000 ? infinite : finite) | sign);
}
#endif

// The first n elements at p (0 <= n <= kSize), as what is computed in; the other lanes are 0.
template <typename T, typename S>
Vec<T> load(const S* p, int64_t n) {
    if constexpr (std::is_same_v<S, T>) {
        return Vec<T>::load(p, n);
    } else {
        return widen(load_bits(&p->bits, n), S{});
    }
}

// Rounds the first n lanes of x to what is stored at p.
template <typename T, typename S>
void store(Vec<T> x, S* p, int64_t n) {
    if constexpr (std::is_same_v<S, T>) {
        x.store(p, n);
    } else {
        store_bits(narrow(x, S{}), &p->bits, n);
    }
}

template <typename S>
Compute<S> load_one(const S* p) {
    if constexpr (std::is_same_v<S, Compute<S>>) {
        return *p;
    } else {
        return load<float>(p, 1).v[0];
    }
}

}  // namespace
}  // namespace dien_ops::cpu
