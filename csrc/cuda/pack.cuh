// SPDX-License-Identifier: Apache-2.0
// Weights packed for tile.cuh's products.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace dien_ops::cuda {

// B from a weight of `gates` matrices: number (k, n) of gate g is weight[g * gate_stride + n * column_stride + k *
// depth_stride].
struct PackedWeight {
    int64_t gates, columns, depth;  // depth: the k of one gate
    int64_t gate_stride, column_stride, depth_stride;
};

// Where tile (k tile, column tile) of a gate lies, in tiles. column_tiles: of all gates together; more than they have are
// zeros.
struct PackedOrder {
    int64_t column, depth, gate;
    int64_t column_tiles;
};

// W: what the weight is stored in.
template <typename Math, typename W>
void pack(Stream stream, const gmem<const W>& weight, const PackedWeight& w, const PackedOrder& order,
          const gmem<typename Math::Operand>& packed);

}  // namespace dien_ops::cuda
