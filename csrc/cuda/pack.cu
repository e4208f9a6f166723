// SPDX-License-Identifier: Apache-2.0
#include "cuda/pack.cuh"

#include "cuda/elements.cuh"

namespace dien_ops::cuda {
namespace {

template <typename Math, typename W>
DIEN_OPS_KERNEL(kElementThreads)
void pack_tiles(gmem<const W> weight, PackedWeight w, PackedOrder order, int64_t numbers, gmem<typename Math::Operand> packed) {
    using T = Accumulator<Math>;
    const int64_t i = element_index();
    if (i >= numbers) return;
    const int n = i % kTileColumns, k = i / kTileColumns % Math::kDepth;
    const int64_t tile = i / kTileNumbers<Math>, gate_tiles = divide_up<int64_t>(w.columns, kTileColumns);
    const int64_t column_tile = tile % order.column_tiles, k_tile = tile / order.column_tiles;
    const int64_t gate = column_tile / gate_tiles, unit_tile = column_tile % gate_tiles;
    const int64_t column = unit_tile * kTileColumns + n, depth = k_tile * Math::kDepth + k;
    T value = 0;
    if (gate < w.gates && column < w.columns && depth < w.depth) {
        value = to_compute(weight.ld(gate * w.gate_stride + column * w.column_stride + depth * w.depth_stride));
    }
    const int64_t place = unit_tile * order.column + k_tile * order.depth + gate * order.gate;
    packed.st(place * kTileNumbers<Math> + Math::position(n, k), Math::operand(value));
}

}  // namespace

template <typename Math, typename W>
void pack(Stream stream, const gmem<const W>& weight, const PackedWeight& w, const PackedOrder& order,
          const gmem<typename Math::Operand>& packed) {
    const int64_t numbers = order.column_tiles * depth_tiles<Math>(w.depth) * kTileNumbers<Math>;
    launch("pack", pack_tiles<Math, W>, element_grid(numbers), stream, weight, w, order, numbers, packed);
}

#define DIEN_OPS_INSTANTIATE_PACK(Math, W)                                                             \
    template void pack<Math, W>(Stream, const gmem<const W>&, const PackedWeight&, const PackedOrder&, \
                                const gmem<Math::Operand>&);
DIEN_OPS_INSTANTIATE_PACK(ExactMath<float>, float)
DIEN_OPS_INSTANTIATE_PACK(ExactMath<double>, double)
DIEN_OPS_INSTANTIATE_PACK(Tf32Math, float)
DIEN_OPS_INSTANTIATE_PACK(HalfMath<BFloat16>, BFloat16)
DIEN_OPS_INSTANTIATE_PACK(HalfMath<BFloat16>, float)
DIEN_OPS_INSTANTIATE_PACK(HalfMath<Half>, Half)
DIEN_OPS_INSTANTIATE_PACK(HalfMath<Half>, float)
#undef DIEN_OPS_INSTANTIATE_PACK

}  // namespace dien_ops::cuda
