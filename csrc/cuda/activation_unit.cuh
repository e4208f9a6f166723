// SPDX-License-Identifier: Apache-2.0
// What the unit's forward and backward share: shapes of its layers, a tile's rows and inputs, products and sums over them.
//
// The network's input [q, k, q - k, q * k] is never built. With the first weight split into its four blocks,
//     W [q, k, q - k, q * k] = (W_q + W_d) q + (W_k - W_d) k + W_p (q * k)
// so the first layer takes x = [q, k, q * k], three quarters of the multiplications, and is a layer like the others.
//
// A block takes a tile: some consecutive steps, of whatever sequences, for one target after the other. Its inputs and hidden
// values lie row by row in shared memory, rounded to the operand type, with rows of whole 16 columns and a pad of 16 bytes
// (tile.cuh); columns that stand for nothing are 0. A warp computes items of 16 rows x kItemTiles column tiles. Weights come
// packed from global memory: a call's are small, so that they stay in the L1 cache, and a warp reads a whole tile of them at
// once. No block waits for another, several share a multiprocessor, and while one is busy with gates another multiplies.
//
// Where a tile does not fit into shared memory even at its smallest, it lies in global memory: slow, and never wrong.
#pragma once

#include <algorithm>

#include "cuda/activation_unit.h"
#include "cuda/elements.cuh"
#include "cuda/lengths.cuh"
#include "cuda/workspace.cuh"

namespace dien_ops::cuda {

constexpr int kUnitWarps = 8, kUnitThreads = kUnitWarps * kWarp;
// What a kernel over tiles is compiled for. With matrix units, registers are left for a second block on a multiprocessor;
// without them, a thread needs more.
template <typename Math, bool kShared>
constexpr int kUnitResidentThreads = (Math::kMatrixUnit && kShared ? 2 : 1) * kUnitThreads;
constexpr int kItemTiles = 5;  // column tiles of an item: 80 and 40 columns are whole items

// What a layer needs of each of its columns.
enum UnitColumn { kBias, kAlpha, kMean, kScale, kOutputWeight, kMeanLogitGradient, kPull, kUnitColumns };

DIEN_OPS_HOST_DEVICE constexpr int unit_width(int n) { return round_up(n, 16); }
DIEN_OPS_HOST_DEVICE constexpr int column_tiles(int n) { return divide_up(n, kTileColumns); }
DIEN_OPS_HOST_DEVICE constexpr int item_tiles(int n) { return round_up(column_tiles(n), kItemTiles); }
// The same of the first layer's inputs: of q, k and q * k each.
template <typename Math>
constexpr int kItemTriples = sizeof(Accumulator<Math>) == 8 ? 1 : 2;
template <typename Math>
DIEN_OPS_HOST_DEVICE constexpr int item_triples(int n) {
    return round_up(column_tiles(n), kItemTriples<Math>);
}

template <typename Math>
DIEN_OPS_HOST_DEVICE constexpr int unit_stride(int n) {
    return unit_width(n) + static_cast<int>(16 / sizeof(typename Math::Operand));
}

struct UnitLayer {
    int inputs, outputs;
    int columns;        // where its columns begin in each kind of them
    int row;            // where its outputs' rows begin in a row of all layers
    int kept;           // numbers of a row of its kept values
    int64_t forward;    // where its packed weight begins, for x W^T
    int64_t backward;   // likewise, for g W
    int64_t hidden;     // where its kept values begin
    int64_t gradient;   // where its weight's gradient [outputs, width of inputs] begins in a part
    int64_t statistic;  // where its means begin in the statistics
};

// Sizes, on host and device alike. A unit without hidden layers has one layer without activation: its output layer.
struct UnitShape {
    int64_t batch, targets, steps;
    int dim, layers, hidden_layers;
    int columns;                            // of all layers
    int rows;                               // of a tile
    int first_stride, most_even, most_odd;  // of the input, and of the widest inputs of even and odd layers
    int row;                                // numbers of a row of all layers
    Activation activation;
    bool batch_statistics, softmax;
    bool shared;             // whether a tile lies in shared memory
    int64_t memory_bytes;    // of a tile
    int64_t gradient;        // numbers of a part of all weights' gradients
    int64_t packed, hidden;  // numbers
    int64_t statistics;
    UnitLayer layer[kMostUnitLayers];

    DIEN_OPS_HOST_DEVICE int64_t most_tiles() const { return divide_up<int64_t>(batch * steps, rows); }
};

template <typename Math, typename S>
UnitShape unit_shape(const UnitProblem<S>& p) {
    UnitShape s = {};
    s.batch = p.batch, s.targets = p.targets, s.steps = p.steps;
    s.dim = static_cast<int>(p.embedding_dim);
    s.hidden_layers = static_cast<int>(p.sizes.size());
    s.layers = std::max(s.hidden_layers, 1);
    s.activation = p.activation, s.batch_statistics = p.batch_statistics, s.softmax = p.softmax;
    s.first_stride = unit_stride<Math>(3 * s.dim);
    s.statistics = p.total_size();
    int64_t statistic = 0;
    for (int l = 0; l < s.layers; ++l) {
        UnitLayer& layer = s.layer[l];
        layer.inputs = l == 0 ? 3 * s.dim : s.layer[l - 1].outputs;
        layer.outputs = s.hidden_layers == 0 ? 1 : static_cast<int>(p.sizes[l]);
        constexpr int kKept = kUnitAlignment / sizeof(Accumulator<Math>);
        layer.columns = s.columns, layer.row = s.row, layer.hidden = s.hidden, layer.gradient = s.gradient;
        layer.kept = round_up(layer.outputs, kKept);
        layer.statistic = statistic;
        layer.forward = s.packed;
        s.packed += int64_t(depth_tiles<Math>(layer.inputs)) * item_tiles(layer.outputs) * kTileNumbers<Math>;
        layer.backward = s.packed;
        const int back = l == 0 ? 3 * item_triples<Math>(s.dim) : item_tiles(layer.inputs);
        s.packed += int64_t(depth_tiles<Math>(layer.outputs)) * back * kTileNumbers<Math>;
        s.columns += unit_width(layer.outputs);
        s.row += unit_stride<Math>(layer.outputs);
        s.gradient += int64_t(layer.outputs) * unit_width(layer.inputs);
        if (s.batch_statistics) s.hidden += p.rows() * layer.kept;
        int& most = l % 2 == 0 ? s.most_even : s.most_odd;
        most = std::max(most, unit_stride<Math>(layer.inputs));
        int& next = l % 2 == 0 ? s.most_odd : s.most_even;
        next = std::max(next, unit_stride<Math>(layer.outputs));
        statistic += layer.outputs;
    }
    return s;
}

// A tile's rows by their place in it.
struct UnitRows {
    view<int64_t> place;     // b * T + t, or -1: beyond the last step
    view<int64_t> sequence;  // b

    static int64_t bytes(int rows) { return 2 * arena_bytes<int64_t>(rows); }
    DIEN_OPS_DEVICE UnitRows(Arena& arena, int rows)
        : place(arena.take<int64_t>(rows, "places")), sequence(arena.take<int64_t>(rows, "sequences")) {}
};

// Chooses the rows of a tile: as many as leave room for two blocks on a multiprocessor, else as many as fit. `memory(rows)` are
// the bytes of what may lie in global memory, `fixed(rows)` of what may not.
template <typename Memory, typename Fixed>
void choose_rows(UnitShape& s, const Memory& memory, const Fixed& fixed) {
    constexpr int64_t kOfSystem = 1 << 10;  // taken of every block, and not of the most that one can have
    const int64_t budget = device_limits().shared_bytes_per_block + kOfSystem;
    const auto fits = [&](int rows, int blocks) {
        s.rows = rows, s.memory_bytes = memory(rows);
        return blocks * (s.memory_bytes + fixed(rows) + kOfSystem) <= budget;
    };
    s.shared = fits(64, 2) || fits(32, 2) || fits(32, 1) || fits(16, 1);
}

template <typename Fixed>
int64_t unit_shared_bytes(const UnitShape& s, const Fixed& fixed) {
    return fixed(s.rows) + (s.shared ? s.memory_bytes : 0);
}

// What every kernel over tiles is given.
template <typename S>
struct UnitParams : DeviceSteps {
    using T = Compute<S>;
    UnitShape s;
    gmem<const S> query, keys, packed;
    gmem<const T> columns;  // [kUnitColumns, s.columns]
    gmem<unsigned char> workspace;

    UnitParams(const UnitProblem<S>& p, const UnitShape& shape, int64_t blocks)
        : DeviceSteps(p.numbers, p.batch, p.steps),
          s(shape),
          query(p.query, p.pairs() * p.embedding_dim, "query"),
          keys(p.keys, p.batch * p.steps * p.embedding_dim, "keys"),
          packed(p.packed, shape.packed, "packed weights"),
          columns(p.columns, int64_t(kUnitColumns) * shape.columns, "columns"),
          workspace(p.workspace, shape.shared ? 0 : blocks * shape.memory_bytes, "workspace") {}

    DIEN_OPS_DEVICE int64_t tiles() const { return divide_up<int64_t>(total_steps(), s.rows); }

    // By all threads; the caller waits.
    DIEN_OPS_DEVICE void read_rows(const UnitRows& rows, int64_t tile) const {
        const int64_t end = total_steps();
        for (int i = thread_index(); i < s.rows; i += kUnitThreads) {
            const int64_t step = tile * s.rows + i;
            const int64_t at = step < end ? place(step) : -1;
            rows.place.st(i, at);
            rows.sequence.st(i, at < 0 ? -1 : at / s.steps);
        }
    }
    // Two neighbouring columns of a layer.
    DIEN_OPS_DEVICE Pack<T, 2> column_pair(UnitColumn kind, const UnitLayer& l, int column) const {
        return columns.template ld_as<Pack<T, 2>>(int64_t(kind) * s.columns + l.columns + column);
    }
    // Where a row's kept values of a layer begin.
    DIEN_OPS_DEVICE int64_t kept(const UnitLayer& l, int64_t c, int64_t step) const {
        return l.hidden + (c * s.batch * s.steps + step) * l.kept;
    }
};

// x = [q, k, q * k] of the tile's rows and target c, row by row. By all threads; the caller waits.
template <typename Math, typename Memory>
DIEN_OPS_DEVICE void build_inputs(const UnitParams<typename Math::Storage>& p, const UnitRows& rows, int64_t c,
                                  const Memory& x) {
    using T = Accumulator<Math>;
    const int D = p.s.dim, tail = unit_width(3 * D) - 3 * D;
#pragma unroll 4
    for (int i = thread_index(); i < p.s.rows * D; i += kUnitThreads) {
        const int row = i / D, d = i % D;
        const int64_t place = rows.place.ld(row), pair = rows.sequence.ld(row) * p.s.targets + c;
        const T q = to_compute(p.query.template ld_if<typename Math::Storage>(place >= 0, pair * D + d));
        const T k = to_compute(p.keys.template ld_if<typename Math::Storage>(place >= 0, place * D + d));
        const int at = row * p.s.first_stride + d;
        x.st(at, Math::operand(q)), x.st(at + D, Math::operand(k)), x.st(at + 2 * D, Math::operand(q * k));
    }
    for (int i = thread_index(); i < p.s.rows * tail; i += kUnitThreads) {
        x.st(i / tail * p.s.first_stride + 3 * D + i % tail, Math::operand(0));
    }
}

// Zeros in the columns of rows that no item writes: behind the last column tile.
template <typename Math, typename Memory>
DIEN_OPS_DEVICE void clear_tail(const Memory& to, int first, int stride, int rows, int outputs) {
    const int begin = column_tiles(outputs) * kTileColumns, tail = unit_width(outputs) - begin;
    if (tail == 0) return;
    for (int i = thread_index(); i < rows * tail; i += kUnitThreads) {
        to.st(first + i / tail * stride + begin + i % tail, Math::operand(0));
    }
}

// Calls f(row tile, first column tile, d) for the warp's items of a tile, with d = 0.
template <typename Math, int kTiles, typename F>
DIEN_OPS_DEVICE void for_items(int row_tiles, int tiles, const F& f) {
    const int items = row_tiles * divide_up(tiles, kTiles);
    for (int item = warp_index(); item < items; item += kUnitWarps) {
        Accumulator<Math> d[1][kTiles][4] = {};
        f(item % row_tiles, item / row_tiles * kTiles, d);
    }
}

// Calls f(half, n, row, column) for the pairs of columns, d[n][2 half] and d[n][2 half + 1], that the lane has of an item and
// that are among the first `columns`, rounded up to whole tiles.
template <int kTiles, typename F>
DIEN_OPS_DEVICE void for_lane_pairs(int m, int first_tile, int columns, const F& f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        if ((first_tile + n) * kTileColumns >= columns) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            f(half, n, m * kTileRows + half * 8 + tile_row(), (first_tile + n) * kTileColumns + tile_column());
        }
    }
}

// The sum over the 8 lanes that have the same columns; all of them have it. All lanes call.
template <typename T>
DIEN_OPS_DEVICE T sum_over_rows(T x) {
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

constexpr int kPairThreads = 128, kPairWarps = kPairThreads / kWarp;  // of a block that takes a pair

// A block's maximum or sum: of the warps' values, joined in their order. All threads call; `memory` has a number for each warp.
template <typename T, typename F>
DIEN_OPS_DEVICE T over_block(const view<T>& memory, T of_warp, const F& join) {
    sync_block();
    if (lane_index() == 0) memory.st(warp_index(), of_warp);
    sync_block();
    T result = memory.ld(0);
    for (int i = 1; i < block_warps(); ++i) result = join(result, memory.ld(i));
    return result;
}

// One column's Dice or PReLU.
template <typename T>
struct UnitGate {
    T alpha, mean, scale;
};

template <typename Math, typename T>
DIEN_OPS_DEVICE T activate(Activation activation, bool linear, T z, const UnitGate<T>& g) {
    if (linear) return z;
    if (activation == Activation::sigmoid) return Math::sigmoid(z);
    if (activation == Activation::prelu) return z > 0 ? z : g.alpha * z;
    return dice_value(z, Math::sigmoid(g.scale * (z - g.mean)), g.alpha);
}

// The gates of the lane's two columns.
template <typename S>
struct UnitGates {
    UnitGate<Compute<S>> v[2];

    DIEN_OPS_DEVICE UnitGates(const UnitParams<S>& p, const UnitLayer& l, int column) : v{} {
        if (p.s.activation == Activation::sigmoid) return;
        const auto alpha = p.column_pair(kAlpha, l, column), mean = p.column_pair(kMean, l, column),
                   scale = p.column_pair(kScale, l, column);
#pragma unroll
        for (int i = 0; i < 2; ++i) v[i] = {alpha.v[i], mean.v[i], scale.v[i]};
    }
};

// The activations of a layer's kept values, of the tile's rows and target c, to rows of operands. By all threads; the caller
// waits.
template <typename Math, typename Memory>
DIEN_OPS_DEVICE void load_activations(const UnitParams<typename Math::Storage>& p, const gmem<const Accumulator<Math>>& hidden,
                                      const UnitRows& rows, int64_t tile, int64_t c, int layer, const Memory& to, int first) {
    using T = Accumulator<Math>;
    const UnitLayer& l = p.s.layer[layer];
    const int stride = unit_stride<Math>(l.outputs), half = unit_width(l.outputs) / 2;
    for (int i = thread_index(); i < p.s.rows * half; i += kUnitThreads) {
        const int row = i / half, column = i % half * 2;
        const bool present = rows.place.ld(row) >= 0 && column < l.outputs;
        const int64_t at = p.kept(l, c, tile * p.s.rows + row) + column;
        Pack<typename Math::Operand, 2> y = {Math::operand(0), Math::operand(0)};
        if (present) {
            const auto z = hidden.template ld_as<Pack<T, 2>>(at);
            const UnitGates<typename Math::Storage> gates(p, l, column);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (column + j < l.outputs) y.v[j] = Math::operand(activate<Math>(p.s.activation, false, z.v[j], gates.v[j]));
            }
        }
        to.st_as(first + row * stride + column, y);
    }
}

// Packs weights and fills columns for the forward, and for the backward where that is asked for: unit_forward.cu.
template <typename Math, typename S>
void unit_prepare(Stream stream, const UnitProblem<S>& p, const UnitShape& s, bool backward,
                  const std::vector<const Compute<S>*>& means, const std::vector<const Compute<S>*>& vars,
                  Compute<S>* statistics);

}  // namespace dien_ops::cuda
