// SPDX-License-Identifier: Apache-2.0
// Where the CUDA kernels of a call run: the device of its tensors and the caller's current stream. The host executor's build
// (csrc/cuda/host) takes CPU tensors instead, and has neither.
#pragma once

#include "ops/tensor.h"

#ifdef DIEN_OPS_HOST_EXECUTOR
#define DIEN_OPS_CUDA_KEY CPU
#else
#define DIEN_OPS_CUDA_KEY CUDA
#include <torch/csrc/stable/accelerator.h>
// libtorch_cuda's; declared here because torch's own header does so only where CUDA's headers are.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace dien_ops::ops {

class CudaDevice {
  public:
    explicit CudaDevice(const Tensor& like)
        : device_(like.device())
#ifndef DIEN_OPS_HOST_EXECUTOR
          ,
          guard_(like.get_device_index())
#endif
    {
#ifndef DIEN_OPS_HOST_EXECUTOR
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
#endif
    }

    void* stream() const { return stream_; }
    Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
        return torch::stable::empty(sizes, dtype, std::nullopt, device_);
    }

  private:
    torch::stable::Device device_;
#ifndef DIEN_OPS_HOST_EXECUTOR
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    void* stream_ = nullptr;
};

}  // namespace dien_ops::ops
