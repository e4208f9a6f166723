// SPDX-License-Identifier: Apache-2.0
// The radix sort of CUB, which is part of the CUDA toolkit: a pass over memory for each 8 bits, as fast as the memory is. Its
// kernels are no kernels of ours: neither does the host executor run them, nor do our rules hold for them. Keys alone are
// sorted, of one type, so that the build has one set of them: 8 s and 0.3 MB. In the executor's build std::stable_sort
// stands for it.
#include "cuda/sort.h"

#ifdef DIEN_OPS_HOST_EXECUTOR
#include <algorithm>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

#include "cuda/launch.cuh"

namespace dien_ops::cuda {

#ifdef DIEN_OPS_HOST_EXECUTOR

int64_t sort_workspace(int64_t n, int, int) { return n > 0 ? 1 : 0; }

uint64_t* sort_words(Stream, uint64_t* words, uint64_t* other, int64_t n, int begin_bit, int end_bit, void*, int64_t) {
    const uint64_t mask = end_bit - begin_bit < 64 ? (uint64_t{1} << (end_bit - begin_bit)) - 1 : ~uint64_t{0};
    std::copy(words, words + n, other);
    std::fill(words, words + n, ~uint64_t{0});  // nobody may count on it
    std::stable_sort(other, other + n,
                     [&](uint64_t a, uint64_t b) { return (a >> begin_bit & mask) < (b >> begin_bit & mask); });
    return other;
}

#else

int64_t sort_workspace(int64_t n, int begin_bit, int end_bit) {
    size_t bytes = 0;
    cub::DoubleBuffer<uint64_t> words(nullptr, nullptr);
    check_cuda("sort_words", cub::DeviceRadixSort::SortKeys(nullptr, bytes, words, n, begin_bit, end_bit));
    return static_cast<int64_t>(bytes);
}

uint64_t* sort_words(Stream stream, uint64_t* words, uint64_t* other, int64_t n, int begin_bit, int end_bit, void* workspace,
                     int64_t bytes) {
    size_t given = static_cast<size_t>(bytes);
    cub::DoubleBuffer<uint64_t> both(words, other);
    check_cuda("sort_words", cub::DeviceRadixSort::SortKeys(workspace, given, both, n, begin_bit, end_bit,
                                                            static_cast<cudaStream_t>(stream)));
    return both.Current();
}

#endif

}  // namespace dien_ops::cuda
