// SPDX-License-Identifier: Apache-2.0
// Kernels that only the tests of the host executor run, in it: most are wrong on purpose.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace dien_ops::cuda::test {

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

}  // namespace dien_ops::cuda::test
