// SPDX-License-Identifier: Apache-2.0
// Memory that a kernel needs for the time of one call. Not std::vector: its inline code, compiled for one instruction set,
// could be linked into code that runs on another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace dien_ops::cpu {
namespace {

template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t size) : data_(static_cast<T*>(std::malloc((size > 0 ? size : 1) * sizeof(T)))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    operator T*() const { return data_; }

  private:
    T* data_;
};

// memset must not be given the null pointer of an empty tensor, not even for 0 bytes.
template <typename T>
void fill_zeros(T* p, int64_t size) {
    if (size > 0) std::memset(p, 0, size * sizeof(T));
}

}  // namespace
}  // namespace dien_ops::cpu
