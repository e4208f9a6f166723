// SPDX-License-Identifier: Apache-2.0
// A block's memory where it does not fit into shared memory: the same pieces, carved out of global memory.
#pragma once

#include "cuda/primitives.cuh"

namespace dien_ops::cuda {

// Carves a block's part of a workspace in global memory as an Arena does shared memory; of an absent one nothing is taken.
class GlobalArena {
  public:
    DIEN_OPS_DEVICE GlobalArena(const gmem<unsigned char>& workspace, int64_t bytes_per_block)
        : next_(workspace ? workspace.sub(block_index() * bytes_per_block, bytes_per_block).ptr : nullptr) {}
    template <typename T>
    DIEN_OPS_DEVICE gmem<T> take(int n, const char* name) {
        T* const ptr = reinterpret_cast<T*>(next_);
        next_ += arena_bytes<T>(n);
        return gmem<T>(ptr, n, name);
    }

  private:
    unsigned char* next_;
};

// Of the block's two arenas the one in which what does not always fit lies.
template <bool kShared>
DIEN_OPS_DEVICE auto& state_arena([[maybe_unused]] Arena& shared, [[maybe_unused]] GlobalArena& global) {
    if constexpr (kShared) {
        return shared;
    } else {
        return global;
    }
}

}  // namespace dien_ops::cuda
