// SPDX-License-Identifier: Apache-2.0
// Where the CUDA kernels of a call run: the device of its tensors and the caller's current stream. The host executor's build
// (csrc/cuda/host) takes CPU tensors instead, and has neither.
#pragma once

#include "cuda/lengths.h"
#include "ops/tensor.h"

#ifdef DIEN_OPS_HOST_EXECUTOR

#define DIEN_OPS_CUDA_KEY CPU

namespace dien_ops::ops {

struct DeviceGuard {
    explicit DeviceGuard(int32_t) {}
};

inline void* current_stream(int32_t) { return nullptr; }

}  // namespace dien_ops::ops

#else

#include <torch/csrc/stable/accelerator.h>

#define DIEN_OPS_CUDA_KEY CUDA

namespace dien_ops::ops {

using torch::stable::accelerator::DeviceGuard;

inline void* current_stream(int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
}

}  // namespace dien_ops::ops

#endif

namespace dien_ops::ops {

class CudaDevice {
  public:
    explicit CudaDevice(const Tensor& like)
        : device_(like.device()), guard_(like.get_device_index()), stream_(current_stream(like.get_device_index())) {}

    void* stream() const { return stream_; }
    Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
        return torch::stable::empty(sizes, dtype, std::nullopt, device_);
    }
    // An int64 copy, checked on the device: nobody waits for it, so one outside of 0..steps is a device-side assertion.
    Tensor lengths(const Tensor& given, int64_t batch, int64_t steps) const {
        const ScalarType dtype = given.scalar_type();
        check(is_integer(dtype), "lengths must be int32 or int64");
        const Tensor dense = checked(given, "lengths", {batch}, dtype, device_), result = empty({batch}, ScalarType::Long);
        cuda::check_lengths(stream_, dense.const_data_ptr(), dtype == ScalarType::Int, batch, steps,
                            mutable_pointer<int64_t>(result));
        return result;
    }
    OptionalTensor lengths(const OptionalTensor& given, int64_t batch, int64_t steps) const {
        return given.has_value() ? OptionalTensor(lengths(*given, batch, steps)) : std::nullopt;
    }

  private:
    torch::stable::Device device_;
    DeviceGuard guard_;
    void* stream_;
};

// A batch's lengths and the numbers of its valid steps. Owns what it points to; without lengths there is nothing.
class NumberedSteps {
  public:
    NumberedSteps(const CudaDevice& device, const OptionalTensor& given, int64_t batch, int64_t steps)
        : lengths(device.lengths(given, batch, steps)) {
        if (!lengths.has_value()) return;
        first_ = device.empty({batch}, ScalarType::Long), place_ = device.empty({batch * steps}, ScalarType::Long);
        total_ = device.empty({1}, ScalarType::Long);
        cuda::number_steps(device.stream(), pointer<int64_t>(lengths), batch, steps, mutable_pointer<int64_t>(first_),
                           mutable_pointer<int64_t>(place_), mutable_pointer<int64_t>(total_));
    }
    cuda::StepNumbers pointers() const {
        if (!lengths.has_value()) return {};
        return {pointer<int64_t>(lengths), pointer<int64_t>(first_), pointer<int64_t>(place_), pointer<int64_t>(total_)};
    }

    const OptionalTensor lengths;

  private:
    Tensor first_, place_, total_;
};

}  // namespace dien_ops::ops
