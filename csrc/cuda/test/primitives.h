// SPDX-License-Identifier: Apache-2.0
// Kernels that only the tests of the primitives and of launch run: on the GPU, and in the host executor. Launchers wait for
// nothing; all pointers are to memory of the device that runs the kernel.
#pragma once

#include <cstdint>

#include "common/number.h"
#include "cuda/stream.h"

namespace dien_ops::cuda::test {

// out [z, y, x, threads, 8]: each thread's indices, in the order that primitives.cuh declares them without grid_blocks().
void indices(int64_t x, int64_t y, int64_t z, int threads, int64_t* out, Stream stream);

// Launches a kernel that does nothing.
void nothing(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes, Stream stream);

// out [n] = in [n], through shared memory, kNumbers at a time; up to 16 bytes of BFloat16, float or double. Of every `every`
// times kNumbers the first are loaded, where that is not all with ld_if, and the others 0.
template <typename T, int kNumbers>
void move(const T* in, int64_t every, T* out, int64_t n, Stream stream);

// out [n] = the numbers of in [in_n] from offset on, or nothing where in is null. of_part: the kernel gets this part, else it
// makes it.
void part(const float* in, int64_t in_n, int64_t offset, int64_t n, bool of_part, float* out, Stream stream);

// out [n] = in [n] through shared memory by asynchronous copies in as many groups as there are, of which the last may be late;
// n is a multiple of 16 bytes that a block's shared memory holds.
template <typename T>
void copy_in_groups(const T* in, T* out, int n, Stream stream);

// out [blocks, 4 * threads] = in with its rows reversed: each number is brought to shared memory by one thread of a block and
// taken from there by another.
void reverse(const float* in, float* out, int64_t blocks, int threads, Stream stream);

// out [32] = in [lane ^ lane_mask]
template <typename T>
void shuffle(const T* in, T* out, int lane_mask, Stream stream);

// d [16, 8] += a [16, k] b [k, 8]: k = 8 for float, 16 for the 16-bit formats.
template <typename T>
void mma(const T* a, const T* b, float* d, Stream stream);

// out [n] = f(in): exp_approx, exp_exact, tanh_exact or to_tf32; divide_approx(in[i], in2[i]).
enum class Function { exp_approx, exp_exact, tanh_exact, to_tf32, divide_approx };
template <typename T>
void apply(Function f, const T* in, const T* in2, T* out, int64_t n, Stream stream);

template <typename S>
void to_compute(const S* in, float* out, int64_t n, Stream stream);
template <typename S>
void to_storage(const float* in, S* out, int64_t n, Stream stream);

// Requires that no element of in [n] is negative.
void require_not_negative(const int64_t* in, int64_t n, Stream stream);

}  // namespace dien_ops::cuda::test
