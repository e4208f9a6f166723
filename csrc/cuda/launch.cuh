// SPDX-License-Identifier: Apache-2.0
// The one way to start a kernel, and the limits that its caller plans with. For .cu files; the layer above sets the device.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/primitives.cuh"
#include "cuda/stream.h"

#ifdef DIEN_OPS_HOST_EXECUTOR
#include "cuda/host/executor.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#endif

namespace dien_ops::cuda {

struct Grid {
    int64_t x = 1, y = 1, z = 1;  // blocks
    int threads;                  // of a block, a multiple of 32
    int64_t shared_bytes = 0;     // of a block: the sum of arena_bytes of what its Arena takes
};

struct DeviceLimits {
    int multiprocessors;
    int64_t shared_bytes_per_block;  // the most that a kernel can ask for
};

// Those of the current device. Throws std::runtime_error where there is none.
DeviceLimits device_limits();

// Starts kernel(args...) on the stream and does not wait for it; without blocks it does nothing. Throws std::runtime_error,
// which names the kernel, where the device cannot run such a grid or the launch fails. Legal while a graph is captured. (The
// host executor runs the kernel before it returns, and throws what it found.)
template <typename... P>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, Stream stream, const std::type_identity_t<P>&... args);

inline bool is_empty(const Grid& grid) { return grid.x == 0 || grid.y == 0 || grid.z == 0; }

inline void check_grid(const char* name, const Grid& grid) {
    const auto refuse = [&](const char* what, const std::string& expected, int64_t got) {
        throw std::runtime_error(std::string(name) + ": " + what + " must be " + expected + ", got " + std::to_string(got));
    };
    const auto check = [&](const char* what, int64_t got, int64_t least, int64_t most) {
        if (got < least || got > most) refuse(what, "in " + std::to_string(least) + ".." + std::to_string(most), got);
    };
    check("grid.x", grid.x, 1, (int64_t{1} << 31) - 1);
    check("grid.y", grid.y, 1, 65535);
    check("grid.z", grid.z, 1, 65535);
    check("threads of a block", grid.threads, kWarp, 1024);
    if (grid.threads % kWarp != 0) refuse("threads of a block", "a multiple of 32", grid.threads);
    check("bytes of shared memory", grid.shared_bytes, 0, device_limits().shared_bytes_per_block);
}

#ifdef DIEN_OPS_HOST_EXECUTOR

inline DeviceLimits device_limits() { return {executor_options().multiprocessors, executor_options().shared_bytes_per_block}; }

template <typename... P>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, Stream, const std::type_identity_t<P>&... args) {
    if (is_empty(grid)) return;
    check_grid(name, grid);
    const auto thread = [&] { kernel(args...); };
    using Thread = decltype(thread);
    host::run({name,
               {grid.x, grid.y, grid.z},
               grid.threads,
               grid.shared_bytes,
               [](const void* call) { (*static_cast<Thread*>(call))(); },
               &thread});
}

#else

inline void check_cuda(const char* name, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // forgets it: who calls CUDA next has nothing to do with it
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

inline DeviceLimits device_limits() {
    static std::mutex mutex;
    static std::map<int, DeviceLimits> known;
    int device = 0;
    check_cuda("cudaGetDevice", cudaGetDevice(&device));
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(device); found != known.end()) return found->second;
    int multiprocessors = 0, shared_bytes = 0;
    check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check_cuda("cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return known[device] = {multiprocessors, shared_bytes};
}

template <typename... P>
void launch(const char* name, void (*kernel)(P...), const Grid& grid, Stream stream, const std::type_identity_t<P>&... args) {
    if (is_empty(grid)) return;
    check_grid(name, grid);
    const auto function = reinterpret_cast<const void*>(kernel);
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (grid.shared_bytes > kWithoutAsking) {
        // The device's limit, and not what this launch takes: another host thread may start the kernel with more.
        check_cuda(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(device_limits().shared_bytes_per_block)));
    }
    void* pointers[sizeof...(P) + 1] = {const_cast<void*>(static_cast<const void*>(&args))...};
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    check_cuda(name, cudaLaunchKernel(function, blocks, dim3(grid.threads), pointers, static_cast<size_t>(grid.shared_bytes),
                                      static_cast<cudaStream_t>(stream)));
    check_cuda(name, cudaGetLastError());
}

#endif

}  // namespace dien_ops::cuda
