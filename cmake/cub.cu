// SPDX-License-Identifier: Apache-2.0
// Whether the toolkit has CUB, whose radix sort csrc/cuda/sort.cu calls: some packages of nvcc leave it out.
#if !__has_include(<cub/device/device_radix_sort.cuh>)
#error no CUB
#endif
