// SPDX-License-Identifier: Apache-2.0
// Kernels that only the tests of the executor and of the primitives run. Launchers wait for nothing; all pointers are to memory
// of the device that runs the kernel.
#pragma once

#include <cstdint>

#include "common/number.h"

namespace dien_ops::cuda::test {

using Stream = void*;

// What is wrong with the recurrent kernel: each is a mistake of the kind that a GPU may or may not show.
enum class Bug {
    none,
    missing_step_barrier,
    single_buffered_state,
    prefetch_before_barrier,
    wait_after_barrier,
    missing_wait,
    missing_syncwarp,
    out_of_range_shared,
    unwritten_shared,
    divergent_barrier,
    unrounded_operands,
    out_of_range_global,
    race_between_blocks,
    race_over_global,
    exited_thread,
    misaligned_vector,
    absent_buffer,
};

// h_t = tanh(u h_{t-1} + x_t), the products in tf32.
struct Recurrent {
    int64_t B, T, H;  // T at least 1, H a multiple of 8 and at most 64
    const float* x;   // [T, B, H], from a multiple of 16 bytes
    const float* u;   // [H, H]
    const float* h0;  // [B, H], or null for zeros
    float* y;         // [T, B, H]: the states
    float* h_n;       // [B, H]: the last of them
};
void recurrent(const Recurrent& problem, Bug bug, Stream stream);

// out [z, y, x, threads, 8]: each thread's indices, in the order that primitives.cuh declares them without grid_blocks().
void indices(int64_t x, int64_t y, int64_t z, int threads, int64_t* out, Stream stream);

// Launches a kernel that does nothing.
void nothing(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes, Stream stream);

// out [blocks * threads]: all threads (those of block b from b * threads on) in the order in which they went on after a
// barrier. count [1]: 0. Races by design.
void turns(int64_t blocks, int threads, int64_t* count, int64_t* out, Stream stream);

// Every thread goes through steps [count, 4]: (block, thread, action, number), and does what is its own. sync_block is for the
// whole block and sync_warp for the thread's whole warp, if they are not lone. numbers [n] are global memory, of which shared
// memory has as many; write_half writes half of one, counted in halves; copy takes four of them to shared memory and commits;
// wait waits for all.
enum class Action : int64_t {
    read_shared,
    write_shared,
    read_global,
    write_global,
    write_half,
    sync_warp,
    sync_block,
    copy,
    wait,
    copy_uncommitted,
    wait_for_all_but_one,
    lone_sync_warp,
    lone_sync_block,
    leave,
};
void perform(const int64_t* steps, int64_t count, float* numbers, int64_t n, int64_t blocks, int threads, Stream stream);

// Takes so many floats from the arena of a launch that asked for shared_bytes.
void take(int numbers, int64_t shared_bytes, Stream stream);

// out [n] = in [n], through shared memory, kNumbers at a time; up to 16 bytes of BFloat16, float or double.
template <typename T, int kNumbers>
void move(const T* in, T* out, int64_t n, Stream stream);

// out [n] = the numbers of in [in_n] from offset on, or nothing where in is null. of_part: the kernel gets this part, else it
// makes it.
void part(const float* in, int64_t in_n, int64_t offset, int64_t n, bool of_part, float* out, Stream stream);

// out [n] = in [n] through shared memory by asynchronous copies in as many groups as there are, of which the last may be late;
// n <= 4096, a multiple of 16 bytes.
template <typename T>
void copy_in_groups(const T* in, T* out, int n, Stream stream);

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
