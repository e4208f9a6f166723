// SPDX-License-Identifier: Apache-2.0
// What every torch-facing file needs: checks that say what came, allocation, raw pointers, threads. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/number.h"

namespace dien_ops::ops {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Throws std::runtime_error (RuntimeError in Python) with the arguments joined as the message.
template <typename... Args>
void check(bool condition, const Args&... message) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::runtime_error(text.str());
}

inline std::string to_string(const std::vector<int64_t>& sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline void check_sizes(const Tensor& t, const char* argument, const std::vector<int64_t>& expected) {
    const std::vector<int64_t> got = sizes_of(t);
    check(got == expected, argument, " must have shape ", to_string(expected), ", got ", to_string(got));
}

inline void check_tensor(const Tensor& t, const char* argument, const std::vector<int64_t>& expected, ScalarType dtype,
                         const Device& device) {
    check_sizes(t, argument, expected);
    check(t.device() == device, argument, " must be on the device of the other arguments");
    check(t.scalar_type() == dtype, argument, " must have the dtype of the other arguments");
}

// t, contiguous, of the given type and on the device; its shape is checked first.
inline Tensor checked(const Tensor& t, const char* argument, const std::vector<int64_t>& expected, ScalarType dtype,
                      const Device& device = torch::headeronly::DeviceType::CPU) {
    check_tensor(t, argument, expected, dtype, device);
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor checked(const OptionalTensor& t, const char* argument, const std::vector<int64_t>& expected,
                              ScalarType dtype, const Device& device = torch::headeronly::DeviceType::CPU) {
    return t.has_value() ? OptionalTensor(checked(*t, argument, expected, dtype, device)) : std::nullopt;
}

// What tensors of the dtype are computed in (common/number.h).
inline ScalarType compute_dtype(ScalarType dtype) {
    return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// t in the given dtype, in the same layout; t itself where it has it.
inline Tensor converted(const Tensor& t, ScalarType dtype) {
    return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// t in what it is computed in, for kernels that cannot read the 16-bit format in which the other arguments are stored.
inline Tensor widened(const Tensor& t, const char* argument, ScalarType stored) {
    check(t.scalar_type() == stored, argument, " must have the dtype of the other arguments");
    return converted(t, compute_dtype(stored));
}

inline OptionalTensor widened(const OptionalTensor& t, const char* argument, ScalarType stored) {
    return t.has_value() ? OptionalTensor(widened(*t, argument, stored)) : std::nullopt;
}

// Memory that comes fresh from the system faults on the first write to each page; pages of 2 MiB spare a large result most of
// these faults. Only whole pages of a large block are asked for.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 2 << 20;
    if (bytes < static_cast<int64_t>(2 * kPage)) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: refused, nothing is lost
#endif
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
    const Tensor t = torch::stable::empty(sizes, dtype);
    advise_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
    return t;
}

inline Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype) {
    Tensor t = empty(sizes, dtype);
    torch::stable::zero_(t);
    return t;
}

template <typename T>
const T* pointer(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* pointer(const OptionalTensor& t) {
    return t.has_value() ? pointer<T>(*t) : nullptr;
}

template <typename T>
T* mutable_pointer(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

// Of ids and lengths.
inline bool is_integer(ScalarType dtype) { return dtype == ScalarType::Int || dtype == ScalarType::Long; }

// The valid steps of each of the batch's rows: lengths checked to lie in 0..steps, or steps for every row where none came.
inline std::vector<int64_t> read_lengths(const OptionalTensor& lengths, int64_t batch, int64_t steps) {
    std::vector<int64_t> result(batch, steps);
    if (!lengths.has_value()) return result;
    check_sizes(*lengths, "lengths", {batch});
    const ScalarType dtype = lengths->scalar_type();
    check(is_integer(dtype), "lengths must be int32 or int64");
    check(lengths->is_cpu(), "lengths must be on the CPU as the other arguments are");
    const Tensor dense = lengths->is_contiguous() ? *lengths : torch::stable::contiguous(*lengths);
    for (int64_t b = 0; b < batch; ++b) {
        result[b] = dtype == ScalarType::Int ? pointer<int32_t>(dense)[b] : pointer<int64_t>(dense)[b];
        check(result[b] >= 0 && result[b] <= steps, "lengths must be in 0..", steps, " (T), got ", result[b], " at row ", b);
    }
    return result;
}

// Calls f with a value of the C++ type that stands for dtype.
template <typename F>
void with_floating_type(ScalarType dtype, const char* argument, F&& f) {
    if (dtype == ScalarType::Float) return f(float{});
    if (dtype == ScalarType::Double) return f(double{});
    check(false, argument, " must be float32 or float64");
}

// The same with the formats that are only stored (common/number.h).
template <typename F>
void with_storage_type(ScalarType dtype, const char* argument, F&& f) {
    if (dtype == ScalarType::Float) return f(float{});
    if (dtype == ScalarType::Double) return f(double{});
    if (dtype == ScalarType::BFloat16) return f(BFloat16{});
    if (dtype == ScalarType::Half) return f(Half{});
    check(false, argument, " must be float32, float64, bfloat16 or float16");
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i) once for each i in 0..count-1 from several threads; whichever is free takes the next i.
template <typename F>
void parallel_tasks(int64_t count, const F& f) {
    std::atomic<int64_t> next = 0;
    const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t i = next++; i < count; i = next++) f(i);
        }
    });
}

// Calls f(begin, end) on disjoint ranges that cover 0..count-1, one for each thread, none shorter than grain if it can be.
template <typename F>
void parallel_ranges(int64_t count, const F& f, int64_t grain = 1) {
    torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace dien_ops::ops
