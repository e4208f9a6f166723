// SPDX-License-Identifier: Apache-2.0
// The host executor: runs a kernel on the CPU, for tests. Each CUDA thread is a fiber (host/fiber.h); all run on the OS thread
// that calls launch, block after block, and take turns only where a barrier or a warp's collective makes them wait. So a run is
// deterministic: the options say in which order threads run. This header is what the bodies of the primitives and the tests
// use.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/host/shadow.h"
#include "cuda/host/site.h"

namespace dien_ops::cuda {

struct ExecutorOptions {
    // in_order: threads take turns, 0 first; reverse: the last first; shuffled: any runnable thread; skewed: one warp (drawn
    // for each block) runs as far as it can before the next one does. reverse also runs the last block first, and the last two
    // run blocks in an order drawn.
    enum Order { in_order, reverse, shuffled, skewed } order = in_order;
    uint64_t seed = 0;  // of orders and of the time at which asynchronous copies happen
    bool check = true;  // shadow memory (host/shadow.h): races, and reads of shared memory never written
    int multiprocessors = 4;
    int64_t shared_bytes_per_block = 232448;
};

// Those of every later launch.
ExecutorOptions& executor_options();

namespace host {

struct Launch {
    const char* kernel;
    int64_t blocks[3];
    int threads;  // of a block
    int64_t shared_bytes;
    void (*thread)(const void* call);  // one thread's run of the kernel
    const void* call;
};

// Runs the kernel. Throws what a thread threw, or a std::runtime_error with one line for each thing found.
void run(const Launch& launch);

// The thread that runs.
struct Running {
    int thread, threads;
    int64_t block[3], blocks;  // blocks along x
    unsigned char* shared;
    int64_t shared_bytes;
    bool check;
};
extern Running running;

// Whether the caller is a thread of a kernel.
bool in_kernel();

// Ends the launch with message and the thread.
[[noreturn]] void fail(const std::string& message);

// The launch goes on and ends with a line "<what>: <detail> <site>, thread 17 (block 3)"; one for each buffer and place.
void report(const char* what, const std::string& detail, const char* buffer, const Site& site);

void shadow_access(const Access& access);

void wait_for_block(Site site);

// Waits until all lanes of the warp have handed in their operands; the last one calls all(those of all lanes).
void wait_for_warp(const char* what, Site site, void* operands, void (*all)(void* const* lanes));
void order_warp(void* const* lanes);  // an all() after which each lane sees what the others wrote

void copy_async16(const Access& to, const void* from);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace host
}  // namespace dien_ops::cuda
