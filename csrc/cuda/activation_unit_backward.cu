// SPDX-License-Identifier: Apache-2.0
// The local activation unit's backward. Contracts: activation_unit.h; tiles, and what a block keeps where: activation_unit.cuh.
//
// unit_grad_logits has a block per pair and turns the gradients of scores and pooled vector into that of the logits, the
// softmax's included. unit_gradients has a block for a run of tiles and of targets. For each tile and target it computes the
// hidden values anew, which takes less time than to write and fetch them, and goes down through the layers: with the gradient
// g of a layer's values before the activation, rounded to the operand type, in shared memory, it adds g^T times the layer's
// inputs to the weight's gradient, and g W is what the layer below gets. A lane that has two numbers of g W has the values
// before the activation at the same places, and leaves the next g there.
//
// Sums have one order, which sizes and lengths fix. A block has its own part of the weights' gradients in global memory (that
// is, in the L2 cache); each number is one lane's alone, in all its tiles, which starts its product from it and needs no
// barrier. The columns' sums (biases, alphas) lie in shared memory, one for every 16 rows of a tile, each a lane's alone too.
// The keys' gradient sums over targets in shared memory, the steps of a tile being the same for all of them; where there are
// few steps, blocks share their targets. The query's gradient sums over steps: a tile leaves a sum for every sequence that it
// has steps of. What blocks and tiles leave behind activation_unit_sums.cu adds up.
//
// Dice with batch statistics needs three sums over all rows before a gradient goes through it. Stage L takes the logits'
// gradient to the last layer's values behind the activation, stage l < L that of layer l through the activation and the
// product to layer l - 1; gradients behind activations lie in global memory between. Without batch statistics all stages are
// one launch.
//
// The floor is three times the forward's products; see there.
#include "cuda/activation_unit_backward.cuh"

namespace dien_ops::cuda {
namespace {

// ---------------------------------------------------------------------------------------------- products over a tile's rows

// Fragments of operands that lie row by row where the product runs over rows: A is g^T, B the layer's inputs. `at` is the first
// row's number of the fragment's first column.
template <typename Math>
struct OverRows;

template <typename T>
struct OverRows<ExactMath<T>> {
    using Math = ExactMath<T>;
    template <typename Memory>
    DIEN_OPS_DEVICE static typename Math::A load_a(const Memory& a, int at, int stride) {
        typename Math::A result;
#pragma unroll
        for (int k = 0; k < Math::kDepth; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) result.row[i].v[k] = a.ld(at + k * stride + tile_row() + i * 8);
        }
        return result;
    }
    template <typename Memory>
    DIEN_OPS_DEVICE static typename Math::B load_b(const Memory& b, int at, int stride) {
        typename Math::B result;
#pragma unroll
        for (int k = 0; k < Math::kDepth; ++k) {
            const auto pair = b.template ld_as<Pack<T, 2>>(at + k * stride + tile_column());
            result.column[0].v[k] = pair.v[0], result.column[1].v[k] = pair.v[1];
        }
        return result;
    }
};

template <>
struct OverRows<Tf32Math> {
    template <typename Memory>
    DIEN_OPS_DEVICE static Tf32Math::A load_a(const Memory& a, int at, int stride) {
        const int i = at + lane_index() % 4 * stride + tile_row();
        return {a.ld(i), a.ld(i + 8), a.ld(i + 4 * stride), a.ld(i + 4 * stride + 8)};
    }
    template <typename Memory>
    DIEN_OPS_DEVICE static Tf32Math::B load_b(const Memory& b, int at, int stride) {
        const int i = at + lane_index() % 4 * stride + tile_row();
        return {b.ld(i), b.ld(i + 4 * stride)};
    }
};

template <typename S>
struct OverRows<HalfMath<S>> {
    using Math = HalfMath<S>;
    template <typename Memory>
    DIEN_OPS_DEVICE static uint32_t two_rows(const Memory& from, int i, int stride) {
        return uint32_t(from.ld(i).bits) | uint32_t(from.ld(i + stride).bits) << 16;
    }
    template <typename Memory>
    DIEN_OPS_DEVICE static typename Math::A load_a(const Memory& a, int at, int stride) {
        const int i = at + tile_column() * stride + tile_row();
        return {two_rows(a, i, stride), two_rows(a, i + 8, stride), two_rows(a, i + 8 * stride, stride),
                two_rows(a, i + 8 * stride + 8, stride)};
    }
    template <typename Memory>
    DIEN_OPS_DEVICE static typename Math::B load_b(const Memory& b, int at, int stride) {
        const int i = at + tile_column() * stride + tile_row();
        return {two_rows(b, i, stride), two_rows(b, i + 8 * stride, stride)};
    }
};

// gradient [outputs, width of inputs] += g^T y, over the tile's rows.
template <typename Math, typename MemoryG, typename MemoryY>
DIEN_OPS_DEVICE void add_weight_gradient(const MemoryG& g, int g_first, const MemoryY& y, int y_first, const UnitLayer& l,
                                         int rows, const gmem<Accumulator<Math>>& gradient, int64_t at) {
    using T = Accumulator<Math>;
    const int g_stride = unit_stride<Math>(l.outputs), y_stride = unit_stride<Math>(l.inputs);
    const int tiles = column_tiles(l.inputs), width = unit_width(l.inputs);
    for_items<Math, kItemTiles>(divide_up(l.outputs, kTileRows), tiles, [&](int m, int first_tile, T(&d)[1][kItemTiles][4]) {
        const auto at_pair = [&](int row, int column) { return at + int64_t(row) * width + column; };
        for_lane_pairs<kItemTiles>(m, first_tile, l.inputs, [&](int half, int n, int row, int column) {
            if (row >= l.outputs) return;
            const auto pair = gradient.template ld_as<Pack<T, 2>>(at_pair(row, column));
            d[0][n][half * 2] = pair.v[0], d[0][n][half * 2 + 1] = pair.v[1];
        });
#pragma unroll 2
        for (int k = 0; k < rows; k += Math::kDepth) {
            const auto a = OverRows<Math>::load_a(g, g_first + k * g_stride + m * kTileRows, g_stride);
#pragma unroll
            for (int n = 0; n < kItemTiles; ++n) {
                const int tile = first_tile + n < tiles ? first_tile + n : tiles - 1;  // some once more: nobody looks at them
                Math::multiply(d[0][n], a, OverRows<Math>::load_b(y, y_first + k * y_stride + tile * kTileColumns, y_stride));
            }
        }
        for_lane_pairs<kItemTiles>(m, first_tile, l.inputs, [&](int half, int n, int row, int column) {
            if (row >= l.outputs) return;
            gradient.st_as(at_pair(row, column), Pack<T, 2>{d[0][n][half * 2], d[0][n][half * 2 + 1]});
        });
    });
}

// ------------------------------------------------------------------------------------------------------------ the logits

template <typename S>
DIEN_OPS_KERNEL(kPairThreads)
void unit_grad_logits(UnitParams<S> p, gmem<const S> scores, gmem<const S> grad_pooled, gmem<const S> grad_scores,
                      gmem<Compute<S>> grad_logits, gmem<Compute<S>> pair_sums) {
    using T = Compute<S>;
    const int64_t pair = block_index(), b = pair / p.s.targets, length = p.length(b), begin = pair * p.s.steps;
    const int D = p.s.dim;
    const auto add = [](T a, T b) { return a + b; };
    Arena arena;
    const auto of_warps = arena.take<T>(kPairWarps, "of warps");
    for (int64_t t = warp_index(); t < length; t += kPairWarps) {
        T sum = 0;
        if (grad_pooled) {
            const int64_t key = (b * p.s.steps + t) * D;
            for (int d = lane_index(); d < D; d += kWarp) {
                sum += to_compute(grad_pooled.ld(pair * D + d)) * to_compute(p.keys.ld(key + d));
            }
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) grad_logits.st(begin + t, sum + (grad_scores ? to_compute(grad_scores.ld(begin + t)) : T(0)));
    }
    sync_block();
    T sum = 0;
    for (int64_t t = thread_index(); t < length; t += kPairThreads) {
        sum += grad_logits.ld(begin + t) * (p.s.softmax ? to_compute(scores.ld(begin + t)) : T(1));
    }
    sum = over_block(of_warps, warp_sum(sum), add);
    if (p.s.softmax) {
        for (int64_t t = thread_index(); t < length; t += kPairThreads) {
            grad_logits.st(begin + t, to_compute(scores.ld(begin + t)) * (grad_logits.ld(begin + t) - sum));
        }
    }
    if (thread_index() == 0) pair_sums.st(pair, p.s.softmax ? T(0) : sum);  // the softmax takes no notice of the bias
}

// ------------------------------------------------------------------------------------------------------------ the layers

template <typename T>
int64_t gradients_fixed(int rows) {
    return UnitRows::bytes(rows) + arena_bytes<T>(rows);
}

// What happens to one number of a layer's values on its way down.
template <typename T>
struct Descent {
    T activation, gradient;  // behind, and before the activation
    T sums[3];               // terms of kSumAlpha, kSumLogit and kSumCentered
};

// value: before the activation; for the sigmoid, behind it. g: the gradient behind it.
template <typename Math, typename T>
DIEN_OPS_DEVICE Descent<T> descend(Activation activation, bool linear, T value, T g, const UnitGate<T>& gate, T mean_g_logit,
                                   T pull) {
    if (linear) return {value, g, {}};
    if (activation == Activation::sigmoid) return {value, g * value * (T(1) - value), {}};
    if (activation == Activation::prelu) {
        const bool positive = value > 0;
        return {positive ? value : gate.alpha * value, positive ? g : gate.alpha * g, {positive ? T(0) : value * g, 0, 0}};
    }
    const T centered = value - gate.mean, p = Math::sigmoid(gate.scale * centered);
    const T g_logit = dice_logit_gradient(g, value, p, gate.alpha);
    return {dice_value(value, p, gate.alpha),
            dice_gradient(g, g_logit, p, gate.alpha, gate.scale, centered, mean_g_logit, pull),
            {g * dice_slope_of_alpha(value, p), g_logit, g_logit * centered}};
}

// A block's memory, and what it does with a tile and a target. kKept: Dice with batch statistics, whose values before the
// activations are kept.
template <typename Math, bool kShared, bool kKept>
struct TileGradients {
    using S = typename Math::Storage;
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    template <typename V>
    using Piece = std::conditional_t<kShared, view<V>, gmem<V>>;
    using Item = T (&)[1][kItemTiles][4];
    static constexpr bool kOneType = std::is_same_v<T, Operand>;
    static constexpr int kTriples = kItemTriples<Math>;

    const UnitGradientParams<S>& p;
    const UnitShape& s;
    UnitRows rows;
    view<T> grad_logit;
    Piece<Operand> x, y, g;  // inputs; activations, but of the last layer; gradients before the activations
    Piece<T> own_values;     // before the activation; for the sigmoid, behind it
    Piece<T> query_terms, keys_sum;
    Piece<T> column_sums;  // [row tiles, unit_sums, columns]
    int64_t tile, c;

    template <typename Memory>
    DIEN_OPS_DEVICE TileGradients(const UnitGradientParams<S>& p, Arena& arena, Memory& memory)
        : p(p),
          s(p.s),
          rows(arena, s.rows),
          grad_logit(arena.take<T>(s.rows, "gradients of logits")),
          x(memory.template take<Operand>(s.rows * s.first_stride, "inputs")),
          y(memory.template take<Operand>(s.rows * s.layer[s.layers - 1].row, "activations")),
          g(memory.template take<Operand>(s.rows * s.row, "gradients")),
          own_values(memory.template take<T>(kOneType ? 0 : s.rows * s.row, "values")),
          query_terms(memory.template take<T>(s.rows * unit_width(s.dim), "terms of grad_query")),
          keys_sum(memory.template take<T>(s.rows * unit_width(s.dim), "sums of grad_keys")),
          column_sums(memory.template take<T>(row_tiles() * sums_size(), "sums of columns")) {}

    DIEN_OPS_DEVICE int row_tiles() const { return s.rows / kTileRows; }
    DIEN_OPS_DEVICE int sums_size() const { return unit_sums(s) * s.columns; }
    DIEN_OPS_DEVICE bool linear() const { return s.hidden_layers == 0; }
    DIEN_OPS_DEVICE int last() const { return s.layers - 1; }
    // Where a layer's rows begin.
    DIEN_OPS_DEVICE int at(int layer) const { return s.rows * s.layer[layer].row; }
    DIEN_OPS_DEVICE int64_t step() const { return tile * s.rows; }
    DIEN_OPS_DEVICE bool present(int row) const { return rows.place.ld(row) >= 0; }
    DIEN_OPS_DEVICE int64_t pair_of(int row) const { return rows.sequence.ld(row) * s.targets + c; }
    DIEN_OPS_DEVICE int64_t score_of(int row) const {
        return pair_of(row) * s.steps + rows.place.ld(row) - rows.sequence.ld(row) * s.steps;
    }
    // Gradients take the places of values, where they have the same type.
    DIEN_OPS_DEVICE const Piece<T>& values() const {
        if constexpr (kOneType) {
            return g;
        } else {
            return own_values;
        }
    }

    // Before the first tile.
    DIEN_OPS_DEVICE void clear() const {
        for (int i = thread_index(); i < row_tiles() * sums_size(); i += kUnitThreads) column_sums.st(i, 0);
        for (int layer = 0; layer < s.layers; ++layer) {
            const int outputs = s.layer[layer].outputs, stride = unit_stride<Math>(outputs);
            clear_tail<Math>(g, at(layer), stride, s.rows, outputs);
            if (layer < last()) clear_tail<Math>(y, at(layer), stride, s.rows, outputs);
        }
    }

    DIEN_OPS_DEVICE void read_logits() const {
        for (int i = thread_index(); i < s.rows; i += kUnitThreads) {
            grad_logit.st(i, present(i) ? p.grad_logits.ld(score_of(i)) : T(0));
        }
    }

    // A pair of values that the forward has kept, or this tile has computed.
    DIEN_OPS_DEVICE Pack<T, 2> value_pair(int layer, int row, int column) const {
        const UnitLayer& l = s.layer[layer];
        if constexpr (kKept) {
            return p.hidden.template ld_if<Pack<T, 2>>(present(row), p.kept(l, c, step() + row) + column);
        } else {
            return values().template ld_as<Pack<T, 2>>(at(layer) + row * unit_stride<Math>(l.outputs) + column);
        }
    }

    // The gradient of the last hidden layer behind its activation; without one, of the logits themselves.
    DIEN_OPS_DEVICE void from_logits(int m, int first_tile, Item d) const {
        const UnitLayer& l = s.layer[last()];
        for_lane_pairs<kItemTiles>(m, first_tile, l.outputs, [&](int half, int n, int row, int column) {
            const auto weight = p.column_pair(kOutputWeight, l, column);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                d[0][n][half * 2 + j] = grad_logit.ld(row) * (linear() ? T(column + j == 0) : weight.v[j]);
            }
        });
    }

    // A layer's item on its way through the activation: d is the gradient behind it. kArriving: it has just come there, and
    // adds what sums need. kLeaving: it goes on, to g; else it waits in global memory for these sums.
    template <bool kArriving, bool kLeaving>
    DIEN_OPS_DEVICE void through_activation(int layer, int m, int first_tile, Item d) const {
        const UnitLayer& l = s.layer[layer];
        const int stride = unit_stride<Math>(l.outputs);
        const bool top = kArriving && layer == last() && !linear();
#pragma unroll
        for (int n = 0; n < kItemTiles; ++n) {
            const int column = (first_tile + n) * kTileColumns + tile_column();
            if ((first_tile + n) * kTileColumns >= l.outputs) break;
            const UnitGates<S> gates(p, l, column);
            Pack<T, 2> mean_g_logit = {}, pull = {};
            if constexpr (kKept && kLeaving) {
                mean_g_logit = p.column_pair(kMeanLogitGradient, l, column);
                pull = p.column_pair(kPull, l, column);
            }
            T sums[kUnitSums][2] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * kTileRows + half * 8 + tile_row();
                const Pack<T, 2> value = value_pair(layer, row, column);
                Pack<Operand, 2> to;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const bool valid = present(row) && column + j < l.outputs;
                    const Descent<T> descent = descend<Math>(s.activation, linear(), value.v[j], d[0][n][half * 2 + j],
                                                             gates.v[j], mean_g_logit.v[j], pull.v[j]);
                    to.v[j] = Math::operand(valid ? descent.gradient : T(0));
                    if (!valid) continue;
                    sums[kSumBias][j] += descent.gradient;
                    if (top) sums[kSumOutput][j] += grad_logit.ld(row) * descent.activation;
#pragma unroll
                    for (int k = 0; k < 3; ++k) sums[kSumAlpha + k][j] += descent.sums[k];
                }
                if constexpr (kLeaving) {
                    g.st_as(at(layer) + row * stride + column, to);
                } else if (present(row)) {
                    const Pack<T, 2> behind = {d[0][n][half * 2], d[0][n][half * 2 + 1]};
                    p.hidden_gradient.st_as(p.kept(l, c, step() + row) + column, behind);
                }
            }
            const auto add = [&](UnitSum kind) {
                const Pack<T, 2> sum = {sum_over_rows(sums[kind][0]), sum_over_rows(sums[kind][1])};
                if (tile_row() > 0) return;
                const int i = m * sums_size() + kind * s.columns + l.columns + column;
                const auto before = column_sums.template ld_as<Pack<T, 2>>(i);
                column_sums.st_as(i, Pack<T, 2>{before.v[0] + sum.v[0], before.v[1] + sum.v[1]});
            };
            if constexpr (kLeaving) add(kSumBias);
            if constexpr (kArriving) {
                if (top) add(kSumOutput);
                if (s.activation != Activation::sigmoid) add(kSumAlpha);
                if constexpr (kKept) add(kSumLogit), add(kSumCentered);
            }
        }
    }

    // Stage L: to the gradient of the last layer. The values of all layers are computed on the way, or kept.
    DIEN_OPS_DEVICE void from_scores() const {
        if constexpr (kKept) {
            for_items<Math, kItemTiles>(row_tiles(), item_tiles(s.layer[last()].outputs), [&](int m, int first_tile, Item d) {
                from_logits(m, first_tile, d);
                through_activation<true, false>(last(), m, first_tile, d);
            });
            sync_block();
            return;
        }
        for (int layer = 0; layer < s.layers; ++layer) {
            const UnitLayer& l = s.layer[layer];
            const int stride = unit_stride<Math>(l.inputs), next = unit_stride<Math>(l.outputs), tiles = item_tiles(l.outputs);
            for_items<Math, kItemTiles>(row_tiles(), tiles, [&](int m, int first_tile, Item d) {
                const auto multiply = [&](const auto& inputs, int first) {
                    multiply_tiles<Math>(d, inputs, first + m * kTileRows * stride, stride, p.packed,
                                         l.forward / kTileNumbers<Math> + first_tile, tiles, 0, depth_tiles<Math>(l.inputs));
                };
                layer == 0 ? multiply(x, 0) : multiply(y, at(layer - 1));
                for_lane_pairs<kItemTiles>(m, first_tile, l.outputs, [&](int half, int n, int row, int column) {
                    const auto bias = p.column_pair(kBias, l, column);
                    const UnitGates<S> gates(p, l, column);
                    Pack<T, 2> value;
                    Pack<Operand, 2> to;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const T z = d[0][n][half * 2 + j] + bias.v[j];
                        const T a = activate<Math>(s.activation, linear(), z, gates.v[j]);
                        value.v[j] = s.activation == Activation::sigmoid ? a : z;
                        to.v[j] = Math::operand(column + j < l.outputs ? a : T(0));
                    }
                    values().st_as(at(layer) + row * next + column, value);
                    if (layer < last()) y.st_as(at(layer) + row * next + column, to);
                });
                if (layer < last()) return;
                from_logits(m, first_tile, d);
                through_activation<true, true>(last(), m, first_tile, d);
            });
            sync_block();
        }
    }

    // Before stage l, where values are kept: g of layer l, from the gradient that waits behind its activation, and its inputs.
    DIEN_OPS_DEVICE void resume(int layer) const {
        const UnitLayer& l = s.layer[layer];
        if (layer > 0) load_activations<Math>(p, p.hidden, rows, tile, c, layer - 1, y, at(layer - 1));
        for_items<Math, kItemTiles>(row_tiles(), item_tiles(l.outputs), [&](int m, int first_tile, Item d) {
            for_lane_pairs<kItemTiles>(m, first_tile, l.outputs, [&](int half, int n, int row, int column) {
                if (!present(row)) return;
                const auto pair = p.hidden_gradient.template ld_as<Pack<T, 2>>(p.kept(l, c, step() + row) + column);
                d[0][n][half * 2] = pair.v[0], d[0][n][half * 2 + 1] = pair.v[1];
            });
            through_activation<false, true>(layer, m, first_tile, d);
        });
        sync_block();
    }

    // Stage l > 0: from g of layer l to the layer below.
    DIEN_OPS_DEVICE void through_layer(int layer) const {
        const UnitLayer& l = s.layer[layer];
        const int stride = unit_stride<Math>(l.outputs), tiles = item_tiles(l.inputs);
        add_weight_gradient<Math>(g, at(layer), y, at(layer - 1), l, s.rows, p.gradients, gradient(l));
        for_items<Math, kItemTiles>(row_tiles(), tiles, [&](int m, int first_tile, Item d) {
            multiply_tiles<Math>(d, g, at(layer) + m * kTileRows * stride, stride, p.packed,
                                 l.backward / kTileNumbers<Math> + first_tile, tiles, 0, depth_tiles<Math>(l.outputs));
            through_activation<true, !kKept>(layer - 1, m, first_tile, d);
        });
        sync_block();
    }

    // Stage 0: from g of the first layer to query and keys. A lane has the gradients of q, k and q * k at the same places.
    DIEN_OPS_DEVICE void through_first_layer(bool first_target, bool last_target, int64_t target_part) const {
        const UnitLayer& l = s.layer[0];
        const int D = s.dim, width = unit_width(D), stride = unit_stride<Math>(l.outputs), tiles = 3 * item_triples<Math>(D);
        add_weight_gradient<Math>(g, 0, x, 0, l, s.rows, p.gradients, gradient(l));
        for_items<Math, 3 * kTriples>(row_tiles(), tiles, [&](int m, int first_tile, T(&d)[1][3 * kTriples][4]) {
            const auto for_numbers = [&](const auto& f) {  // f(n, i, row, e)
#pragma unroll
                for (int n = 0; n < kTriples; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int e = (first_tile / 3 + n) * kTileColumns + tile_column() + i % 2;
                        f(n, i, m * kTileRows + i / 2 * 8 + tile_row(), e);
                    }
                }
            };
            S grad_pooled[kTriples][4], score[2];  // on their way while the product runs
            for_numbers([&](int n, int i, int row, int e) {
                const bool here = e < D && present(row) && p.grad_pooled;
                grad_pooled[n][i] = p.grad_pooled.template ld_if<S>(here, pair_of(row) * D + e);
                if (n == 0 && i % 2 == 0)
                    score[i / 2] = p.scores.template ld_if<S>(present(row) && p.grad_pooled, score_of(row));
            });
            multiply_tiles<Math>(d, g, m * kTileRows * stride, stride, p.packed, l.backward / kTileNumbers<Math> + first_tile,
                                 tiles, 0, depth_tiles<Math>(l.outputs));
            for_numbers([&](int n, int i, int row, int e) {
                if (e >= D) return;
                const T of_product = d[0][3 * n + 2][i];
                const T q = to_compute(x.ld(row * s.first_stride + e)), k = to_compute(x.ld(row * s.first_stride + D + e));
                query_terms.st(row * width + e, present(row) ? d[0][3 * n][i] + k * of_product : T(0));
                if (!present(row)) return;
                T sum = d[0][3 * n + 1][i] + q * of_product + to_compute(score[i / 2]) * to_compute(grad_pooled[n][i]);
                if (!first_target) sum += keys_sum.ld(row * width + e);
                const int64_t to = rows.place.ld(row) * D + e;
                if (!last_target) {
                    keys_sum.st(row * width + e, sum);
                } else if (p.target_parts > 1) {
                    p.keys_sums.st(target_part * s.batch * s.steps * D + to, sum);
                } else {
                    p.grad_keys.st(to, to_storage<S>(sum));
                }
            });
        });
        sync_block();
        // Of every sequence in the tile, the sum over its steps.
        for (int i = thread_index(); i < s.rows * D; i += kUnitThreads) {
            const int row = i / D, e = i % D;
            const int64_t b = rows.sequence.ld(row);
            if (b < 0 || (row > 0 && rows.sequence.ld(row - 1) == b)) continue;
            T sum = 0;
#pragma unroll 4
            for (int r = row; r < s.rows; ++r) {
                if (rows.sequence.ld(r) != b) break;
                sum += query_terms.ld(r * width + e);
            }
            p.query_sums.st(((tile + b) * s.targets + c) * D + e, sum);
        }
    }

    DIEN_OPS_DEVICE int64_t gradient(const UnitLayer& l) const { return block_index() * s.gradient + l.gradient; }

    // After the last tile: the sums of this launch, added to those of earlier ones.
    DIEN_OPS_DEVICE void store_sums(bool first_launch) const {
        for (int i = thread_index(); i < sums_size(); i += kUnitThreads) {
            const int64_t to = block_index() * sums_size() + i;
            T sum = first_launch ? T(0) : p.sums.ld(to);
            for (int m = 0; m < row_tiles(); ++m) sum += column_sums.ld(m * sums_size() + i);
            p.sums.st(to, sum);
        }
    }
};

template <typename Math, bool kShared, bool kKept>
DIEN_OPS_KERNEL((kUnitResidentThreads<Math, kShared>))
void unit_gradients(UnitGradientParams<typename Math::Storage> p, int first_stage, int last_stage) {
    const UnitShape& s = p.s;
    Arena arena;
    GlobalArena workspace(p.workspace, s.memory_bytes);
    TileGradients<Math, kShared, kKept> work(p, arena, state_arena<kShared>(arena, workspace));

    const int64_t tile_part = block_index() % p.tile_parts, target_part = block_index() / p.tile_parts;
    const int64_t tiles = p.tiles(), end_tile = tiles * (tile_part + 1) / p.tile_parts;
    const int64_t first_target = s.targets * target_part / p.target_parts;
    const int64_t end_target = s.targets * (target_part + 1) / p.target_parts;
    const bool first_launch = first_stage == s.hidden_layers;
    if (first_launch) {
        for (int64_t i = thread_index(); i < s.gradient; i += kUnitThreads) p.gradients.st(block_index() * s.gradient + i, 0);
    }
    work.clear();
    sync_block();
    for (int64_t tile = tiles * tile_part / p.tile_parts; tile < end_tile; ++tile) {
        p.read_rows(work.rows, tile);
        sync_block();
        for (int64_t c = first_target; c < end_target; ++c) {
            work.tile = tile, work.c = c;
            work.read_logits();
            if (!kKept || last_stage == 0) build_inputs<Math>(p, work.rows, c, work.x);
            sync_block();
            for (int stage = first_stage; stage >= last_stage; --stage) {
                if (stage == s.hidden_layers) work.from_scores();
                if (stage == s.layers) continue;
                if constexpr (kKept) work.resume(stage);
                if (stage > 0) {
                    work.through_layer(stage);
                } else {
                    work.through_first_layer(c == first_target, c + 1 == end_target, target_part);
                }
            }
            sync_block();
        }
    }
    work.store_sums(first_launch);
}

template <typename Math, typename S>
UnitShape gradients_shape(const UnitProblem<S>& p) {
    using T = Compute<S>;
    UnitShape s = unit_shape<Math>(p);
    const auto memory = [&](int64_t rows) {
        return arena_bytes<S>(rows * s.first_stride) + arena_bytes<S>(rows * s.layer[s.layers - 1].row) +
               arena_bytes<S>(rows * s.row) + arena_bytes<T>(std::is_same_v<S, T> ? 0 : rows * s.row) +
               2 * arena_bytes<T>(rows * unit_width(s.dim)) + arena_bytes<T>(rows / kTileRows * unit_sums(s) * s.columns);
    };
    choose_rows(s, memory, gradients_fixed<T>);
    return s;
}

}  // namespace

template <typename S>
int64_t unit_backward_workspace(const UnitProblem<S>& p) {
    int64_t bytes = 0;
    with_math<S>(p.tf32, [&](auto math) {
        const UnitShape s = gradients_shape<decltype(math)>(p);
        bytes = s.shared ? 0 : UnitParts(s, sizeof(Compute<S>)).blocks() * s.memory_bytes;
    });
    return bytes;
}

template <typename S>
int64_t unit_backward_partial(const UnitProblem<S>& p) {
    int64_t numbers = 0;
    with_math<S>(p.tf32,
                 [&](auto math) { numbers = UnitParts(gradients_shape<decltype(math)>(p), sizeof(Compute<S>)).numbers; });
    return numbers;
}

template <typename S>
void unit_backward(Stream stream, const UnitBackward<S>& p) {
    using T = Compute<S>;
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const UnitShape s = gradients_shape<Math>(p);
        // The given statistics, layer by layer, for Dice's columns: the batch's are as good as given here.
        std::vector<const T*> means, vars;
        if (s.activation == Activation::dice) {
            for (int i = 0; i < s.hidden_layers; ++i) {
                means.push_back(p.statistics + s.layer[i].statistic);
                vars.push_back(p.statistics + s.statistics + s.layer[i].statistic);
            }
        }
        unit_prepare<Math>(stream, p, s, true, means, vars, nullptr);
        const UnitGradientParams<S> params(p, s, UnitParts(s, sizeof(T)));
        launch("unit_grad_logits", unit_grad_logits<S>, Grid{p.pairs(), 1, 1, kPairThreads, arena_bytes<T>(kPairWarps)}, stream,
               params, params.scores, params.grad_pooled, gmem<const S>{p.grad_scores, p.rows(), "grad_scores"},
               gmem<T>{p.grad_logits, p.rows(), "grad_logits"}, params.pair_sums);

        const Grid grid = {params.blocks(), 1, 1, kUnitThreads, unit_shared_bytes(s, gradients_fixed<T>)};
        const auto stages = [&](int first, int last) {
            with_constant(s.shared, [&](auto shared) {
                with_constant(p.batch_statistics, [&](auto kept) {
                    launch("unit_gradients", unit_gradients<Math, shared(), kept()>, grid, stream, params, first, last);
                });
            });
        };
        if (p.batch_statistics) {
            for (int stage = s.hidden_layers; stage > 0; --stage) {
                stages(stage, stage);
                unit_feed_back(stream, p, params, stage - 1);
            }
        }
        stages(p.batch_statistics ? 0 : s.hidden_layers, 0);
        unit_sum_gradients(stream, p, params);
    });
}

#define DIEN_OPS_INSTANTIATE(S)                                         \
    template int64_t unit_backward_workspace<S>(const UnitProblem<S>&); \
    template int64_t unit_backward_partial<S>(const UnitProblem<S>&);   \
    template void unit_backward<S>(Stream, const UnitBackward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)

}  // namespace dien_ops::cuda
