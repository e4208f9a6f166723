// SPDX-License-Identifier: Apache-2.0
// What needs no recurrence: W x for all steps, the gradients of input, weights and biases, and zeros in padding.
//
// These are large products, with the sum of lengths as one of their sizes. A block of step_product takes 64 steps and 128
// columns; its rows of A go through shared memory 64 numbers of k at a time, B comes packed from the L2 cache. A block of
// outer_product takes 64 x 64 of a weight's gradient and one of `splits` parts of the entries, whose results reduce_parts adds
// in order: the same inputs give the same bits.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/gru_sweep.cuh"
#include "cuda/pack.cuh"

namespace dien_ops::cuda {
namespace {

constexpr int kProductWarps = 4;  // of the products
constexpr int kProductRows = 64;  // of A in shared memory
constexpr int kStepDepth = 64;    // k at a time, in step_product
constexpr int kStepColumns = kProductWarps * 4 * kTileColumns;
constexpr int kOuterColumns = 64;
constexpr int kOuterDepth = 32;  // entries at a time

// ------------------------------------------------------------------------------------------------------- the padding

template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void clear_padding(DevicePlan plan, gmem<S> tensor, Strides strides, int64_t width) {
    const int64_t b = block_index() / plan.targets, c = block_index() % plan.targets, length = plan.length(b);
    const int64_t begin = b * strides.b + c * strides.c;
    for (int64_t i = thread_index(); i < (plan.steps - length) * width; i += kElementThreads) {
        tensor.st(begin + (length + i / width) * strides.t + i % width, to_storage<S>(0));
    }
}

// ------------------------------------------------------------------------------------------------- products over steps

// Where the numbers of a step lie: at its place in a [B, T, ..] tensor, or one step behind the other.
struct StepRows {
    bool in_place;
    int64_t stride_b, stride_t;

    DIEN_OPS_DEVICE int64_t offset(const DevicePlan& plan, int64_t step) const {
        if (!in_place) return step * stride_t;
        const int64_t place = plan.place(step);
        return place / plan.steps * stride_b + place % plan.steps * stride_t;
    }
};

// out [steps, columns] = A [steps, depth] B: A's numbers as they are stored, B packed with its column tiles side by side.
template <typename Math, typename Out>
DIEN_OPS_KERNEL(kProductWarps * 32)
void step_product(DevicePlan plan, gmem<const typename Math::Storage> a, StepRows a_rows, int64_t depth,
                  gmem<const typename Math::Operand> packed, int64_t column_tiles, gmem<Out> out, StepRows out_rows,
                  int64_t columns, bool paired) {
    using T = Accumulator<Math>;
    constexpr int kTiles = kStepDepth / Math::kDepth, kStride = padded_stride<Math>(kTiles);
    const int64_t first = block_index() * kProductRows, total = plan.total_steps();
    if (first >= total) return;  // the whole block

    Arena arena;
    const auto offsets = arena.take<int64_t>(kProductRows, "offsets of A");
    const auto rows = arena.take<typename Math::Operand>(kProductRows * kStride, "A");
    const int64_t column_tile = block_index_y() * (kStepColumns / kTileColumns) + warp_index() * 4;
    for (int i = thread_index(); i < kProductRows; i += kProductWarps * 32) {
        offsets.st(i, first + i < total ? a_rows.offset(plan, first + i) : -1);
    }
    sync_block();

    T d[kProductRows / kTileRows][4][4] = {};
    for (int64_t k = 0; k < depth; k += kStepDepth) {
        for (int i = thread_index(); i < kProductRows * kStepDepth; i += kProductWarps * 32) {
            const int row = i / kStepDepth, column = i % kStepDepth;
            const int64_t offset = offsets.ld(row);
            const bool present = offset >= 0 && k + column < depth;
            rows.st(row * kStride + column, Math::operand(present ? to_compute(a.ld(offset + k + column)) : T(0)));
        }
        sync_block();
        const int64_t k_tile = k / Math::kDepth;
        const int64_t left = divide_up<int64_t>(depth - k, Math::kDepth);
        if (column_tile < column_tiles) {
            multiply_tiles<Math>(d, rows, 0, kStride, packed, k_tile * column_tiles + column_tile, column_tiles, 0,
                                 left < kTiles ? static_cast<int>(left) : kTiles);
        }
        sync_block();
    }

    for_lane_rows<kProductRows / kTileRows>([&](int m, int half, int row) {
        const int64_t step = first + row;
        if (step >= total) return;
        const int64_t offset = out_rows.offset(plan, step);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int64_t column = (column_tile + n) * kTileColumns + tile_column();
            store_pair(out, offset + column, pair_count(column, columns), paired,
                       Pack<T, 2>{d[m][n][half * 2], d[m][n][half * 2 + 1]});
        }
    });
}

// The gradient of W x of a step: the sum over its sequence's targets, each times its score where that scales W x.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void target_sums(DevicePlan plan, gmem<const S> grad_gates, int64_t gates_size, int64_t width, gmem<const S> attention,
                 Strides attention_strides, bool scaled, gmem<S> sums) {
    using T = Compute<S>;
    const int64_t step = element_index() / width, j = element_index() % width;
    if (step >= plan.total_steps()) return;
    const int64_t place = plan.place(step), b = place / plan.steps, t = place % plan.steps;
    const int64_t entry = plan.targets * plan.first_step(b) + t;
    T sum = 0;
    for (int64_t c = 0; c < plan.targets; ++c) {
        const T grad = to_compute(grad_gates.ld((entry + c * plan.length(b)) * gates_size + j));
        const int64_t score = b * attention_strides.b + c * attention_strides.c + t * attention_strides.t;
        sum += scaled ? to_compute(attention.ld(score)) * grad : grad;
    }
    sums.st(step * width + j, to_storage<S>(sum));
}

// ---------------------------------------------------------------------------------------------------- sums over entries

// What the columns of a weight's gradient are products with: the input's numbers at a step, or the state before an entry, times
// r where the reset gate came before the product.
template <typename S>
struct OuterColumns {
    bool of_input, times_reset;
    gmem<const S> input, output, hx, gates;
    StepRows input_rows;
    Strides output_strides;
    int64_t hidden, gates_size;

    struct Row {
        int64_t from;   // where the numbers begin, or -1: zeros
        bool first;     // in hx
        int64_t reset;  // where the entry's r begins
    };
    DIEN_OPS_DEVICE Row row(const DevicePlan& plan, int64_t entry) const {
        if (of_input) return {input_rows.offset(plan, entry), false, 0};
        const int64_t b = plan.place(entry / plan.targets) / plan.steps, length = plan.length(b);
        const int64_t within = entry - plan.targets * plan.first_step(b), c = within / length, t = within % length;
        const int64_t before = plan.reverse ? t + 1 : t - 1, reset = entry * gates_size;
        if (before < 0 || before >= length) return {hx ? (b * plan.targets + c) * hidden : -1, true, reset};
        return {b * output_strides.b + c * output_strides.c + before * output_strides.t, false, reset};
    }
    DIEN_OPS_DEVICE Compute<S> ld(int64_t from, bool first, int64_t reset, int64_t j) const {
        if (from < 0) return 0;
        if (of_input) return to_compute(input.ld(from + j));
        const Compute<S> h = to_compute(first ? hx.ld(from + j) : output.ld(from + j));
        return times_reset ? h * to_compute(gates.ld(reset + j)) : h;
    }
};

// partial [splits, .., columns], rows out_row and on: the sum over a part of the entries of A [entries, rows]^T times columns.
template <typename Math>
DIEN_OPS_KERNEL(kProductWarps * 32)
void outer_product(DevicePlan plan, int64_t entries_per_step, gmem<const typename Math::Storage> a, int64_t a_stride,
                   int64_t a_column, int64_t rows, OuterColumns<typename Math::Storage> source, int64_t columns,
                   gmem<Accumulator<Math>> partial, int64_t splits, int64_t partial_stride, int64_t out_row) {
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    constexpr int kTiles = kOuterDepth / Math::kDepth, kStride = padded_stride<Math>(kTiles);
    constexpr int kColumnTiles = kOuterColumns / kTileColumns, kBlock = kProductWarps * 32;

    Arena arena;
    const auto left = arena.take<Operand>(kProductRows * kStride, "A");
    const auto right = arena.take<Operand>(kColumnTiles * kTiles * kTileNumbers<Math>, "B");
    const auto from = arena.take<int64_t>(kOuterDepth, "columns' rows");
    const auto reset = arena.take<int64_t>(kOuterDepth, "resets");
    const auto first = arena.take<int>(kOuterDepth, "first steps");

    const int64_t row = block_index() * kProductRows, column = block_index_y() * kOuterColumns;
    const int64_t total = plan.total_steps() * entries_per_step;
    const int64_t begin = total * block_index_z() / splits, end = total * (block_index_z() + 1) / splits;
    const int warp_row = warp_index() / 2 * 2 * kTileRows, warp_column = warp_index() % 2 * 4;  // 32 rows x 4 column tiles
    T d[2][4][4] = {};
    for (int64_t entry = begin; entry < end; entry += kOuterDepth) {
        for (int i = thread_index(); i < kOuterDepth; i += kBlock) {
            const auto r = entry + i < end ? source.row(plan, entry + i) : typename decltype(source)::Row{-1, false, 0};
            from.st(i, r.from), reset.st(i, r.reset), first.st(i, r.first);
        }
        for (int i = thread_index(); i < kOuterDepth * kProductRows; i += kBlock) {
            const int k = i / kProductRows, m = i % kProductRows;
            const bool present = entry + k < end && row + m < rows;
            const T value = present ? to_compute(a.ld((entry + k) * a_stride + a_column + row + m)) : T(0);
            left.st(m * kStride + k, Math::operand(value));
        }
        sync_block();
        for (int i = thread_index(); i < kOuterDepth * kOuterColumns; i += kBlock) {
            const int k = i / kOuterColumns, n = i % kOuterColumns;
            const bool present = column + n < columns;
            const T value = present ? source.ld(from.ld(k), first.ld(k), reset.ld(k), column + n) : T(0);
            const int tile = k / Math::kDepth * kColumnTiles + n / kTileColumns;
            right.st(tile * kTileNumbers<Math> + Math::position(n % kTileColumns, k % Math::kDepth), Math::operand(value));
        }
        sync_block();
        multiply_tiles<Math>(d, left, warp_row * kStride, kStride, right, warp_column, kColumnTiles, 0, kTiles);
        sync_block();
    }

    for_lane_rows<2>([&](int m, int half, int lane_row) {
        const int64_t r = row + warp_row + lane_row;
        if (r >= rows) return;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int64_t c = column + (warp_column + n) * kTileColumns + tile_column();
            store_pair(partial, block_index_z() * partial_stride + (out_row + r) * columns + c, pair_count(c, columns), false,
                       Pack<T, 2>{d[m][n][half * 2], d[m][n][half * 2 + 1]});
        }
    });
}

// partial [splits, width]: the sums of the columns of a [entries, width].
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void column_sums(DevicePlan plan, gmem<const S> a, int64_t width, int64_t splits, gmem<Compute<S>> partial) {
    const int64_t j = element_index();
    if (j >= width) return;
    const int64_t total = plan.total_steps() * plan.targets;
    const int64_t end = total * (block_index_y() + 1) / splits;
    Compute<S> sum = 0;
#pragma unroll 8
    for (int64_t entry = total * block_index_y() / splits; entry < end; ++entry) sum += to_compute(a.ld(entry * width + j));
    partial.st(block_index_y() * width + j, sum);
}

// Parts of the entries, from the sizes alone: about 256 entries each, at most `most` of them, together at most 64 MiB.
int64_t entry_splits(int64_t cells, int64_t most, int64_t bytes_of_part) {
    constexpr int64_t kEntries = 256, kBytes = 64 << 20;
    const int64_t fit = bytes_of_part == 0 ? most : kBytes / bytes_of_part;
    return std::max<int64_t>(1, std::min({cells / kEntries, most, fit}));
}
template <typename S>
int64_t weight_splits(const GruProblem<S>& p) {  // of the larger weight
    const int64_t part = 3 * p.hidden_size * std::max(p.input_size, p.hidden_size);
    return entry_splits(p.rows() * p.steps, 64, part * sizeof(Compute<S>));
}
template <typename S>
int64_t bias_splits(const GruProblem<S>& p) {
    return entry_splits(p.rows() * p.steps, 512, p.gates_size() * sizeof(Compute<S>));
}

template <typename S>
StepRows input_rows(const GruProblem<S>& p) {
    return {true, p.input_strides.b, p.input_strides.t};
}

// The column tiles that step_product takes: whole warps' shares.
int64_t step_column_tiles(int64_t columns) { return round_up<int64_t>(divide_up<int64_t>(columns, kTileColumns), 4); }

template <typename S>
Grid step_grid(const GruProblem<S>& p, int64_t column_tiles, int64_t operand_bytes, int64_t pad) {
    const int64_t shared =
        arena_bytes<int64_t>(kProductRows) + arena_bytes<char>(kProductRows * (kStepDepth * operand_bytes + pad));
    return {divide_up<int64_t>(p.batch * p.steps, kProductRows), divide_up<int64_t>(column_tiles * kTileColumns, kStepColumns),
            1, kProductWarps * 32, shared};
}

}  // namespace

int64_t gru_projection_width(int64_t hidden_size) { return 3 * round_up<int64_t>(hidden_size, kTileColumns); }

template <typename S>
int64_t gru_packed_size(const GruProblem<S>& p) {
    constexpr int64_t kDeepest = 16;
    const auto size = [](int64_t column_tiles, int64_t depth) {
        return column_tiles * kTileColumns * round_up<int64_t>(depth, kDeepest);
    };
    const int64_t units = round_up<int64_t>(p.hidden_size, kTileColumns), gates = 3 * units / kTileColumns;
    const int64_t sweeps = 3 * size(units / kTileColumns, p.hidden_size);
    const int64_t projection = size(round_up<int64_t>(gates, 4), p.input_size);
    const int64_t gradient = size(step_column_tiles(p.input_size), 3 * p.hidden_size);
    return std::max({sweeps, projection, gradient});
}

template <typename S>
void gru_projection(Stream stream, const GruProblem<S>& p, S* packed, Compute<S>* projected) {
    using T = Compute<S>;
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const int64_t H = p.hidden_size, I = p.input_size, width = gru_projection_width(H);
        const int64_t tiles = step_column_tiles(width);
        const gmem<S> b = {packed, gru_packed_size(p), "packed weight_ih"};
        pack<Math, S>(stream, {p.weight_ih, 3 * H * I, "weight_ih"}, {3, H, I, H * I, I, 1},
                      {1, tiles, width / 3 / kTileColumns, tiles}, b);
        launch("gru_projection", step_product<Math, T>, step_grid(p, tiles, sizeof(S), 16), stream, DevicePlan(p),
               gmem<const S>{p.input, p.batch * p.steps * I, "input"}, input_rows(p), I,
               gmem<const S>{packed, gru_packed_size(p), "packed weight_ih"}, tiles,
               gmem<T>{projected, p.batch * p.steps * width, "projected"}, StepRows{false, 0, width}, width, true);
    });
}

template <typename S>
void gru_target_sums(Stream stream, const GruProblem<S>& p, const S* grad_gates, S* sums) {
    const int64_t width = 3 * p.hidden_size, cells = p.rows() * p.steps;
    launch("gru_target_sums", target_sums<S>, element_grid(p.batch * p.steps * width), stream, DevicePlan(p),
           gmem<const S>{grad_gates, cells * p.gates_size(), "grad_gates"}, p.gates_size(), width,
           gmem<const S>{p.attention, cells, "attention"}, p.attention_strides, p.gate == Gate::input,
           gmem<S>{sums, p.batch * p.steps * width, "sums over targets"});
}

template <typename S>
void gru_input_gradient(Stream stream, const GruProblem<S>& p, const S* grad_gates, const S* of_projection, S* packed,
                        S* grad_input) {
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const int64_t H = p.hidden_size, I = p.input_size, tiles = step_column_tiles(I);
        const int64_t stride = of_projection ? 3 * H : p.gates_size();
        const gmem<S> b = {packed, gru_packed_size(p), "packed weight_ih"};
        pack<Math, S>(stream, {p.weight_ih, 3 * H * I, "weight_ih"}, {1, I, 3 * H, 0, 1, I},
                      {1, tiles, divide_up<int64_t>(I, kTileColumns), tiles}, b);
        launch("gru_input_gradient", step_product<Math, S>, step_grid(p, tiles, sizeof(S), 16), stream, DevicePlan(p),
               gmem<const S>{of_projection ? of_projection : grad_gates, p.batch * p.steps * stride, "gradient of W x"},
               StepRows{false, 0, stride}, 3 * H, gmem<const S>{packed, gru_packed_size(p), "packed weight_ih"}, tiles,
               gmem<S>{grad_input, p.batch * p.steps * I, "grad_input"}, input_rows(p), I, I % 2 == 0);
    });
}

template <typename S>
int64_t gru_weight_gradients_partial(const GruProblem<S>& p) {
    return std::max(weight_splits(p) * 3 * p.hidden_size * std::max(p.input_size, p.hidden_size),
                    bias_splits(p) * p.gates_size());
}

template <typename S>
void gru_weight_gradients(Stream stream, const GruProblem<S>& p, const GruWeightGradients<S>& g) {
    using T = Compute<S>;
    const int64_t H = p.hidden_size, I = p.input_size, C = p.targets, cells = p.rows() * p.steps, size = p.gates_size();
    const int64_t partial_size = gru_weight_gradients_partial(p);
    const int64_t splits = weight_splits(p), of_bias = bias_splits(p);
    const DevicePlan plan(p);
    const gmem<T> partial = {g.partial, partial_size, "partial sums"};
    const gmem<const T> parts = {g.partial, partial_size, "partial sums"};
    const gmem<const S> grad_gates = {g.grad_gates, cells * size, "grad_gates"};
    const auto reduce = [&](int64_t count, int64_t stride, int64_t gap_at, int64_t gap, int64_t n, S* to, const char* name) {
        launch("gru_reduce_parts", reduce_parts<S>, element_grid(n), stream, parts, count, stride, gap_at, gap, n,
               gmem<S>{to, n, name});
    };

    OuterColumns<S> source = {};
    source.input = {p.input, p.batch * p.steps * I, "input"};
    source.output = {p.output, cells * H, "output"};
    source.hx = {p.hx, p.rows() * H, "hx"};
    source.gates = {g.gates, cells * size, "gates"};
    source.input_rows = input_rows(p);
    source.output_strides = p.output_strides;
    source.hidden = H, source.gates_size = size;
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        using Operand = typename Math::Operand;
        const int64_t shared = arena_bytes<Operand>(kProductRows * padded_stride<Math>(kOuterDepth / Math::kDepth)) +
                               arena_bytes<Operand>(kOuterColumns * kOuterDepth) + 2 * arena_bytes<int64_t>(kOuterDepth) +
                               arena_bytes<int>(kOuterDepth);
        // Rows [row, row + count) of a weight's gradient, from columns [column, column + count) of a.
        const auto add = [&](const gmem<const S>& a, int64_t stride, int64_t column, int64_t row, int64_t count,
                             int64_t columns, int64_t entries_per_step) {
            const Grid grid = {divide_up<int64_t>(count, kProductRows), divide_up<int64_t>(columns, kOuterColumns), splits,
                               kProductWarps * 32, shared};
            launch("gru_weight_gradient", outer_product<Math>, grid, stream, plan, entries_per_step, a, stride, column, count,
                   source, columns, partial, splits, 3 * H * columns, row);
        };
        source.of_input = true;
        if (g.of_projection) {
            add({g.of_projection, p.batch * p.steps * 3 * H, "gradient of W x"}, 3 * H, 0, 0, 3 * H, I, 1);
        } else {
            add(grad_gates, size, 0, 0, 3 * H, I, 1);
        }
        reduce(splits, 3 * H * I, 3 * H * I, 0, 3 * H * I, g.grad_weight_ih, "grad_weight_ih");

        source.of_input = false;
        add(grad_gates, size, 0, 0, 2 * H, H, C);
        source.times_reset = !p.reset_after;
        add(grad_gates, size, p.reset_after ? 3 * H : 2 * H, 2 * H, H, H, C);
        reduce(splits, 3 * H * H, 3 * H * H, 0, 3 * H * H, g.grad_weight_hh, "grad_weight_hh");
    });

    launch("gru_bias_gradient", column_sums<S>, Grid{divide_up<int64_t>(size, kElementThreads), of_bias, 1, kElementThreads},
           stream, plan, grad_gates, size, of_bias, partial);
    reduce(of_bias, size, 3 * H, 0, 3 * H, g.grad_bias_ih, "grad_bias_ih");
    reduce(of_bias, size, 2 * H, p.reset_after ? H : 0, 3 * H, g.grad_bias_hh, "grad_bias_hh");
}

template <typename S>
void gru_clear_padding(Stream stream, const GruPlan& plan, int64_t batch, int64_t targets, int64_t steps, S* tensor,
                       const Strides& strides, int64_t width) {
    if (plan.lengths == nullptr) return;
    launch("gru_clear_padding", clear_padding<S>, Grid{width == 0 ? 0 : batch * targets, 1, 1, kElementThreads}, stream,
           DevicePlan(plan, batch, targets, steps, false), gmem<S>{tensor, batch * targets * steps * width, "padding"}, strides,
           width);
}

#define DIEN_OPS_INSTANTIATE(S)                                                                        \
    template int64_t gru_packed_size<S>(const GruProblem<S>&);                                         \
    template void gru_projection<S>(Stream, const GruProblem<S>&, S*, Compute<S>*);                    \
    template void gru_target_sums<S>(Stream, const GruProblem<S>&, const S*, S*);                      \
    template void gru_input_gradient<S>(Stream, const GruProblem<S>&, const S*, const S*, S*, S*);     \
    template int64_t gru_weight_gradients_partial<S>(const GruProblem<S>&);                            \
    template void gru_weight_gradients<S>(Stream, const GruProblem<S>&, const GruWeightGradients<S>&); \
    template void gru_clear_padding<S>(Stream, const GruPlan&, int64_t, int64_t, int64_t, S*, const Strides&, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)

}  // namespace dien_ops::cuda
