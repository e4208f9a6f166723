// SPDX-License-Identifier: Apache-2.0
// The backward sweep: the gradients of h' = n + k (h - n) (common/gates.h), from a row's last step to its first, in one launch.
//
// In a step every lane turns dh', the gradient of its units' new state, into those of r, z, n before their activation, and
// leaves them, rounded to the operand type, in the block's memory. Then one product of all gates' gradients [rows, 3H] with
// U [3H, H] gives what flows on to h, to which the lane adds dh' k. dh stays in full precision with the lanes that own it. Two
// barriers: the gradients are there; the gradients are read. What the next step needs of global memory is on its way meanwhile.
//
// Where the reset gate comes before the product, r's gradient waits for that of r h: one product with U_n, then one with U_r
// and U_z.
//
// The gradient of a score is a sum over units: over the lanes of a warp by shuffles, over warps through shared memory, always
// in the same order.
#include <algorithm>
#include <iterator>

#include "cuda/gru_sweep.cuh"
#include "cuda/pack.cuh"

namespace dien_ops::cuda {
namespace {

template <typename S>
struct BackwardParams : SweepParams<S> {
    gmem<const S> output, gates, grad_output, grad_h_n;
    gmem<S> grad_gates, grad_attention, grad_hx;

    BackwardParams(const GruBackward<S>& p, const SweepLayout& l)
        : SweepParams<S>(p, l),
          output(p.output, p.rows() * p.steps * p.hidden_size, "output"),
          gates(p.gates, p.rows() * p.steps * p.gates_size(), "gates"),
          grad_output(p.grad_output, p.rows() * p.steps * p.hidden_size, "grad_output"),
          grad_h_n(p.grad_h_n, p.rows() * p.hidden_size, "grad_h_n"),
          grad_gates(p.grad_gates, p.rows() * p.steps * p.gates_size(), "grad_gates"),
          grad_attention(p.grad_attention, p.rows() * p.steps, "grad_attention"),
          grad_hx(p.grad_hx, p.rows() * p.hidden_size, "grad_hx") {}
};

template <typename Math>
SweepLayout backward_layout(int64_t hidden, int64_t rows) {
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    const int tiles = 3 * depth_tiles<Math>(hidden);
    const int64_t units = round_up<int64_t>(hidden, kTileColumns);
    const auto state = [&](int row_tiles) {
        const int64_t n = int64_t(row_tiles) * kTileRows;
        return arena_bytes<Operand>(n * padded_stride<Math>(tiles)) + arena_bytes<T>(n * units);
    };
    const auto fixed = [&](int row_tiles) {
        return TileRows::bytes(row_tiles * kTileRows) + arena_bytes<T>(row_tiles * kTileRows * kMaxWarps<Math>);
    };
    const int64_t tile_bytes = units / kTileColumns * kTileNumbers<Math> * sizeof(Operand);
    SweepLayout l = sweep_layout<Math>(hidden, rows, tiles, tile_bytes, state, fixed);
    l.stride = padded_stride<Math>(tiles);
    return l;
}

// kPaired: H is even and everything that is read aligned, so that two units are one access. A choice in the loop would make it
// wait for what it loads ahead.
template <typename Math, int kRowTiles, bool kStateShared, bool kResetAfter, bool kPaired>
DIEN_OPS_KERNEL(kMaxWarps<Math> * 32)
void backward_sweep(BackwardParams<typename Math::Storage> p) {
    using S = typename Math::Storage;
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    constexpr int kRows = kRowTiles * kTileRows;
    const SweepLayout& l = p.layout;
    const int hidden = l.hidden, units = l.units;
    const int gate_tiles = l.tiles / 3, depth = gate_tiles * Math::kDepth;  // of one gate

    Arena arena;
    GlobalArena workspace(p.workspace, l.workspace_bytes);
    const TileRows rows(arena, kRows);
    const auto scores = arena.take<T>(kRows * kMaxWarps<Math>, "gradients of scores");  // [rows, warps]
    const auto weights = arena.take<Operand>(l.unit_tiles * l.resident * kTileNumbers<Math>, "weights");
    auto& memory = state_arena<kStateShared>(arena, workspace);
    const auto grads = memory.template take<Operand>(kRows * l.stride, "gradients of gates");  // r, z, n: `depth` columns each
    const auto exact = memory.template take<T>(kRows * units, "dh");  // each number is its owner's alone, in all steps

    rows.read(p.plan, p.output_strides, p.attention_strides, kRows);
    load_resident<Math>(weights, p.packed, l, 1);
    sync_block();

    // The columns behind H are 0, and stay so; rows that have ended keep what they had, and nobody looks at it.
    for (int i = thread_index(); i < kRows * l.stride; i += block_threads()) grads.st(i, Math::operand(T(0)));
    for (int i = thread_index(); i < kRows * units; i += block_threads()) {
        const int row = i / units, unit = i % units;
        const bool present = p.grad_h_n && unit < hidden && rows.length.ld(row) >= 0;
        exact.st(i, present ? to_compute(p.grad_h_n.ld(rows.index.ld(row) * hidden + unit)) : T(0));
    }
    sync_block();

    const int steps = rows.steps();
    const auto valid = [&](int row, int s) { return s >= 0 && s < rows.length.ld(row); };
    const auto time = [&](int row, int s) { return time_of(p.plan.reverse, rows.length.ld(row), s); };

    // What a lane needs of one row's step.
    struct Step {
        LoadedPair<S> r, z, n, hn, h, grad;  // h: the state before the step; grad: of the output
        S a;
    };
    const auto load = [&](int row, int s, int u) {
        const bool here = valid(row, s);
        const int unit = u * kTileColumns + tile_column(), count = here ? pair_count(unit, hidden) : 0, t = time(row, s);
        const int64_t output = rows.output.ld(row) + unit, attention = rows.attention.ld(row) + t * p.attention_strides.t;
        const gmem<const S> before = s > 0 ? p.output : p.hx;
        const int64_t from = s > 0 ? output + time(row, s - 1) * p.output_strides.t : rows.index.ld(row) * hidden + unit;
        int64_t gate = (rows.entry.ld(row) + t) * p.gates_size + unit;
        Step v = {};
        v.r = load_pair(p.gates, gate, count, kPaired);
        v.z = load_pair(p.gates, gate += hidden, count, kPaired);
        v.n = load_pair(p.gates, gate += hidden, count, kPaired);
        if constexpr (kResetAfter) v.hn = load_pair(p.gates, gate += hidden, count, kPaired);
        v.h = load_pair(before, from, before ? count : 0, kPaired);
        v.grad = load_pair(p.grad_output, output + t * p.output_strides.t, p.grad_output ? count : 0, kPaired);
        v.a = p.attention.template ld_if<S>(here && p.gate != Gate::none, attention);
        return v;
    };
    // Leaves a gate's gradient for the product, as column `gate`.
    const auto leave = [&](int row, int u, int gate, Pack<T, 2> grad) {
        const int unit = u * kTileColumns + tile_column();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (unit + j < hidden) grads.st(row * l.stride + gate * depth + unit + j, Math::operand(grad.v[j]));
        }
    };
    // Leaves gradients, from gate `first` on, for what comes after the sweep.
    const auto save = [&](int row, int s, int u, int first, const auto&... gates) {
        const int64_t entry = rows.entry.ld(row) + time(row, s);
        store_gates(p.grad_gates, entry, p.gates_size, hidden, first, u * kTileColumns + tile_column(), kPaired, gates...);
    };
    // Where attention scales W x: its gradient from that of one gate.
    const auto score_of_input = [&](int row, int s, int u, int gate, Pack<T, 2> grad) {
        const int64_t step = rows.step.ld(row) + time(row, s);
        const auto x = p.projected.template ld_as<Pack<T, 2>>((step * 3 + gate) * units + u * kTileColumns + tile_column());
        return x.v[0] * grad.v[0] + x.v[1] * grad.v[1];
    };
    // Sums what the lanes have for their rows' scores; between a barrier after it and the next, finish_scores may follow.
    const auto post_scores = [&](T(&da)[kRowTiles][2]) {
        if (p.gate == Gate::none) return;
        for_lane_rows<kRowTiles>([&](int m, int half, int row) {
            T sum = da[m][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (lane_index() % 4 == 0) scores.st(row * kMaxWarps<Math> + warp_index(), sum);
        });
    };
    const auto finish_scores = [&](int s) {
        if (p.gate == Gate::none) return;
        for (int row = thread_index(); row < kRows; row += block_threads()) {
            if (!valid(row, s)) continue;
            T sum = 0;
            for (int w = 0; w < block_warps(); ++w) sum += scores.ld(row * kMaxWarps<Math> + w);
            p.grad_attention.st(rows.attention.ld(row) + time(row, s) * p.attention_strides.t, to_storage<S>(sum));
        }
    };
    // dh of the lane's units plus the product with the gates' gradients of tiles [begin, end).
    const auto add_product = [&](int s, int u, int begin, int end) {
        T d[kRowTiles][1][4] = {};
        multiply_unit<Math>(d, grads, weights, p.packed, l, u, 1, 0, begin, end);
        for_lane_rows<kRowTiles>([&](int m, int half, int row) {
            const int at = row * units + u * kTileColumns + tile_column();
            if (!valid(row, s)) return;
            Pack<T, 2> dh = exact.template ld_as<Pack<T, 2>>(at);
            dh.v[0] += d[m][0][half * 2], dh.v[1] += d[m][0][half * 2 + 1];
            exact.st_as(at, dh);
        });
    };

    struct Steps {
        Step row[kRowTiles][2];
    };
    const auto load_all = [&](int s, int u) {
        Steps v = {};
        for_lane_rows<kRowTiles>([&](int m, int half, int row) { v.row[m][half] = load(row, s, u); });
        return v;
    };

    Steps now = {};
    if (warp_index() < l.unit_tiles) now = load_all(steps - 1, warp_index());
    for (int s = steps - 1; s >= 0; --s) {
        T da[kRowTiles][2] = {};
        for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
            for_lane_rows<kRowTiles>([&](int m, int half, int row) {
                const int at = row * units + u * kTileColumns + tile_column();
                if (!valid(row, s)) return;
                const Step& v = now.row[m][half];
                const auto gate_r = unpack<S>(v.r), gate_z = unpack<S>(v.z), gate_n = unpack<S>(v.n), hn = unpack<S>(v.hn);
                const auto before = unpack<S>(v.h), grad = unpack<S>(v.grad);
                const T a = to_compute(keep_whole(v.a));
                Pack<T, 2> dh = exact.template ld_as<Pack<T, 2>>(at), dr, dz, dn, dhn;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const T r = gate_r.v[j], z = gate_z.v[j], n = gate_n.v[j], h = before.v[j];
                    const T d = dh.v[j] + grad.v[j], k = keep_weight(p.gate, z, a);
                    const KeepGradient<T> of_keep = keep_gradient(p.gate, d * (h - n), z, a);
                    dz.v[j] = of_keep.dz * z * (T(1) - z);
                    dn.v[j] = d * (T(1) - k) * (T(1) - n * n);
                    dhn.v[j] = dn.v[j] * r;
                    dr.v[j] = dn.v[j] * hn.v[j] * r * (T(1) - r);
                    dh.v[j] = d * k;
                    if (p.gate != Gate::input) da[m][half] += of_keep.da;
                }
                exact.st_as(at, dh);
                leave(row, u, 1, dz);
                if constexpr (kResetAfter) {
                    leave(row, u, 0, dr), leave(row, u, 2, dhn);
                    save(row, s, u, 0, dr, dz, dn, dhn);
                } else {
                    leave(row, u, 2, dn);
                    save(row, s, u, 1, dz, dn);
                }
                if (p.gate == Gate::input) {
                    da[m][half] += score_of_input(row, s, u, 1, dz) + score_of_input(row, s, u, 2, dn);
                    if constexpr (kResetAfter) da[m][half] += score_of_input(row, s, u, 0, dr);
                }
            });
            // After the use of what it replaces, for want of registers; barrier and product hide the wait.
            const bool last = u + block_warps() >= l.unit_tiles;
            now = load_all(last ? s - 1 : s, last ? warp_index() : u + block_warps());
        }
        if constexpr (kResetAfter) {
            post_scores(da);
            sync_block();
            finish_scores(s);
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) add_product(s, u, 0, l.tiles);
            sync_block();
        } else {
            sync_block();
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) {
                T d[kRowTiles][1][4] = {};  // of r h
                multiply_unit<Math>(d, grads, weights, p.packed, l, u, 1, 0, 2 * gate_tiles, l.tiles);
                for_lane_rows<kRowTiles>([&](int m, int half, int row) {
                    const int at = row * units + u * kTileColumns + tile_column();
                    if (!valid(row, s)) return;
                    const Step v = load(row, s, u);
                    const auto gate_r = unpack<S>(v.r), before = unpack<S>(v.h);
                    Pack<T, 2> dh = exact.template ld_as<Pack<T, 2>>(at), dr;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const T r = gate_r.v[j], of_product = d[m][0][half * 2 + j];
                        dr.v[j] = of_product * before.v[j] * r * (T(1) - r);
                        dh.v[j] += of_product * r;
                    }
                    exact.st_as(at, dh);
                    leave(row, u, 0, dr);
                    save(row, s, u, 0, dr);
                    if (p.gate == Gate::input) da[m][half] += score_of_input(row, s, u, 0, dr);
                });
            }
            post_scores(da);
            sync_block();
            finish_scores(s);
            for (int u = warp_index(); u < l.unit_tiles; u += block_warps()) add_product(s, u, 0, 2 * gate_tiles);
            sync_block();
        }
    }

    store_exact(p.grad_hx, rows, kRows, exact, l);
}

}  // namespace

template <typename S>
GruResidence gru_backward_residence(int64_t hidden_size, bool tf32) {
    GruResidence residence;
    with_math<S>(tf32, [&](auto math) { residence = residence_of(backward_layout<decltype(math)>(hidden_size, 1)); });
    return residence;
}

template <typename S>
int64_t gru_backward_workspace(const GruProblem<S>& p) {
    int64_t bytes = 0;
    with_math<S>(p.tf32, [&](auto math) {
        const SweepLayout l = backward_layout<decltype(math)>(p.hidden_size, p.rows());
        bytes = workspace_bytes(p, l);
    });
    return bytes;
}

template <typename S>
void gru_backward(Stream stream, const GruBackward<S>& p) {
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const SweepLayout l = backward_layout<Math>(p.hidden_size, p.rows());
        const int64_t H = p.hidden_size;
        // A column is a unit of h, k runs over r's units, z's, n's.
        pack<Math, S>(stream, {p.weight_hh, 3 * H * H, "weight_hh"}, {3, H, H, H * H, 1, H},
                      {l.tiles, 1, l.tiles / 3, 3 * l.unit_tiles}, {p.packed, gru_packed_size(p), "packed weight_hh"});
        const Grid grid = {sweep_blocks(p, l), 1, 1, 32 * l.warps, l.shared_bytes};
        const void* const read[] = {p.hx, p.output, p.gates, p.grad_output};
        const bool paired = H % 2 == 0 && std::all_of(std::begin(read), std::end(read), [](const void* array) {
                                return reinterpret_cast<uintptr_t>(array) % (2 * sizeof(S)) == 0;
                            });
        with_layout<Math>(l, [&](auto row_tiles, auto state_shared) {
            with_constant(p.reset_after, [&](auto reset_after) {
                with_constant(paired, [&](auto in_pairs) {
                    launch("gru_backward", backward_sweep<Math, row_tiles(), state_shared(), reset_after(), in_pairs()>, grid,
                           stream, BackwardParams<S>(p, l));
                });
            });
        });
    });
}

#define DIEN_OPS_INSTANTIATE(S)                                       \
    template GruResidence gru_backward_residence<S>(int64_t, bool);   \
    template int64_t gru_backward_workspace<S>(const GruProblem<S>&); \
    template void gru_backward<S>(Stream, const GruBackward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)

}  // namespace dien_ops::cuda
