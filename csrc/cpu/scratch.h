// SPDX-License-Identifier: Apache-2.0
// Memory that a kernel needs for the time of one call. Not std::vector: its inline code, compiled for one instruction set,
// could be linked into code that runs on another.
#pragma once

#include <cstdint>
#include <cstdlib>
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

}  // namespace
}  // namespace dien_ops::cpu
