// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dien_ops::cuda {

using Stream = void*;  // a cudaStream_t, for headers that know no CUDA

}  // namespace dien_ops::cuda
