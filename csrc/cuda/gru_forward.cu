// SPDX-License-Identifier: Apache-2.0
// The forward sweep (DIEN eq. 2-5 and 9-12): one launch runs a block's rows through all their steps.
//
// A step is one product, h [rows, H] with U [H, 3H], and the gates of what comes out. The product takes h rounded to the
// operand type from the block's memory, where every warp reads all of it; the state itself stays in full precision with the
// lanes that own it. h is kept twice: a step reads one and writes the other, so that one barrier a step is enough. W x of the
// next step is on its way from global memory while the product runs: every lane loads what it will need, and needs no barrier
// for it.
//
// Where the reset gate comes before the product, the candidate's product waits for r h: a step has two halves and a barrier in
// each.
#include "cuda/gru_sweep.cuh"
#include "cuda/pack.cuh"

namespace dien_ops::cuda {
namespace {

template <typename S>
struct ForwardParams : SweepParams<S> {
    gmem<const S> bias_ih, bias_hh;
    gmem<S> states, h_n, gates;

    ForwardParams(const GruForward<S>& p, const SweepLayout& l)
        : SweepParams<S>(p, l),
          bias_ih(p.bias_ih, 3 * p.hidden_size, "bias_ih"),
          bias_hh(p.bias_hh, 3 * p.hidden_size, "bias_hh"),
          states(p.states, p.rows() * p.steps * p.hidden_size, "output"),
          h_n(p.h_n, p.rows() * p.hidden_size, "h_n"),
          gates(p.gates, p.rows() * p.steps * p.gates_size(), "gates") {}
};

// The forward's bytes, as its kernel takes them.
template <typename Math>
SweepLayout forward_layout(int64_t hidden, int64_t rows, bool reset_after) {
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    const int tiles = depth_tiles<Math>(hidden);
    const int64_t units = round_up<int64_t>(hidden, kTileColumns);
    const auto state = [&](int row_tiles) {
        const int64_t n = int64_t(row_tiles) * kTileRows;
        return 2 * arena_bytes<Operand>(n * padded_stride<Math>(tiles)) + (reset_after ? 1 : 2) * arena_bytes<T>(n * units) +
               arena_bytes<T>(4 * units);
    };
    const auto fixed = [](int row_tiles) { return TileRows::bytes(row_tiles * kTileRows); };
    const int64_t tile_bytes = units / kTileColumns * 3 * kTileNumbers<Math> * sizeof(Operand);
    SweepLayout l = sweep_layout<Math>(hidden, rows, tiles, tile_bytes, state, fixed);
    l.stride = padded_stride<Math>(tiles);
    return l;
}

enum Bias { kBiasR, kBiasZ, kBiasN, kBiasHN };  // r, z: both biases; HN: that of U_n h, which r scales

template <typename Math, int kRowTiles, bool kStateShared, bool kResetAfter>
DIEN_OPS_KERNEL(kMaxWarps<Math> * 32)
void forward_sweep(ForwardParams<typename Math::Storage> p) {
    using S = typename Math::Storage;
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    constexpr int kRows = kRowTiles * kTileRows;
    const SweepLayout& l = p.layout;
    const int hidden = l.hidden, units = l.units;
    const bool paired = hidden % 2 == 0;  // two units are one access

    Arena arena;
    GlobalArena workspace(p.workspace, l.workspace_bytes);
    const TileRows rows(arena, kRows);
    const auto weights = arena.take<Operand>(l.unit_tiles * l.resident * 3 * kTileNumbers<Math>, "weights");
    auto& memory = state_arena<kStateShared>(arena, workspace);
    const auto state = memory.template take<Operand>(kRows * l.stride, "h");
    // the other copy of h or, where the reset comes before the product, r h
    const auto other = memory.template take<Operand>(kRows * l.stride, kResetAfter ? "next h" : "r h");
    const auto exact = memory.template take<T>(kRows * units, "exact h");  // each number is its owner's alone, in all steps
    const auto update = memory.template take<T>(kResetAfter ? 0 : kRows * units, "z");
    const auto bias = memory.template take<T>(4 * units, "biases");

    rows.read(p.plan, p.output_strides, p.attention_strides, kRows);
    for (int i = thread_index(); i < units; i += block_threads()) {
        const auto of = [&](const gmem<const S>& b, int gate) {
            return b && i < hidden ? to_compute(b.ld(int64_t(gate) * hidden + i)) : T(0);
        };
        bias.st(kBiasR * units + i, of(p.bias_ih, 0) + of(p.bias_hh, 0));
        bias.st(kBiasZ * units + i, of(p.bias_ih, 1) + of(p.bias_hh, 1));
        bias.st(kBiasN * units + i, of(p.bias_ih, 2));
        bias.st(kBiasHN * units + i, of(p.bias_hh, 2));
    }
    load_resident<Math>(weights, p.packed, l, 3);
    sync_block();

    // The columns behind H are 0, and stay so.
    const int depth = l.tiles * Math::kDepth, wide = depth > units ? depth : units;
    for (int i = thread_index(); i < kRows * wide; i += block_threads()) {
        const int row = i / wide, unit = i % wide;
        const bool present = p.hx && unit < hidden && rows.length.ld(row) >= 0;
        const T h = present ? to_compute(p.hx.ld(rows.index.ld(row) * hidden + unit)) : T(0);
        if (unit < units) exact.st(row * units + unit, h);
        if (unit < depth) {
            state.st(row * l.stride + unit, Math::operand(h));
            other.st(row * l.stride + unit, Math::operand(T(0)));
        }
    }
    sync_block();

    const int steps = rows.steps();
    const auto valid = [&](int row, int s) { return s < rows.length.ld(row); };

    // W x of the lane's units, and the scores.
    struct Fetched {
        LoadedPair<T> x[kRowTiles][2][3];
        S a[kRowTiles][2];
    };
    const auto fetch = [&](int s, int u, int first_gate, int gates) {
        Fetched f = {};
        for_lane_rows<kRowTiles>([&](int m, int half, int row) {
            const int t = time_of(p.plan.reverse, rows.length.ld(row), s);
            const bool here = valid(row, s);
            const int64_t x = (rows.step.ld(row) + t) * 3 * units + u * kTileColumns + tile_column();
            for (int g = first_gate; g < first_gate + gates; ++g) {
                f.x[m][half][g] = p.projected.template ld_if<LoadedPair<T>>(here, x + g * units);
            }
            const int64_t score = rows.attention.ld(row) + t * p.attention_strides.t;
            f.a[m][half] = p.attention.template ld_if<S>(here && p.gate != Gate::none, score);
        });
        return f;
    };

    // Gates of the lane's two units of a row, from gate `first` on, for the backward.
    const auto save = [&](int row, int s, int u, int first, const auto&... gates) {
        if (!p.gates) return;
        const int64_t entry = rows.entry.ld(row) + time_of(p.plan.reverse, rows.length.ld(row), s);
        store_gates(p.gates, entry, p.gates_size, hidden, first, u * kTileColumns + tile_column(), paired, gates...);
    };
    // Their h' = n + k (h - n).
    const auto finish = [&](int row, int s, int u, const auto& to, T a, Pack<T, 2> z, Pack<T, 2> n) {
        const int unit = u * kTileColumns + tile_column(), t = time_of(p.plan.reverse, rows.length.ld(row), s);
        Pack<T, 2> h = exact.template ld_as<Pack<T, 2>>(row * units + unit);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (unit + j < hidden) h.v[j] = n.v[j] + keep_weight(p.gate, z.v[j], a) * (h.v[j] - n.v[j]);
            if (unit + j < depth) to.st(row * l.stride + unit + j, Math::operand(h.v[j]));
        }
        exact.st_as(row * units + unit, h);
        store_pair(p.states, rows.output.ld(row) + t * p.output_strides.t + unit, pair_count(unit, hidden), paired, h);
    };
    const auto bias_of = [&](Bias which, int u) {
        return bias.template ld_as<Pack<T, 2>>(which * units + u * kTileColumns + tile_column());
    };

    if constexpr (kResetAfter) {
        auto from = state, to = other;
        Fetched now = {};
        if (warp_index() < l.unit_tiles) now = fetch(0, warp_index(), 0, 3);
        for (int s = 0; s < steps; ++s) {
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
                // W x and the biases go into r's and z's sums before the product, which frees registers for the next step's.
                const Pack<T, 2> b_r = bias_of(kBiasR, u), b_z = bias_of(kBiasZ, u), b_n = bias_of(kBiasN, u);
                T d[kRowTiles][3][4] = {};
                Pack<T, 2> x_n[kRowTiles][2];
                T a[kRowTiles][2];
                for_lane_rows<kRowTiles>([&](int m, int half, int) {
                    const auto& x = now.x[m][half];
                    const Pack<T, 2> of_r = unpack<T>(x[0]), of_z = unpack<T>(x[1]), of_n = unpack<T>(x[2]);
                    a[m][half] = to_compute(keep_whole(now.a[m][half]));
                    const T scale = p.gate == Gate::input ? a[m][half] : T(1);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        d[m][0][half * 2 + j] = scale * of_r.v[j] + b_r.v[j];
                        d[m][1][half * 2 + j] = scale * of_z.v[j] + b_z.v[j];
                        x_n[m][half].v[j] = scale * of_n.v[j] + b_n.v[j];
                    }
                });
                // One call: a choice between two would wait for what they load, to move it to one place.
                const bool last = u + block_warps() >= l.unit_tiles;
                now = fetch(last ? s + 1 : s, last ? warp_index() : u + block_warps(), 0, 3);

                multiply_unit<Math>(d, from, weights, p.packed, l, u, 3, 0, 0, l.tiles);

                const Pack<T, 2> b_hn = bias_of(kBiasHN, u);
                for_lane_rows<kRowTiles>([&](int m, int half, int row) {
                    if (!valid(row, s)) return;
                    Pack<T, 2> r, z, n, hn;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        r.v[j] = Math::sigmoid(d[m][0][half * 2 + j]);
                        z.v[j] = Math::sigmoid(d[m][1][half * 2 + j]);
                        hn.v[j] = d[m][2][half * 2 + j] + b_hn.v[j];
                        n.v[j] = Math::tanh(x_n[m][half].v[j] + r.v[j] * hn.v[j]);
                    }
                    save(row, s, u, 0, r, z, n, hn);
                    finish(row, s, u, to, a[m][half], z, n);
                });
            }
            sync_block();
            const auto swapped = from;
            from = to;
            to = swapped;
        }
    } else {
        for (int s = 0; s < steps; ++s) {
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
                const Fetched x = fetch(s, u, 0, 2);
                T d[kRowTiles][2][4] = {};
                multiply_unit<Math>(d, state, weights, p.packed, l, u, 3, 0, 0, l.tiles);
                const Pack<T, 2> b_r = bias_of(kBiasR, u), b_z = bias_of(kBiasZ, u);
                const int unit = u * kTileColumns + tile_column();
                for_lane_rows<kRowTiles>([&](int m, int half, int row) {
                    if (!valid(row, s)) return;
                    const T scale = p.gate == Gate::input ? to_compute(x.a[m][half]) : T(1);
                    const Pack<T, 2> h = exact.template ld_as<Pack<T, 2>>(row * units + unit);
                    const Pack<T, 2> of_r = unpack<T>(x.x[m][half][0]), of_z = unpack<T>(x.x[m][half][1]);
                    Pack<T, 2> r, z;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        r.v[j] = Math::sigmoid(scale * of_r.v[j] + b_r.v[j] + d[m][0][half * 2 + j]);
                        z.v[j] = Math::sigmoid(scale * of_z.v[j] + b_z.v[j] + d[m][1][half * 2 + j]);
                        if (unit + j < hidden) other.st(row * l.stride + unit + j, Math::operand(r.v[j] * h.v[j]));
                    }
                    update.st_as(row * units + unit, z);
                    save(row, s, u, 0, r, z);
                });
            }
            sync_block();
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
                const Fetched x = fetch(s, u, 2, 1);
                T d[kRowTiles][1][4] = {};
                multiply_unit<Math>(d, other, weights, p.packed, l, u, 3, 2, 0, l.tiles);
                const Pack<T, 2> b_n = bias_of(kBiasN, u), b_hn = bias_of(kBiasHN, u);
                for_lane_rows<kRowTiles>([&](int m, int half, int row) {
                    if (!valid(row, s)) return;
                    const T a = to_compute(x.a[m][half]), scale = p.gate == Gate::input ? a : T(1);
                    const Pack<T, 2> of_n = unpack<T>(x.x[m][half][2]);
                    Pack<T, 2> n;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        n.v[j] = Math::tanh(scale * of_n.v[j] + b_n.v[j] + (d[m][0][half * 2 + j] + b_hn.v[j]));
                    }
                    save(row, s, u, 2, n);
                    finish(row, s, u, state, a,
                           update.template ld_as<Pack<T, 2>>(row * units + u * kTileColumns + tile_column()), n);
                });
            }
            sync_block();
        }
    }

    store_exact(p.h_n, rows, kRows, exact, l);
}

}  // namespace

template <typename S>
GruResidence gru_forward_residence(int64_t hidden_size, bool reset_after, bool tf32) {
    GruResidence residence;
    with_math<S>(tf32,
                 [&](auto math) { residence = residence_of(forward_layout<decltype(math)>(hidden_size, 1, reset_after)); });
    return residence;
}

template <typename S>
int64_t gru_forward_workspace(const GruProblem<S>& p) {
    int64_t bytes = 0;
    with_math<S>(p.tf32, [&](auto math) {
        const SweepLayout l = forward_layout<decltype(math)>(p.hidden_size, p.rows(), p.reset_after);
        bytes = workspace_bytes(p, l);
    });
    return bytes;
}

template <typename S>
void gru_forward(Stream stream, const GruForward<S>& p) {
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const SweepLayout l = forward_layout<Math>(p.hidden_size, p.rows(), p.reset_after);
        const int64_t H = p.hidden_size;
        // A column is a unit of a gate, k runs over h; the gates of a unit tile side by side for every tile of k.
        pack<Math, S>(stream, {p.weight_hh, 3 * H * H, "weight_hh"}, {3, H, H, H * H, H, 1},
                      {3 * l.tiles, 3, 1, 3 * l.unit_tiles}, {p.packed, gru_packed_size(p), "packed weight_hh"});
        const Grid grid = {sweep_blocks(p, l), 1, 1, 32 * l.warps, l.shared_bytes};
        with_layout<Math>(l, [&](auto row_tiles, auto state_shared) {
            with_constant(p.reset_after, [&](auto reset_after) {
                launch("gru_forward", forward_sweep<Math, row_tiles(), state_shared(), reset_after()>, grid, stream,
                       ForwardParams<S>(p, l));
            });
        });
    });
}

#define DIEN_OPS_INSTANTIATE(S)                                          \
    template GruResidence gru_forward_residence<S>(int64_t, bool, bool); \
    template int64_t gru_forward_workspace<S>(const GruProblem<S>&);     \
    template void gru_forward<S>(Stream, const GruForward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)

}  // namespace dien_ops::cuda
