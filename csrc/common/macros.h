// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks the equations that both back ends compile.
#ifdef __CUDACC__
#define DIEN_OPS_HOST_DEVICE __host__ __device__
#else
#define DIEN_OPS_HOST_DEVICE
#endif
