// SPDX-License-Identifier: Apache-2.0
// a_t = softmax_t(h_t W e_a) (DIEN eq. 8), for the C targets a of each sequence, and its gradient. As on the CPU, h_t W e_a is
// h_t . g with g = W e_a, and the states are never projected. The floor is memory: B T H numbers of states read and B C T
// scores written, over 3.35 TB/s on an H100; B1024 T100 H128 in float32 are 52 MB, 16 us, and the backward moves twice that.
//
// A block takes one sequence and some of its targets, so that logits, softmax and scores need no memory between them: the
// logits of all T steps stay in shared memory, a warp makes a target's scores of them, and padding is neither read nor counted.
// (Where T is in the thousands for many targets, in the ten thousands for one, they lie in a workspace in global memory: slow,
// and never wrong.)
//
//   score_rows     C <= kFewTargets, in training one. A product tile would be empty but for a row or two, so every dot product
//                  is taken as it comes: the lanes of a row (rows.cuh) load it once, for all targets, and add up. Nothing is
//                  rounded to tf32. Four rows per lane are on their way at a time.
//   score_tiles    more targets, as in serving: products [64 steps] x [8 or 32 targets] on matrix units. States are read once
//                  per 32 targets, all but the first time from the L2 cache.
//
// With d the gradient of the logits, grad h_t = sum over c of d_ct g_c and grad g_c = sum over t of d_ct h_t.
//
//   backward_rows  few targets: one pass over the states gives both; a lane keeps its columns of grad g in registers, and the
//                  warps' sums are added in order.
//   logit_gradients, then two products per sequence: more targets.
//
// No sum depends on anything but sizes and lengths: the same inputs give the same bits.
#include "cuda/attention.h"

#include <math.h>

#include <algorithm>

#include "cuda/products.cuh"
#include "cuda/rows.cuh"

namespace dien_ops::cuda {
namespace {

constexpr int kFewTargets = 4;
constexpr int kRowsPerLane = 4;  // in score_rows and backward_rows, at a time

// ------------------------------------------------------------------------------------------------------------ the call

template <typename S>
struct Sequences {
    gmem<const S> states;
    gmem<const int64_t> lengths;
    int64_t batch, targets, hidden, stride_b, stride_t;
    int steps;

    explicit Sequences(const BilinearAttentionProblem<S>& p)
        : states(p.states, p.batch * p.steps * p.hidden_size, "states"),
          lengths(p.lengths, p.batch, "lengths"),
          batch(p.batch),
          targets(p.targets),
          hidden(p.hidden_size),
          stride_b(p.state_stride_b),
          stride_t(p.state_stride_t),
          steps(static_cast<int>(p.steps)) {}
    DIEN_OPS_DEVICE int length(int64_t b) const { return lengths ? static_cast<int>(lengths.ld(b)) : steps; }
};

// Numbers of a block: in shared memory or, where that is too small, in its part of a workspace in global memory.
template <typename T>
class BlockNumbers {
  public:
    // workspace: absent, or n numbers for each block.
    DIEN_OPS_DEVICE BlockNumbers(Arena& arena, const gmem<T>& workspace, int64_t n, const char* name)
        : shared_(arena.take<T>(workspace ? 0 : static_cast<int>(n), name)),
          global_(workspace ? workspace.sub(block_index() * n, n) : workspace) {}
    DIEN_OPS_DEVICE T ld(int64_t i) const { return global_ ? global_.ld(i) : shared_.ld(static_cast<int>(i)); }
    DIEN_OPS_DEVICE void st(int64_t i, T x) const { global_ ? global_.st(i, x) : shared_.st(static_cast<int>(i), x); }

  private:
    view<T> shared_;
    gmem<T> global_;
};

// From one target's logits to the next one's: neighbours in a column of a product tile in different banks.
DIEN_OPS_HOST_DEVICE constexpr int64_t logit_stride(int64_t steps) { return round_up<int64_t>(steps, 16) + 4; }

// g of targets first..first + kTargets - 1 of a sequence, `padded` numbers each, zeros where there are none. The caller waits.
template <int kTargets, typename S>
DIEN_OPS_DEVICE void load_projected(const view<Compute<S>>& to, const gmem<const Compute<S>>& projected, const Sequences<S>& s,
                                    int padded) {
    for (int i = thread_index(); i < kTargets * padded; i += block_threads()) {
        const int c = i / padded, j = i % padded;
        const bool present = c < s.targets && j < s.hidden;
        to.st(i, present ? projected.ld((block_index() * s.targets + c) * s.hidden + j) : Compute<S>(0));
    }
}

// ------------------------------------------------------------------------------------------------------------- softmax

// scores [steps] from `length` logits, from number `first` of theirs on, by a warp. A step is one lane's from beginning to end.
template <typename S>
DIEN_OPS_DEVICE void store_softmax(const BlockNumbers<Compute<S>>& logits, int64_t first, int length, int steps,
                                   const gmem<S>& scores, int64_t to) {
    using T = Compute<S>;
    T largest = -T(INFINITY), sum = 0;
    for (int t = lane_index(); t < length; t += kWarp) {
        const T x = logits.ld(first + t);
        largest = x < largest ? largest : x;
    }
    largest = warp_max(largest);
    for (int t = lane_index(); t < length; t += kWarp) {
        const T e = exp_exact(logits.ld(first + t) - largest);
        logits.st(first + t, e);
        sum += e;
    }
    const T scale = T(1) / warp_sum(sum);
    for (int t = lane_index(); t < steps; t += kWarp) {
        scores.st(to + t, to_storage<S>(t < length ? logits.ld(first + t) * scale : T(0)));
    }
}

// Calls store(t, gradient of the logit) for t < length, by a warp; the row's scores and their gradients begin at `from`.
template <typename S, typename F>
DIEN_OPS_DEVICE void softmax_gradient(const gmem<const S>& scores, const gmem<const S>& grad_scores, int64_t from, int length,
                                      const F& store) {
    using T = Compute<S>;
    T common = 0;
    for (int t = lane_index(); t < length; t += kWarp) {
        common += to_compute(scores.ld(from + t)) * to_compute(grad_scores.ld(from + t));
    }
    common = warp_sum(common);
    for (int t = lane_index(); t < length; t += kWarp) {
        store(t, to_compute(scores.ld(from + t)) * (to_compute(grad_scores.ld(from + t)) - common));
    }
}

// --------------------------------------------------------------------------------------------------------- few targets

template <typename S, int kTargets>
DIEN_OPS_KERNEL(kElementThreads)
void score_rows(Sequences<S> s, RowLanes rows, gmem<const Compute<S>> projected, gmem<Compute<S>> workspace, gmem<S> scores) {
    using T = Compute<S>;
    const int padded = rows.padded<S>(), length = s.length(block_index());
    const int64_t stride = logit_stride(s.steps);
    Arena arena;
    const auto g = arena.take<T>(kTargets * padded, "g");
    const BlockNumbers<T> logits(arena, workspace, kTargets * stride, "logits");
    load_projected<kTargets>(g, projected, s, padded);
    sync_block();

    for (int first = 0; first < length; first += rows.groups() * kRowsPerLane) {
        T sums[kRowsPerLane][kTargets] = {};
        for (int pass = 0; pass < rows.passes; ++pass) {
            const int column = rows.column<S>(pass), count = rows.count<S>(column);
            Chunk<S> h[kRowsPerLane];
#pragma unroll
            for (int r = 0; r < kRowsPerLane; ++r) {
                const int t = first + r * rows.groups() + rows.group();
                const int64_t from = block_index() * s.stride_b + t * s.stride_t + column;
                h[r] = load_chunk(s.states, from, t < length ? count : 0, rows.whole);
            }
#pragma unroll
            for (int c = 0; c < kTargets; ++c) {
                const auto w = g.template ld_as<Pack<T, kChunk<S>>>(c * padded + column);
#pragma unroll
                for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
                    for (int k = 0; k < kChunk<S>; ++k) sums[r][c] += to_compute(h[r].v[k]) * w.v[k];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) {
            const int t = first + r * rows.groups() + rows.group();
#pragma unroll
            for (int c = 0; c < kTargets; ++c) {
                const T logit = row_sum(sums[r][c], rows.lanes);
                if (rows.lane() == 0 && t < length) logits.st(c * stride + t, logit);
            }
        }
    }
    sync_block();
    for (int c = warp_index(); c < s.targets; c += block_warps()) {
        store_softmax(logits, c * stride, length, s.steps, scores, (block_index() * s.targets + c) * s.steps);
    }
}

template <typename S, int kTargets>
DIEN_OPS_KERNEL(kElementThreads)
void backward_rows(Sequences<S> s, RowLanes rows, gmem<const Compute<S>> projected, gmem<const S> scores,
                   gmem<const S> grad_scores, gmem<Compute<S>> workspace, gmem<S> grad_states,
                   gmem<Compute<S>> grad_projected) {
    using T = Compute<S>;
    constexpr int kNumbers = kChunk<S>;
    const int padded = rows.padded<S>(), length = s.length(block_index()), columns = rows.lanes * kNumbers;
    const int64_t stride = logit_stride(s.steps);
    Arena arena;
    const auto g = arena.take<T>(kTargets * padded, "g");
    const auto sums = arena.take<T>(block_warps() * kTargets * columns, "warps' sums");
    const BlockNumbers<T> d(arena, workspace, kTargets * stride, "gradients of logits");
    load_projected<kTargets>(g, projected, s, padded);
    for (int c = warp_index(); c < s.targets; c += block_warps()) {
        softmax_gradient(scores, grad_scores, (block_index() * s.targets + c) * s.steps, length,
                         [&](int t, T x) { d.st(c * stride + t, x); });
    }
    sync_block();

    for (int pass = 0; pass < rows.passes; ++pass) {
        const int column = rows.column<S>(pass), count = rows.count<S>(column);
        Pack<T, kNumbers> w[kTargets];
        T grad_g[kTargets][kNumbers] = {};
#pragma unroll
        for (int c = 0; c < kTargets; ++c) w[c] = g.template ld_as<Pack<T, kNumbers>>(c * padded + column);
        for (int first = 0; first < s.steps; first += rows.groups() * kRowsPerLane) {
            Chunk<S> h[kRowsPerLane];
#pragma unroll
            for (int r = 0; r < kRowsPerLane; ++r) {
                const int t = first + r * rows.groups() + rows.group();
                const int64_t from = block_index() * s.stride_b + t * s.stride_t + column;
                h[r] = load_chunk(s.states, from, t < length ? count : 0, rows.whole);
            }
#pragma unroll
            for (int r = 0; r < kRowsPerLane; ++r) {
                const int t = first + r * rows.groups() + rows.group();
                T grad_h[kNumbers] = {};
#pragma unroll
                for (int c = 0; c < kTargets; ++c) {
                    const T x = c < s.targets && t < length ? d.ld(c * stride + t) : T(0);
#pragma unroll
                    for (int k = 0; k < kNumbers; ++k) {
                        grad_h[k] += x * w[c].v[k];
                        grad_g[c][k] += x * to_compute(h[r].v[k]);
                    }
                }
                // Not the sums behind the length: 0 times g need not be 0.
#pragma unroll
                for (int k = 0; k < kNumbers; ++k) grad_h[k] = t < length ? grad_h[k] : T(0);
                const int64_t to = block_index() * s.stride_b + t * s.stride_t + column;
                store_chunk(grad_states, to, t < s.steps ? count : 0, rows.whole, grad_h);
            }
        }
#pragma unroll
        for (int c = 0; c < kTargets; ++c) {
#pragma unroll
            for (int k = 0; k < kNumbers; ++k) {
                const T sum = column_sum(grad_g[c][k], rows.lanes);
                if (lane_index() < rows.lanes) {
                    sums.st((warp_index() * kTargets + c) * columns + rows.lane() * kNumbers + k, sum);
                }
            }
        }
        sync_block();
        for (int i = thread_index(); i < static_cast<int>(s.targets) * columns; i += block_threads()) {
            const int c = i / columns, j = pass * columns + i % columns;
            T sum = 0;
            for (int warp = 0; warp < block_warps(); ++warp) sum += sums.ld((warp * kTargets + c) * columns + i % columns);
            if (j < s.hidden) grad_projected.st((block_index() * s.targets + c) * s.hidden + j, sum);
        }
        sync_block();
    }
}

// -------------------------------------------------------------------------------------------------------- many targets

// The block's warps stand along the steps, each with kColumnTiles tiles of targets.
template <typename Math, int kColumnTiles>
DIEN_OPS_KERNEL(kProductWarps* kWarp)
void score_tiles(Sequences<typename Math::Storage> s, ProductSide<typename Math::Storage> states,
                 ProductSide<Accumulator<Math>> projected, int64_t target_blocks, gmem<Accumulator<Math>> workspace,
                 gmem<typename Math::Storage> scores) {
    using T = Accumulator<Math>;
    constexpr int kTargets = kColumnTiles * kTileColumns;
    const int64_t b = block_index() / target_blocks, target = block_index() % target_blocks * kTargets;
    const int64_t targets = s.targets - target < kTargets ? s.targets - target : kTargets;
    const int64_t stride = logit_stride(s.steps);
    const int length = s.length(b);
    Arena arena;
    const ProductMemory<Math, kTargets> memory(arena);
    const BlockNumbers<T> logits(arena, workspace, kTargets * stride, "logits");

    for (int first = 0; first < length; first += kProductRows) {
        T d[1][kColumnTiles][4] = {};
        add_products<Math, kProductWarps>(d, memory, states, states.first(b) + first * s.stride_t, length - first, projected,
                                          projected.first(b) + target * s.hidden, targets, 0, s.hidden);
        for_lane_rows<1>([&](int, int half, int row) {
            const int t = first + warp_index() * kTileRows + row;
            if (t >= length) return;
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) {
                const int64_t to = (n * kTileColumns + tile_column()) * stride + t;
                logits.st(to, d[0][n][half * 2]);
                logits.st(to + stride, d[0][n][half * 2 + 1]);
            }
        });
    }
    sync_block();
    for (int c = warp_index(); c < targets; c += block_warps()) {
        store_softmax(logits, c * stride, length, s.steps, scores, (b * s.targets + target + c) * s.steps);
    }
}

// d [B, C, T] where valid: the gradient of the logits. A warp takes a target of a sequence.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void logit_gradients(Sequences<S> s, gmem<const S> scores, gmem<const S> grad_scores, gmem<Compute<S>> d) {
    const int64_t row = block_index() * block_warps() + warp_index();
    const bool present = row < s.batch * s.targets;
    const int length = present ? s.length(row / s.targets) : 0;
    softmax_gradient(scores, grad_scores, row * s.steps, length, [&](int t, Compute<S> x) { d.st(row * s.steps + t, x); });
}

// ------------------------------------------------------------------------------------------------------------- launches

template <typename S>
gmem<const Compute<S>> projected(const BilinearAttentionProblem<S>& p) {
    return {p.projected, p.rows() * p.hidden_size, "projected"};
}

// Calls f with the number of targets that a block of score_rows or backward_rows has room for.
template <typename S, typename F>
void with_few_targets(const BilinearAttentionProblem<S>& p, F&& f) {
    p.targets == 1 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, kFewTargets>{});
}

// Calls f with the column tiles of a block of score_tiles.
template <typename S, typename F>
void with_column_tiles(const BilinearAttentionProblem<S>& p, F&& f) {
    p.targets <= kTileColumns ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 4>{});
}

// How a block's memory is laid out: `fixed` bytes and, where they fit, T logits of `targets` targets.
struct BlockLayout {
    int64_t shared_bytes, numbers;  // of the block
    bool on_chip;
};
template <typename T>
BlockLayout block_layout(int64_t fixed, int64_t targets, int64_t steps) {
    const int64_t numbers = targets * logit_stride(steps), all = fixed + arena_bytes<T>(numbers);
    const bool on_chip = all <= device_limits().shared_bytes_per_block;
    return {on_chip ? all : fixed, numbers, on_chip};
}

// Threads of a block that goes through `steps` rows: as many warps as have kRowsPerLane rows per lane to load.
int row_threads(const RowLanes& rows, int64_t steps) {
    const int64_t warps = divide_up<int64_t>(steps * rows.lanes, kRowsPerLane * kWarp);
    return static_cast<int>(std::clamp<int64_t>(warps, 1, kElementThreads / kWarp)) * kWarp;
}

// What blocks of few targets are launched with.
template <typename S>
struct RowLaunch {
    RowLanes rows;
    Grid grid;
    BlockLayout layout;

    // grad_states: the backward's.
    RowLaunch(const BilinearAttentionProblem<S>& p, int targets, bool backward, const S* grad_states = nullptr)
        : rows(row_lanes<S>(p.hidden_size, {p.states, grad_states})) {
        using T = Compute<S>;
        const int threads = row_threads(rows, p.steps);
        const int64_t g = int64_t(targets) * rows.template padded<S>();
        const int64_t sums = backward ? threads / kWarp * targets * rows.lanes * kChunk<S> : 0;
        layout = block_layout<T>(arena_bytes<T>(g) + arena_bytes<T>(sums), targets, p.steps);
        grid = {p.batch, 1, 1, threads, layout.shared_bytes};
    }
    int64_t workspace() const { return layout.on_chip ? 0 : grid.x * layout.numbers; }
};

// Whether targets are few, and their g fits on the chip beside the warps' sums (H is not in the thousands).
template <typename S>
bool few_targets(const BilinearAttentionProblem<S>& p) {
    if (p.targets > kFewTargets) return false;
    bool fit = false;
    with_few_targets(p, [&](auto targets) {
        fit = RowLaunch<S>(p, targets(), true).layout.shared_bytes <= device_limits().shared_bytes_per_block;
    });
    return fit;
}

template <typename Math, int kColumnTiles>
struct TileLaunch {
    int64_t target_blocks;
    Grid grid;
    BlockLayout layout;

    explicit TileLaunch(const BilinearAttentionProblem<typename Math::Storage>& p) {
        constexpr int64_t kTargets = kColumnTiles * kTileColumns;
        target_blocks = divide_up<int64_t>(p.targets, kTargets);
        layout = block_layout<Accumulator<Math>>(ProductMemory<Math, kTargets>::bytes(), kTargets, p.steps);
        grid = {p.batch * target_blocks, 1, 1, kProductWarps * kWarp, layout.shared_bytes};
    }
    int64_t workspace() const { return layout.on_chip ? 0 : grid.x * layout.numbers; }
};

template <typename T>
gmem<T> workspace_of(T* workspace, int64_t n) {
    return {n == 0 ? nullptr : workspace, n, "workspace"};
}

}  // namespace

template <typename S>
int64_t bilinear_attention_workspace(const BilinearAttentionProblem<S>& p) {
    int64_t numbers = 0;
    if (few_targets(p)) {
        with_few_targets(p, [&](auto targets) { numbers = RowLaunch<S>(p, targets(), false).workspace(); });
        return numbers;
    }
    with_math<S>(p.tf32, [&](auto math) {
        with_column_tiles(p, [&](auto tiles) { numbers = TileLaunch<decltype(math), tiles()>(p).workspace(); });
    });
    return numbers;
}

template <typename S>
void bilinear_attention_scores(Stream stream, const BilinearAttentionProblem<S>& p, Compute<S>* workspace, S* scores) {
    const Sequences<S> sequences(p);
    const gmem<S> to = {scores, p.rows() * p.steps, "scores"};
    if (few_targets(p)) {
        with_few_targets(p, [&](auto targets) {
            const RowLaunch<S> l(p, targets(), false);
            const Grid grid = p.targets == 0 ? Grid{0, 1, 1, kWarp} : l.grid;
            launch("bilinear_attention_rows", score_rows<S, targets()>, grid, stream, sequences, l.rows, projected(p),
                   workspace_of(workspace, l.workspace()), to);
        });
        return;
    }
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const int64_t H = p.hidden_size;
        const auto states = product_side(sequences.states, p.state_stride_b, p.state_stride_t, 1, p.steps, H);
        const auto g = product_side(projected(p), p.targets * H, H, 1, p.targets, H);
        with_column_tiles(p, [&](auto tiles) {
            const TileLaunch<Math, tiles()> l(p);
            launch("bilinear_attention_tiles", score_tiles<Math, tiles()>, l.grid, stream, sequences, states, g,
                   l.target_blocks, workspace_of(workspace, l.workspace()), to);
        });
    });
}

template <typename S>
int64_t bilinear_attention_backward_workspace(const BilinearAttentionProblem<S>& p) {
    int64_t numbers = p.rows() * p.steps;
    if (few_targets(p)) {
        with_few_targets(p, [&](auto targets) { numbers = RowLaunch<S>(p, targets(), true).workspace(); });
    }
    return numbers;
}

template <typename S>
void bilinear_attention_backward(Stream stream, const BilinearAttentionBackward<S>& p) {
    using T = Compute<S>;
    const int64_t H = p.hidden_size, cells = p.rows() * p.steps;
    const Sequences<S> sequences(p);
    const gmem<const S> scores = {p.scores, cells, "scores"}, grad_scores = {p.grad_scores, cells, "grad_scores"};
    const gmem<S> grad_states = {p.grad_states, p.batch * p.steps * H, "grad_states"};
    const gmem<T> grad_projected = {p.grad_projected, p.rows() * H, "grad_projected"};
    if (few_targets(p)) {
        with_few_targets(p, [&](auto targets) {
            const RowLaunch<S> l(p, targets(), true, p.grad_states);
            launch("bilinear_attention_rows_backward", backward_rows<S, targets()>, l.grid, stream, sequences, l.rows,
                   projected(p), scores, grad_scores, workspace_of(p.workspace, l.workspace()), grad_states, grad_projected);
        });
        return;
    }
    constexpr int kWarps = kElementThreads / kWarp;
    launch("bilinear_attention_logit_gradients", logit_gradients<S>,
           Grid{divide_up<int64_t>(p.rows(), kWarps), 1, 1, kElementThreads}, stream, sequences, scores, grad_scores,
           gmem<T>{p.workspace, cells, "gradients of logits"});
    bilinear_attention_product_gradients(stream, p, p.workspace);
}

#define DIEN_OPS_INSTANTIATE(S)                                                                              \
    template int64_t bilinear_attention_workspace<S>(const BilinearAttentionProblem<S>&);                    \
    template void bilinear_attention_scores<S>(Stream, const BilinearAttentionProblem<S>&, Compute<S>*, S*); \
    template int64_t bilinear_attention_backward_workspace<S>(const BilinearAttentionProblem<S>&);           \
    template void bilinear_attention_backward<S>(Stream, const BilinearAttentionBackward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
