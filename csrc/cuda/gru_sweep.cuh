// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward sweep share: which rows a block has, where its memory lies, and the step's addresses.
//
// A block takes a tile of rows through all their steps alone: rows are independent, so no block waits for another, and the
// state stays where it is. Rows come in the order of the plan, longest first, so that the rows of a tile end together.
//
// The recurrent weights lie packed in tiles (tile.cuh). As many as fit stay in shared memory for all steps; what does not fit
// is read from global memory (that is, from the L2 cache) in every step: for each column the first tiles of k are resident, so
// that all warps have the same share of the slow ones. Where even the state is too large for shared memory (H in the
// thousands), it lies in a workspace in global memory: slow, and never wrong.
//
// A warp owns column tiles of 8 units: it computes all gates of these units, and only its lanes read and write their states.
#pragma once

#include "common/gates.h"
#include "cuda/gru.h"
#include "cuda/launch.cuh"
#include "cuda/lengths.cuh"
#include "cuda/tile.cuh"
#include "cuda/workspace.cuh"

namespace dien_ops::cuda {

// Warps of a block, at most: as many registers as a thread needs must be left to it.
template <typename Math>
constexpr int kMaxWarps = Math::kMatrixUnit ? 16 : 8;

// The plan of gru.h on the device.
struct DevicePlan : DeviceSteps {
    gmem<const int64_t> order;
    int64_t targets;
    bool reverse;

    explicit DevicePlan(const GruPlan& plan, int64_t batch, int64_t targets, int64_t steps, bool reverse)
        : DeviceSteps(plan, batch, steps), order(plan.order, batch, "order"), targets(targets), reverse(reverse) {}
    template <typename S>
    explicit DevicePlan(const GruProblem<S>& p) : DevicePlan(p.plan, p.batch, p.targets, p.steps, p.reverse) {}

    DIEN_OPS_DEVICE int64_t sequence(int64_t position) const { return order ? order.ld(position) : position; }
};

// The weights that stay on the chip, and sizes that follow from H, in numbers where no name says bytes.
struct SweepLayout {
    int hidden, units;      // H, and H in whole column tiles
    int unit_tiles, warps;  // column tiles, and warps that share them
    int tiles, resident;    // tiles of k of a unit tile, and how many of them stay in shared memory
    int stride;             // from row to row of the operands
    int row_tiles;
    bool state_shared;
    int64_t shared_bytes;     // of the block
    int64_t workspace_bytes;  // of the block
};

// Rows of the tile, by their place in it.
struct TileRows {
    view<int> length;
    view<int64_t> index;   // the row; of no use where length is -1: beyond the last row
    view<int64_t> step;    // its sequence's first step
    view<int64_t> entry;   // its first entry
    view<int64_t> output;  // offsets at t = 0
    view<int64_t> attention;

    static int64_t bytes(int rows) { return arena_bytes<int>(rows) + 5 * arena_bytes<int64_t>(rows); }

    DIEN_OPS_DEVICE TileRows(Arena& arena, int rows)
        : length(arena.take<int>(rows, "row lengths")),
          index(arena.take<int64_t>(rows, "row indices")),
          step(arena.take<int64_t>(rows, "row steps")),
          entry(arena.take<int64_t>(rows, "row entries")),
          output(arena.take<int64_t>(rows, "row outputs")),
          attention(arena.take<int64_t>(rows, "row attention")) {}

    // By the first threads of the block; the caller waits for them.
    DIEN_OPS_DEVICE void read(const DevicePlan& plan, const Strides& output_strides, const Strides& attention_strides,
                              int rows) const {
        for (int i = thread_index(); i < rows; i += block_threads()) {
            const int64_t position = block_index() * rows + i;
            const bool present = position < plan.batch * plan.targets;
            const int64_t b = present ? plan.sequence(position / plan.targets) : 0, c = present ? position % plan.targets : 0;
            const int64_t steps = present ? plan.length(b) : 0, first = present ? plan.first_step(b) : 0;
            length.st(i, present ? static_cast<int>(steps) : -1);
            index.st(i, b * plan.targets + c);
            step.st(i, first);
            entry.st(i, plan.targets * first + c * steps);
            output.st(i, b * output_strides.b + c * output_strides.c);
            attention.st(i, b * attention_strides.b + c * attention_strides.c);
        }
    }
    // The steps of the tile's longest row, which comes first.
    DIEN_OPS_DEVICE int steps() const { return length.ld(0); }
};

// The time index of a row's s-th step.
DIEN_OPS_DEVICE int time_of(bool reverse, int length, int s) { return reverse ? length - 1 - s : s; }

// Stores an entry's gates, from gate `first` on: of each the lane's two units, the first of which is `unit`.
template <typename S, typename... Pairs>
DIEN_OPS_DEVICE void store_gates(const gmem<S>& to, int64_t entry, int64_t gates_size, int hidden, int first, int unit,
                                 bool paired, const Pairs&... gates) {
    int64_t i = entry * gates_size + int64_t(first) * hidden + unit;
    ((store_pair(to, i, pair_count(unit, hidden), paired, gates), i += hidden), ...);
}

// Copies the resident tiles of k of every unit tile; `per_tile` column tiles of a unit tile lie side by side. The caller waits.
template <typename Math>
DIEN_OPS_DEVICE void load_resident(const view<typename Math::Operand>& to, const gmem<const typename Math::Operand>& from,
                                   const SweepLayout& l, int per_tile) {
    constexpr int kChunk = 16 / sizeof(typename Math::Operand);
    const int chunks = l.resident * per_tile * (kTileNumbers<Math> / kChunk);
    for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
        const int64_t source = int64_t(u) * l.tiles * per_tile * kTileNumbers<Math>;
        for (int i = lane_index(); i < chunks; i += 32) {
            copy_async16(to, (u * chunks + i) * kChunk, from, source + i * kChunk);
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// d += A B over tiles [begin, end) of k of one unit tile's columns first..first + kColumns - 1 (of per_tile), from wherever
// they are.
template <typename Math, int kRowTiles, int kColumns, typename Memory>
DIEN_OPS_DEVICE void multiply_unit(Accumulator<Math> (&d)[kRowTiles][kColumns][4], const Memory& state,
                                   const view<typename Math::Operand>& resident,
                                   const gmem<const typename Math::Operand>& packed, const SweepLayout& l, int unit_tile,
                                   int per_tile, int first, int begin, int end) {
    const int on_chip = end < l.resident ? end : l.resident;
    multiply_tiles<Math>(d, state, 0, l.stride, resident, unit_tile * l.resident * per_tile + first, per_tile, begin, on_chip);
    multiply_tiles<Math>(d, state, 0, l.stride, packed, int64_t(unit_tile) * l.tiles * per_tile + first, per_tile,
                         begin > on_chip ? begin : on_chip, end);
}

template <typename T>
DIEN_OPS_DEVICE T keep_weight(Gate gate, T z, T a) {
    switch (gate) {
        case Gate::replace:
            return dien_ops::keep_weight<Gate::replace>(z, a);
        case Gate::paper:
            return dien_ops::keep_weight<Gate::paper>(z, a);
        case Gate::authors:
            return dien_ops::keep_weight<Gate::authors>(z, a);
        default:
            return dien_ops::keep_weight<Gate::none>(z, a);
    }
}

template <typename T>
DIEN_OPS_DEVICE KeepGradient<T> keep_gradient(Gate gate, T dk, T z, T a) {
    switch (gate) {
        case Gate::replace:
            return dien_ops::keep_gradient<Gate::replace>(dk, z, a);
        case Gate::paper:
            return dien_ops::keep_gradient<Gate::paper>(dk, z, a);
        case Gate::authors:
            return dien_ops::keep_gradient<Gate::authors>(dk, z, a);
        default:
            return dien_ops::keep_gradient<Gate::none>(dk, z, a);
    }
}

// Chooses where the state lies, how many rows a block takes and how many weights stay. `state(row_tiles)` and
// `fixed(row_tiles)` are the bytes of the state and of what must be in shared memory; tile_bytes those of one tile of k of all
// unit tiles.
template <typename Math, typename State, typename Fixed>
SweepLayout sweep_layout(int64_t hidden, int64_t rows, int tiles, int64_t tile_bytes, const State& state, const Fixed& fixed) {
    const DeviceLimits device = device_limits();
    SweepLayout l = {};
    l.hidden = static_cast<int>(hidden);
    l.units = static_cast<int>(round_up<int64_t>(hidden, kTileColumns));
    l.unit_tiles = l.units / kTileColumns;
    l.warps = l.unit_tiles == 0 ? 1 : divide_up(l.unit_tiles, divide_up(l.unit_tiles, kMaxWarps<Math>));
    l.tiles = tiles;
    // Two row tiles share every load of the weights; they pay once there are more rows than the chip has blocks of one, and
    // while half of the weights stay.
    l.row_tiles = Math::kMatrixUnit && rows > int64_t(kTileRows) * device.multiprocessors ? 2 : 1;
    const int64_t budget = device.shared_bytes_per_block;
    if (l.row_tiles == 2 && fixed(2) + state(2) + tile_bytes * tiles / 2 > budget) l.row_tiles = 1;
    l.state_shared = fixed(l.row_tiles) + state(l.row_tiles) <= budget;
    if (!l.state_shared) l.row_tiles = 1;
    int64_t left = budget - fixed(l.row_tiles) - (l.state_shared ? state(l.row_tiles) : 0);
    l.resident = tile_bytes == 0 ? tiles : static_cast<int>(left / tile_bytes < tiles ? left / tile_bytes : tiles);
    if (l.resident < 0) l.resident = 0;
    l.shared_bytes = budget - left + l.resident * tile_bytes;
    l.workspace_bytes = l.state_shared ? 0 : state(l.row_tiles);
    return l;
}

template <typename S>
int64_t sweep_blocks(const GruProblem<S>& p, const SweepLayout& l) {
    return divide_up<int64_t>(p.rows(), l.row_tiles * kTileRows);
}

template <typename S>
int64_t workspace_bytes(const GruProblem<S>& p, const SweepLayout& l) {
    return sweep_blocks(p, l) * l.workspace_bytes;
}

// What both kernels are given.
template <typename S>
struct SweepParams {
    DevicePlan plan;
    SweepLayout layout;
    Gate gate;
    Strides output_strides, attention_strides;
    int64_t gates_size;
    gmem<const S> attention, hx, packed;
    gmem<const Compute<S>> projected;  // [E, 3, units]
    gmem<unsigned char> workspace;

    template <typename Sweep>  // GruForward or GruBackward
    SweepParams(const Sweep& p, const SweepLayout& l)
        : plan(p),
          layout(l),
          gate(p.gate),
          output_strides(p.output_strides),
          attention_strides(p.attention_strides),
          gates_size(p.gates_size()),
          attention(p.attention, p.rows() * p.steps, "attention"),
          hx(p.hx, p.rows() * p.hidden_size, "hx"),
          packed(p.packed, gru_packed_size<S>(p), "packed weight_hh"),
          projected(p.projected, p.batch * p.steps * gru_projection_width(p.hidden_size), "projected"),
          workspace(p.workspace, workspace_bytes(p, l), "workspace") {}
};

// to [rows, H] = the rows' exact state, after the last step.
template <typename S, typename Memory>
DIEN_OPS_DEVICE void store_exact(const gmem<S>& to, const TileRows& rows, int tile_rows, const Memory& exact,
                                 const SweepLayout& l) {
    for (int i = thread_index(); i < tile_rows * l.hidden; i += block_threads()) {
        const int row = i / l.hidden, unit = i % l.hidden;
        if (rows.length.ld(row) < 0) continue;
        to.st(rows.index.ld(row) * l.hidden + unit, to_storage<S>(exact.ld(row * l.units + unit)));
    }
}

// Calls f(row_tiles, state_shared) with the layout's as constants.
template <typename Math, typename F>
void with_layout(const SweepLayout& l, F&& f) {
    if constexpr (Math::kMatrixUnit) {
        if (l.row_tiles == 2) return f(std::integral_constant<int, 2>{}, std::true_type{});
    }
    if (l.state_shared) return f(std::integral_constant<int, 1>{}, std::true_type{});
    f(std::integral_constant<int, 1>{}, std::false_type{});
}

inline GruResidence residence_of(const SweepLayout& l) {
    return {l.tiles == 0 ? 1.0 : double(l.resident) / l.tiles, l.state_shared};
}

}  // namespace dien_ops::cuda
