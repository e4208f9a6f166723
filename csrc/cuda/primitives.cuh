// SPDX-License-Identifier: Apache-2.0
// What a kernel is made of: indices, global and shared memory, barriers, shuffles, asynchronous copies, number formats and
// matrix units. A kernel file uses nothing of CUDA but what stands here and in launch.cuh (and sort.h), so that one source
// builds twice:
//
//   by nvcc                 for the GPU. Each primitive is one instruction, and a view a bare pointer.
//   by a C++20 compiler,    for the host executor (cuda/host/), which runs the kernels on the CPU, for tests, and checks every
//   DIEN_OPS_HOST_EXECUTOR  access: bounds, alignment, races, memory never written.
//
// Rules for kernels
// - Blocks are a multiple of 32 threads. No thread leaves before the last barrier, shuffle or mma of its block or warp: rows
//   that do not exist are masked.
// - The lanes of a warp run in any order between two calls of sync_warp: shuffles and mma exchange registers, they order no
//   memory.
// - No two blocks of a launch touch the same number of global memory if one of them writes it.
// - Operands of matrix units are rounded explicitly.
//
// Every access and collective ends in a Site, its place in the source, which nobody passes except helpers that stand for their
// caller. #ifdef stands in this file, in launch.cuh and in sort.cu only, inline PTX only here; bodies for the executor:
// host/primitives_host.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"
#include "common/number.h"

#ifdef DIEN_OPS_HOST_EXECUTOR
#include "cuda/host/site.h"
#define DIEN_OPS_KERNEL(max_threads) static
#define DIEN_OPS_DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdio.h>
#define DIEN_OPS_KERNEL(max_threads) __global__ __launch_bounds__(max_threads, 1)
#define DIEN_OPS_DEVICE __device__ __forceinline__
namespace dien_ops::cuda {
struct Site {};
}  // namespace dien_ops::cuda
#endif

namespace dien_ops::cuda {

constexpr int kWarp = 32;

// Indices. Blocks have one axis, grids three.
DIEN_OPS_DEVICE int thread_index();   // in the block
DIEN_OPS_DEVICE int block_threads();  // threads of a block
DIEN_OPS_DEVICE int lane_index();     // in the warp
DIEN_OPS_DEVICE int warp_index();     // in the block
DIEN_OPS_DEVICE int block_warps();    // warps of a block
DIEN_OPS_DEVICE int64_t block_index();
DIEN_OPS_DEVICE int64_t block_index_y();
DIEN_OPS_DEVICE int64_t block_index_z();
DIEN_OPS_DEVICE int64_t grid_blocks();  // along x

// N numbers that move together.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

// V is moved as a whole: trivially copyable, a power of two of at most 16 bytes, made of whole T.
template <typename V, typename T>
constexpr bool kMovesAs =
    std::is_trivially_copyable_v<V> && sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0 && sizeof(V) % sizeof(T) == 0;

// A buffer in global memory, as the argument of a kernel: n numbers at ptr, under the name that reports use. Buffers that an
// argument may leave out have a null ptr. Copies and parts borrow; the caller of launch keeps the memory until the kernel is
// done.
template <typename T>
struct gmem {
    T* ptr = nullptr;
    int64_t n = 0;
    const char* name = "";

    gmem() = default;
    DIEN_OPS_HOST_DEVICE gmem(T* ptr, int64_t n, const char* name) : ptr(ptr), n(n), name(name) {}
    template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T>>>
    DIEN_OPS_HOST_DEVICE gmem(const gmem<U>& other) : ptr(other.ptr), n(other.n), name(other.name) {}

    DIEN_OPS_HOST_DEVICE explicit operator bool() const { return ptr != nullptr; }
    DIEN_OPS_DEVICE std::remove_const_t<T> ld(int64_t i, Site site = {}) const;
    DIEN_OPS_DEVICE void st(int64_t i, std::remove_const_t<T> value, Site site = {}) const;
    // sizeof(V) / sizeof(T) numbers from number i on, whose address is a multiple of sizeof(V): one instruction.
    template <typename V>
    DIEN_OPS_DEVICE V ld_as(int64_t i, Site site = {}) const;
    template <typename V>
    DIEN_OPS_DEVICE void st_as(int64_t i, V value, Site site = {}) const;
    // What ld_as loads where the condition holds, zeros elsewhere. Without a branch, and opaque to the compiler: no instruction
    // touches the number, and so waits for it, before the caller's does; nor does the compiler see that memory is read. So
    // nobody writes this memory during the launch, but a thread where it alone loads, what it computes from all it has loaded.
    template <typename V>
    DIEN_OPS_DEVICE V ld_if(bool condition, int64_t i, Site site = {}) const;
    // The numbers offset .. offset + n - 1; of an absent buffer, one that is absent.
    DIEN_OPS_HOST_DEVICE gmem sub(int64_t offset, int64_t n, Site site = {}) const;
};

// Shared memory of the block: n numbers, carved by an Arena. As gmem otherwise; indices have 32 bits.
template <typename T>
class view {
  public:
    view() = default;
    DIEN_OPS_DEVICE T ld(int i, Site site = {}) const;
    DIEN_OPS_DEVICE void st(int i, T value, Site site = {}) const;
    template <typename V>
    DIEN_OPS_DEVICE V ld_as(int i, Site site = {}) const;
    template <typename V>
    DIEN_OPS_DEVICE void st_as(int i, V value, Site site = {}) const;
    DIEN_OPS_DEVICE view sub(int offset, int n, Site site = {}) const;

  private:
    friend class Arena;
    template <typename U>
    friend DIEN_OPS_DEVICE void copy_async16(view<U>, int, std::type_identity_t<gmem<const U>>, int64_t, Site);

    T* data_ = nullptr;
#ifdef DIEN_OPS_HOST_EXECUTOR
    int n_ = 0;
    const char* name_ = "";
#endif
};

// What take<T>(n) uses; the shared_bytes of a launch are the sum of these.
template <typename T>
DIEN_OPS_HOST_DEVICE constexpr int64_t arena_bytes(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

// Carves the dynamic shared memory of the block from its beginning, each piece from a 16-byte boundary. Every thread makes its
// own and takes the same pieces in the same order.
class Arena {
  public:
    template <typename T>
    DIEN_OPS_DEVICE view<T> take(int n, const char* name);

  private:
    int used_ = 0;  // bytes
};

// The value itself, of 4 or 8 bytes in one register or pair of them up to here: the compiler takes it apart here or later,
// never at the load that it comes from.
template <typename V>
DIEN_OPS_DEVICE V keep_whole(V value);

// Barriers: what the threads of the block (of the warp) wrote before is seen by them after.
DIEN_OPS_DEVICE void sync_block(Site site = {});
DIEN_OPS_DEVICE void sync_warp(Site site = {});

// The value of lane lane_index() ^ lane_mask. All lanes of the warp call it. T: float, double, int, int64_t, uint32_t.
template <typename T>
DIEN_OPS_DEVICE T shuffle_xor(T value, int lane_mask, Site site = {});

// Copies 16 bytes from number j of src to number i of dst, both at multiples of 16 bytes, at some time before the wait for it.
// Copies since the last commit form a group; copy_async_wait<N> waits until all groups of this thread but the newest N are
// there. Other threads see them after the next barrier.
template <typename T>
DIEN_OPS_DEVICE void copy_async16(view<T> dst, int i, std::type_identity_t<gmem<const T>> src, int64_t j, Site site = {});
DIEN_OPS_DEVICE void copy_async_commit(Site site = {});
template <int N>
DIEN_OPS_DEVICE void copy_async_wait(Site site = {});

// Ends the launch where condition does not hold, with an error that carries the message: printf's format, an integer for each
// of its %lld and a floating-point number for each %g. On the device the message goes to stdout and the context is lost, as
// with assert, but in every build.
template <typename... Numbers>
DIEN_OPS_DEVICE void require(bool condition, const char* format, Numbers... numbers);

// What printf takes for a number of require's.
template <typename T>
using Printed = std::conditional_t<std::is_floating_point_v<T>, double, long long>;

// From what is stored to what is computed in, and back, to the nearest, ties to even. A NaN stays one; too large for Half is
// inf.
template <typename S>
DIEN_OPS_DEVICE Compute<S> to_compute(S x);
template <typename S>
DIEN_OPS_DEVICE S to_storage(Compute<S> x);

// Rounds to the 10 bits of mantissa of tf32, to the nearest, ties away from zero: what mma_m16n8k8_tf32 takes.
DIEN_OPS_DEVICE float to_tf32(float x);

// Fast forms, to about 2 units in the last place: of exp where |x| is small, 2 + |x| in general; divide_approx is 0 where
// 2^126 < |b|, and NaN where a is infinite too.
DIEN_OPS_DEVICE float exp_approx(float x);
DIEN_OPS_DEVICE float divide_approx(float a, float b);

DIEN_OPS_DEVICE float exp_exact(float x);
DIEN_OPS_DEVICE double exp_exact(double x);
DIEN_OPS_DEVICE float tanh_exact(float x);
DIEN_OPS_DEVICE double tanh_exact(double x);

// Matrix units: d += a b on fragments that lie spread over the warp, whose lanes all call. a is row major, b column major. With
// g = lane_index() / 4 and q = lane_index() % 4 (PTX ISA, "Matrix Fragments for mma"), a fragment holds these (row, column):
//
//   m16n8k8, tf32      a: (g, q) (g + 8, q) (g, q + 4) (g + 8, q + 4)       b: (q, g) (q + 4, g)
//   m16n8k16, 16 bits  a: (g, 2q) (g + 8, 2q) (g, 2q + 8) (g + 8, 2q + 8)   b: (2q, g) (2q + 8, g)
//                      each with its neighbour, one column (a) or one row (b) on, in the upper half
//   both               d: (g, 2q) (g, 2q + 1) (g + 8, 2q) (g + 8, 2q + 1)
//
// tf32 operands come from to_tf32. Products are exact, sums in float; in which order is the hardware's.
DIEN_OPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], Site site = {});
template <typename S>  // BFloat16 or Half
DIEN_OPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = {});

}  // namespace dien_ops::cuda

#ifdef DIEN_OPS_HOST_EXECUTOR
#include "cuda/host/primitives_host.h"
#else

namespace dien_ops::cuda {

DIEN_OPS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DIEN_OPS_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DIEN_OPS_DEVICE int lane_index() { return thread_index() % kWarp; }
DIEN_OPS_DEVICE int warp_index() { return thread_index() / kWarp; }
DIEN_OPS_DEVICE int block_warps() { return block_threads() / kWarp; }
DIEN_OPS_DEVICE int64_t block_index() { return blockIdx.x; }
DIEN_OPS_DEVICE int64_t block_index_y() { return blockIdx.y; }
DIEN_OPS_DEVICE int64_t block_index_z() { return blockIdx.z; }
DIEN_OPS_DEVICE int64_t grid_blocks() { return gridDim.x; }

// The built-in type of so many bytes. Accesses go through it, because a struct may be taken apart into several, and so may an
// integer of 64 bits.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<4> {
    using Type = unsigned;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

template <typename V>
DIEN_OPS_DEVICE V load_word(const void* p) {
    const auto word = *static_cast<const typename Word<sizeof(V)>::Type*>(p);
    V value;
    memcpy(&value, &word, sizeof(V));
    return value;
}

template <typename V>
DIEN_OPS_DEVICE void store_word(void* p, const V& value) {
    typename Word<sizeof(V)>::Type word;
    memcpy(&word, &value, sizeof(V));
    *static_cast<typename Word<sizeof(V)>::Type*>(p) = word;
}

// The integer of V's size: what asm takes.
template <typename V>
using Bits = std::conditional_t<sizeof(V) == 2, uint16_t, std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>>;

// What lies at `from` where the condition holds, `word` elsewhere.
DIEN_OPS_DEVICE uint16_t load_bits(uint16_t word, uint64_t from, int condition) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b16 %0, [%1];}" : "+h"(word) : "l"(from), "r"(condition));
    return word;
}
DIEN_OPS_DEVICE uint32_t load_bits(uint32_t word, uint64_t from, int condition) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b32 %0, [%1];}" : "+r"(word) : "l"(from), "r"(condition));
    return word;
}
DIEN_OPS_DEVICE uint64_t load_bits(uint64_t word, uint64_t from, int condition) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b64 %0, [%1];}" : "+l"(word) : "l"(from), "r"(condition));
    return word;
}

template <typename T>
DIEN_OPS_DEVICE std::remove_const_t<T> gmem<T>::ld(int64_t i, Site) const {
    return ptr[i];
}
template <typename T>
DIEN_OPS_DEVICE void gmem<T>::st(int64_t i, std::remove_const_t<T> value, Site) const {
    ptr[i] = value;
}
template <typename T>
template <typename V>
DIEN_OPS_DEVICE V gmem<T>::ld_as(int64_t i, Site) const {
    static_assert(kMovesAs<V, T>);
    return load_word<V>(ptr + i);
}
template <typename T>
template <typename V>
DIEN_OPS_DEVICE V gmem<T>::ld_if(bool condition, int64_t i, Site) const {
    static_assert(kMovesAs<V, T>);
    if constexpr (sizeof(V) == 16) {
        return condition ? load_word<V>(ptr + i) : V{};
    } else {
        const Bits<V> word = load_bits(Bits<V>{}, __cvta_generic_to_global(ptr + i), condition);
        V value;
        memcpy(&value, &word, sizeof(V));
        return value;
    }
}
template <typename T>
template <typename V>
DIEN_OPS_DEVICE void gmem<T>::st_as(int64_t i, V value, Site) const {
    static_assert(kMovesAs<V, T>);
    store_word(ptr + i, value);
}
template <typename T>
DIEN_OPS_HOST_DEVICE gmem<T> gmem<T>::sub(int64_t offset, int64_t count, Site) const {
    return {ptr == nullptr ? nullptr : ptr + offset, count, name};
}

template <typename T>
DIEN_OPS_DEVICE T view<T>::ld(int i, Site) const {
    return data_[i];
}
template <typename T>
DIEN_OPS_DEVICE void view<T>::st(int i, T value, Site) const {
    data_[i] = value;
}
template <typename T>
template <typename V>
DIEN_OPS_DEVICE V view<T>::ld_as(int i, Site) const {
    static_assert(kMovesAs<V, T>);
    return load_word<V>(data_ + i);
}
template <typename T>
template <typename V>
DIEN_OPS_DEVICE void view<T>::st_as(int i, V value, Site) const {
    static_assert(kMovesAs<V, T>);
    store_word(data_ + i, value);
}
template <typename T>
DIEN_OPS_DEVICE view<T> view<T>::sub(int offset, int, Site) const {
    view part;
    part.data_ = data_ + offset;
    return part;
}

template <typename V>
DIEN_OPS_DEVICE V keep_whole(V value) {
    if constexpr (sizeof(V) == 4 || sizeof(V) == 8) {
        Bits<V> word;
        memcpy(&word, &value, sizeof(V));
        if constexpr (sizeof(V) == 4) asm volatile("" : "+r"(word));
        if constexpr (sizeof(V) == 8) asm volatile("" : "+l"(word));
        memcpy(&value, &word, sizeof(V));
    }
    return value;
}

template <typename T>
DIEN_OPS_DEVICE view<T> Arena::take(int n, const char*) {
    extern __shared__ __align__(16) unsigned char dien_ops_arena[];
    view<T> piece;
    piece.data_ = reinterpret_cast<T*>(dien_ops_arena + used_);
    used_ += static_cast<int>(arena_bytes<T>(n));
    return piece;
}

DIEN_OPS_DEVICE void sync_block(Site) { __syncthreads(); }
DIEN_OPS_DEVICE void sync_warp(Site) { __syncwarp(); }

template <typename T>
DIEN_OPS_DEVICE T shuffle_xor(T value, int lane_mask, Site) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <typename T>
DIEN_OPS_DEVICE void copy_async16(view<T> dst, int i, std::type_identity_t<gmem<const T>> src, int64_t j, Site) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(dst.data_ + i));
    const auto from = static_cast<uint64_t>(__cvta_generic_to_global(src.ptr + j));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DIEN_OPS_DEVICE void copy_async_commit(Site) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DIEN_OPS_DEVICE void copy_async_wait(Site) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <typename... Numbers>
DIEN_OPS_DEVICE void require([[maybe_unused]] bool condition, [[maybe_unused]] const char* format, Numbers... numbers) {
#ifdef __CUDA_ARCH__
    if (condition) return;
    printf(format, static_cast<Printed<Numbers>>(numbers)...);
    printf("\n");
    __assert_fail(format, "dien_ops", 0, "require");  // what assert calls, whether or not NDEBUG leaves assert in
#endif
}

template <typename S>
DIEN_OPS_DEVICE Compute<S> to_compute(S x) {
    if constexpr (std::is_same_v<S, BFloat16>) return __bfloat162float(__ushort_as_bfloat16(x.bits));
    if constexpr (std::is_same_v<S, Half>) return __half2float(__ushort_as_half(x.bits));
    if constexpr (std::is_floating_point_v<S>) return x;
}
template <typename S>
DIEN_OPS_DEVICE S to_storage(Compute<S> x) {
    if constexpr (std::is_same_v<S, BFloat16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
    if constexpr (std::is_same_v<S, Half>) return {__half_as_ushort(__float2half_rn(x))};
    if constexpr (std::is_floating_point_v<S>) return x;
}

DIEN_OPS_DEVICE float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

DIEN_OPS_DEVICE float exp_approx(float x) { return __expf(x); }
DIEN_OPS_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }
DIEN_OPS_DEVICE float exp_exact(float x) { return expf(x); }
DIEN_OPS_DEVICE double exp_exact(double x) { return exp(x); }
DIEN_OPS_DEVICE float tanh_exact(float x) { return tanhf(x); }
DIEN_OPS_DEVICE double tanh_exact(double x) { return tanh(x); }

DIEN_OPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], Site) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
template <typename S>
DIEN_OPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site) {
    static_assert(std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>);
    if constexpr (std::is_same_v<S, BFloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
            "%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

}  // namespace dien_ops::cuda
#endif
