// SPDX-License-Identifier: Apache-2.0
// The local activation unit (DIN eq. 3): v_U = sum over t of a(e_t, v_A) e_t, where a is a small network over the query q = v_A
// and the key k = e_t. Contracts: activation_unit.h; tiles, and what a block keeps where: activation_unit.cuh.
//
// Without Dice's batch statistics there are two launches over the data. unit_logits takes a tile through all layers, each
// layer's values going from one half of the block's memory to the other, and only a logit per row leaves it. unit_pool has a
// block per pair: softmax, where it is asked for, and the weighted sum of the keys, which it reads again (from the L2 cache:
// the keys of a batch of 1024, T 50, D 36 are 7 MB).
//
// With batch statistics a layer needs the moments of all rows of the layer below. Stage l < L computes layer l before its
// activation and keeps it, with count, mean and squared deviations of each column for every 16 rows, taken in registers;
// merge_moments joins these in a fixed order; stage L ends in the logits. Without batch statistics the same kernel runs all
// stages at once.
//
// The floor, for an H100: 2 (2 D H1 + H1 H2 + H2) operations per row on matrix units (half of this kernel's first layer more,
// for W_q q of every row), 2 exponentials or reciprocals per hidden value, 16 of them per multiprocessor and cycle, and the
// keys' bytes over 3.35 TB/s. For B 1024, T 50, D 36 and 80-40-1 in tf32: 0.9 GFLOP, about 3 us at 300 TFLOP/s; 12.3 M
// exponentials, 3.4 us; 7.4 MB, 2.2 us. So launches count as much as any of these: a call has one for each layer's weights,
// two for data, and three for lengths.
#include "cuda/activation_unit.cuh"

namespace dien_ops::cuda {
namespace {

// ----------------------------------------------------------------------------------------------------- weights and columns

template <typename T>
struct LayerParameters {
    gmem<const T> weight, bias, alpha, mean, var, output_weight;  // those that are not there: absent
    DiceEps eps;
    bool backward;  // pack the weight for it too
};

// Of a layer's weight as it is used: output o, input i; of the first layer's x = [q, k, q * k] from torch's [q, k, q - k, q *
// k].
template <typename T>
DIEN_OPS_DEVICE T used_weight(const gmem<const T>& weight, const UnitLayer& l, bool first, int dim, int o, int i) {
    if (!first) return weight.ld(int64_t(o) * l.inputs + i);
    const int part = i / dim, d = i % dim;
    const int64_t row = int64_t(o) * 4 * dim + d;
    if (part == 0) return weight.ld(row) + weight.ld(row + 2 * dim);
    if (part == 1) return weight.ld(row + dim) - weight.ld(row + 2 * dim);
    return weight.ld(row + 3 * dim);
}

// A number of a packed weight or a column for each thread, one after the other.
template <typename Math>
DIEN_OPS_KERNEL(kElementThreads)
void prepare_layer(UnitShape s, int layer, LayerParameters<Accumulator<Math>> p, gmem<typename Math::Operand> packed,
                   gmem<Accumulator<Math>> columns, gmem<Accumulator<Math>> statistics) {
    using T = Accumulator<Math>;
    const UnitLayer& l = s.layer[layer];
    const int64_t forward = l.backward - l.forward;
    const int64_t end = layer + 1 < s.layers ? s.layer[layer + 1].forward : s.packed;
    const int64_t numbers = p.backward ? end - l.forward : forward;
    int64_t i = element_index();
    if (i < numbers) {
        const bool back = i >= forward;
        const int64_t at = back ? i - forward : i, tile = at / kTileNumbers<Math>;
        // The place of a number in its tile is one to one: a thread takes (n, k), wherever that lies.
        const int n = at % kTileColumns, k = at / kTileColumns % Math::kDepth;
        const bool triples = back && layer == 0;
        const int across = !back ? item_tiles(l.outputs) : triples ? 3 * item_triples<Math>(s.dim) : item_tiles(l.inputs);
        const int column = tile % across, depth = static_cast<int>(tile / across) * Math::kDepth + k;
        int o = depth, input = column * kTileColumns + n;
        bool present = input < l.inputs;
        if (!back) {
            o = column * kTileColumns + n, input = depth;
            present = input < l.inputs;
        } else if (triples) {
            const int d = column / 3 * kTileColumns + n;
            input = column % 3 * s.dim + d;
            present = d < s.dim;
        }
        const T value = present && o < l.outputs ? used_weight(p.weight, l, layer == 0, s.dim, o, input) : T(0);
        packed.st(l.forward + (i - at) + tile * kTileNumbers<Math> + Math::position(n, k), Math::operand(value));
        return;
    }
    i -= numbers;
    if (i >= unit_width(l.outputs)) return;
    const bool present = i < l.outputs;
    const auto column = [&](UnitColumn kind, T value) { columns.st(int64_t(kind) * s.columns + l.columns + i, value); };
    const T mean = present && p.mean ? p.mean.ld(i) : T(0), var = present && p.var ? p.var.ld(i) : T(0);
    column(kBias, present ? p.bias.ld(i) : T(0));
    column(kAlpha, present && p.alpha ? p.alpha.ld(i) : T(0));
    column(kMean, mean);
    column(kScale, present && p.var ? T(1.0 / p.eps.divisor(var)) : T(0));
    column(kOutputWeight, present && p.output_weight ? p.output_weight.ld(i) : T(0));
    if (statistics && present && s.hidden_layers > 0) {
        statistics.st(l.statistic + i, mean);
        statistics.st(s.statistics + l.statistic + i, var);
    }
}

// What of `hidden` no row writes: rows behind the last step, and columns behind the last tile. A thread for each row.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void clear_hidden(UnitParams<S> p, gmem<Compute<S>> hidden) {
    const int64_t i = element_index(), steps = p.s.batch * p.s.steps;
    if (i >= steps * p.s.targets) return;
    const bool present = i % steps < p.total_steps();
    for (int layer = 0; layer < p.s.layers; ++layer) {
        const UnitLayer& l = p.s.layer[layer];
        const int begin = present ? column_tiles(l.outputs) * kTileColumns : 0;
        for (int column = begin; column < l.kept; ++column) hidden.st(p.kept(l, i / steps, i % steps) + column, 0);
    }
}

// ------------------------------------------------------------------------------------------------------------ the layers

template <typename S>
struct LogitsParams : UnitParams<S> {
    using T = Compute<S>;
    gmem<const T> output_bias;
    gmem<T> logits, hidden;
    gmem<double> moments;  // [2, outputs, moment_parts]: mean and squared deviation of 16 rows of the stage's layer

    LogitsParams(const UnitForward<S>& p, const UnitShape& s, int64_t blocks, int64_t moments_size)
        : UnitParams<S>(p, s, blocks),
          output_bias(p.biases.back(), 1, "bias of the output"),
          logits(p.logits, p.rows(), "logits"),
          hidden(p.hidden, s.hidden, "hidden"),
          moments(p.moments, moments_size, "moments") {}
};

// Row tiles of all tiles, in an order of their own: those of one target after the other.
DIEN_OPS_HOST_DEVICE int64_t moment_parts(const UnitShape& s) { return s.targets * s.most_tiles() * (s.rows / kTileRows); }

int64_t logits_fixed(int rows) { return UnitRows::bytes(rows); }

template <typename Math, bool kShared>
DIEN_OPS_KERNEL((kUnitResidentThreads<Math, kShared>))
void unit_logits(LogitsParams<typename Math::Storage> p, int first_stage, int last_stage) {
    using S = typename Math::Storage;
    using T = Accumulator<Math>;
    using Operand = typename Math::Operand;
    const UnitShape& s = p.s;
    Arena arena;
    GlobalArena workspace(p.workspace, s.memory_bytes);
    const UnitRows rows(arena, s.rows);
    auto& memory = state_arena<kShared>(arena, workspace);
    const auto even = memory.template take<Operand>(s.rows * s.most_even, "inputs of even layers");
    const auto odd = memory.template take<Operand>(s.rows * s.most_odd, "inputs of odd layers");

    const int row_tiles = s.rows / kTileRows;
    const int64_t works = p.tiles() * s.targets;
    for (int64_t work = block_index(); work < works; work += grid_blocks()) {
        const int64_t tile = work / s.targets, c = work % s.targets;
        const auto logit_of = [&](int row) {
            const int64_t b = rows.sequence.ld(row);
            return (b * s.targets + c) * s.steps + rows.place.ld(row) - b * s.steps;
        };
        p.read_rows(rows, tile);
        sync_block();
        if (first_stage == 0) {
            build_inputs<Math>(p, rows, c, even);
        } else {
            const auto to = first_stage % 2 ? odd : even;
            load_activations<Math>(p, gmem<const T>(p.hidden), rows, tile, c, first_stage - 1, to, 0);
        }
        sync_block();
        for (int stage = first_stage; stage <= last_stage && stage < s.layers; ++stage) {
            const UnitLayer& l = s.layer[stage];
            const auto from = stage % 2 ? odd : even;
            const auto to = stage % 2 ? even : odd;
            const int stride = unit_stride<Math>(l.inputs), next = unit_stride<Math>(l.outputs);
            const int tiles = item_tiles(l.outputs);
            for_items<Math, kItemTiles>(row_tiles, tiles, [&](int m, int first_tile, T(&d)[1][kItemTiles][4]) {
                multiply_tiles<Math>(d, from, m * kTileRows * stride, stride, p.packed,
                                     l.forward / kTileNumbers<Math> + first_tile, tiles, 0, depth_tiles<Math>(l.inputs));
                if (s.batch_statistics) {
                    const int64_t step = tile * s.rows + m * kTileRows, left = p.total_steps() - step;
                    const T count = left < kTileRows ? T(left) : T(kTileRows);
                    const int64_t part = (c * s.most_tiles() + tile) * row_tiles + m, parts = moment_parts(s);
#pragma unroll
                    for (int n = 0; n < kItemTiles; ++n) {
                        const int column = (first_tile + n) * kTileColumns + tile_column();
                        if ((first_tile + n) * kTileColumns >= l.outputs) break;
                        const auto bias = p.column_pair(kBias, l, column);
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            Pack<T, 2> z;
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                T& value = d[0][n][half * 2 + j];
                                value = column + j < l.outputs ? value + bias.v[j] : T(0);
                                z.v[j] = value;
                            }
                            if (tile_row() + half * 8 < left) {
                                p.hidden.st_as(p.kept(l, c, step + tile_row() + half * 8) + column, z);
                            }
                        }
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const bool here = tile_row() < left, below = tile_row() + 8 < left;
                            const T mean = sum_over_rows((here ? d[0][n][j] : 0) + (below ? d[0][n][2 + j] : 0)) / count;
                            const T a = here ? d[0][n][j] - mean : 0, b = below ? d[0][n][2 + j] - mean : 0;
                            const T deviation = sum_over_rows(a * a + b * b);
                            if (tile_row() == 0 && left > 0 && column + j < l.outputs) {
                                p.moments.st((column + j) * parts + part, mean);
                                p.moments.st((l.outputs + column + j) * parts + part, deviation);
                            }
                        }
                    }
                    return;
                }
                for_lane_pairs<kItemTiles>(m, first_tile, l.outputs, [&](int half, int n, int row, int column) {
                    const auto bias = p.column_pair(kBias, l, column);
                    const UnitGates<S> gates(p, l, column);
                    Pack<Operand, 2> y;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const T z = d[0][n][half * 2 + j] + bias.v[j];
                        y.v[j] = Math::operand(
                            column + j < l.outputs ? activate<Math>(s.activation, s.hidden_layers == 0, z, gates.v[j]) : T(0));
                    }
                    if (s.hidden_layers > 0) {
                        to.st_as(row * next + column, y);
                    } else if (column == 0 && rows.place.ld(row) >= 0) {
                        p.logits.st(logit_of(row), d[0][n][half * 2] + bias.v[0]);
                    }
                });
            });
            if (!s.batch_statistics && s.hidden_layers > 0) clear_tail<Math>(to, 0, next, s.rows, l.outputs);
            sync_block();
        }
        if (last_stage == s.hidden_layers && s.hidden_layers > 0) {
            const UnitLayer& l = s.layer[s.layers - 1];
            const auto from = s.layers % 2 ? odd : even;
            const int stride = unit_stride<Math>(l.outputs), quarter = thread_index() % 4;
            for (int first = 0; first < s.rows; first += kUnitThreads / 4) {
                const int row = first + thread_index() / 4;
                T sum = 0;
                if (row < s.rows) {
                    for (int o = quarter; o < l.outputs; o += 4) {
                        sum += to_compute(from.ld(row * stride + o)) *
                               p.columns.ld(int64_t(kOutputWeight) * s.columns + l.columns + o);
                    }
                }
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                if (quarter == 0 && row < s.rows && rows.place.ld(row) >= 0) {
                    p.logits.st(logit_of(row), sum + p.output_bias.ld(0));
                }
            }
        }
        sync_block();
    }
}

// The batch's mean and variance of a layer's column, from the moments of its rows, and its scale. A block for each column.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void merge_moments(UnitParams<S> p, int layer, DiceEps eps, gmem<const double> moments, gmem<Compute<S>> columns,
                   gmem<Compute<S>> statistics) {
    using T = Compute<S>;
    const UnitLayer& l = p.s.layer[layer];
    const int64_t column = block_index(), parts = moment_parts(p.s), steps = p.total_steps();
    const int row_tiles = p.s.rows / kTileRows;
    const int64_t per_target = p.s.most_tiles() * row_tiles, used = divide_up<int64_t>(steps, kTileRows);
    DiceMoments mine = {};
    for (int64_t i = thread_index(); i < used * p.s.targets; i += kElementThreads) {
        const int64_t c = i / used, m = i % used, left = steps - m * kTileRows, part = c * per_target + m;
        mine.join({{left < kTileRows ? double(left) : double(kTileRows), moments.ld(column * parts + part),
                    moments.ld((l.outputs + column) * parts + part)}});
    }
    mine = join_block(mine);
    if (thread_index() > 0) return;
    const T mean = T(mine.mean()), var = T(mine.var());
    columns.st(int64_t(kMean) * p.s.columns + l.columns + column, mean);
    columns.st(int64_t(kScale) * p.s.columns + l.columns + column, T(1.0 / eps.divisor(var)));
    statistics.st(l.statistic + column, mean);
    statistics.st(p.s.statistics + l.statistic + column, var);
}

// --------------------------------------------------------------------------------------------------------- softmax, pooling

constexpr int kPoolSteps = 128;  // at a time

// A pair's scores from its logits, and its pooled vector: warps take steps in turns, their lanes 32 numbers of the keys.
template <typename S>
DIEN_OPS_KERNEL(kPairThreads)
void unit_pool(UnitParams<S> p, gmem<const Compute<S>> logits, gmem<S> scores, gmem<S> pooled) {
    using T = Compute<S>;
    const int64_t pair = block_index(), b = pair / p.s.targets, length = p.length(b), begin = pair * p.s.steps;
    const int D = p.s.dim;
    Arena arena;
    const auto of_warps = arena.take<T>(kPairWarps, "of warps");
    const auto chunk = arena.take<T>(kPoolSteps, "scores");
    const auto sums = arena.take<T>(kPairThreads, "sums");
    T most = 0, scale = 1;
    if (p.s.softmax && length > 0) {
        most = logits.ld(begin);
        for (int64_t t = thread_index(); t < length; t += kPairThreads) {
            const T logit = logits.ld(begin + t);
            most = most < logit ? logit : most;
        }
        most = over_block(of_warps, warp_max(most), [](T a, T b) { return a < b ? b : a; });
        T sum = 0;
        for (int64_t t = thread_index(); t < length; t += kPairThreads) sum += exp_exact(logits.ld(begin + t) - most);
        scale = T(1) / over_block(of_warps, warp_sum(sum), [](T a, T b) { return a + b; });
    }
    const auto score = [&](int64_t t) {
        const T logit = logits.ld(begin + t);
        return p.s.softmax ? exp_exact(logit - most) * scale : logit;
    };
    for (int64_t t = thread_index(); t < p.s.steps; t += kPairThreads) {
        scores.st(begin + t, to_storage<S>(t < length ? score(t) : T(0)));
    }
    for (int first = 0; first < D; first += kWarp) {
        const int d = first + lane_index();
        T sum = 0;
        for (int64_t t0 = 0; t0 < length; t0 += kPoolSteps) {
            const int count = length - t0 < kPoolSteps ? static_cast<int>(length - t0) : kPoolSteps;
            sync_block();
            if (thread_index() < count) chunk.st(thread_index(), score(t0 + thread_index()));
            sync_block();
            const int64_t keys = (b * p.s.steps + t0) * D + d;
#pragma unroll 8
            for (int t = warp_index(); t < count; t += kPairWarps) {
                sum += chunk.ld(t) * to_compute(p.keys.template ld_if<S>(d < D, keys + int64_t(t) * D));
            }
        }
        sync_block();
        sums.st(thread_index(), sum);
        sync_block();
        if (warp_index() == 0 && d < D) {
            T total = sums.ld(lane_index());
            for (int i = 1; i < kPairWarps; ++i) total += sums.ld(i * kWarp + lane_index());
            pooled.st(pair * D + d, to_storage<S>(total));
        }
    }
}

int64_t pool_bytes(int64_t size) { return arena_bytes<char>(kPairWarps * size) + (kPoolSteps + kPairThreads) * size; }

// ---------------------------------------------------------------------------------------------------------------- launches

template <typename Math, typename S>
UnitShape logits_shape(const UnitProblem<S>& p) {
    UnitShape s = unit_shape<Math>(p);
    const auto memory = [&](int rows) {
        return arena_bytes<S>(int64_t(rows) * s.most_even) + arena_bytes<S>(int64_t(rows) * s.most_odd);
    };
    choose_rows(s, memory, logits_fixed);
    return s;
}

// Blocks of a launch: one for each tile and target, but where these take global memory only as many as run at a time.
template <typename S>
int64_t logits_blocks(const UnitProblem<S>& p, const UnitShape& s) {
    const int64_t works = s.most_tiles() * p.targets;
    return s.shared ? works : std::min<int64_t>(works, 4 * device_limits().multiprocessors);
}

}  // namespace

template <typename S>
int64_t unit_packed_size(const UnitProblem<S>& p) {
    int64_t size = 0;
    with_math<S>(p.tf32, [&](auto math) { size = unit_shape<decltype(math)>(p).packed; });
    return size;
}

template <typename S>
int64_t unit_columns_size(const UnitProblem<S>& p) {
    int64_t size = 0;
    with_math<S>(p.tf32, [&](auto math) { size = int64_t(kUnitColumns) * unit_shape<decltype(math)>(p).columns; });
    return size;
}

template <typename Math, typename S>
void unit_prepare(Stream stream, const UnitProblem<S>& p, const UnitShape& s, bool backward,
                  const std::vector<const Compute<S>*>& means, const std::vector<const Compute<S>*>& vars,
                  Compute<S>* statistics) {
    using T = Compute<S>;
    for (int layer = 0; layer < s.layers; ++layer) {
        const UnitLayer& l = s.layer[layer];
        const int64_t H = l.outputs, inputs = layer == 0 ? 4 * p.embedding_dim : l.inputs;
        const auto column = [&](const std::vector<const T*>& all, const char* name) {
            return all.empty() ? gmem<const T>() : gmem<const T>(all[layer], H, name);
        };
        LayerParameters<T> parameters = {};
        parameters.weight = {p.weights[layer], H * inputs, "weight"};
        parameters.bias = column(p.biases, "bias");
        parameters.alpha = column(p.alphas, "alpha");
        parameters.mean = column(means, "mean");
        parameters.var = column(vars, "var");
        if (layer + 1 == s.hidden_layers) parameters.output_weight = {p.weights.back(), H, "weight of the output"};
        parameters.eps = p.eps, parameters.backward = backward;
        const int64_t end = layer + 1 < s.layers ? s.layer[layer + 1].forward : s.packed;
        const int64_t numbers = (backward ? end : l.backward) - l.forward;
        launch("unit_prepare", prepare_layer<Math>, element_grid(numbers + unit_width(l.outputs)), stream, s, layer, parameters,
               gmem<S>{p.packed, s.packed, "packed weights"}, gmem<T>{p.columns, int64_t(kUnitColumns) * s.columns, "columns"},
               gmem<T>{statistics, 2 * s.statistics, "statistics"});
    }
}

template <typename S>
int64_t unit_forward_workspace(const UnitProblem<S>& p) {
    int64_t bytes = 0;
    with_math<S>(p.tf32, [&](auto math) {
        const UnitShape s = logits_shape<decltype(math)>(p);
        bytes = s.shared ? 0 : logits_blocks(p, s) * s.memory_bytes;
    });
    return bytes;
}

template <typename S>
int64_t unit_moments_size(const UnitProblem<S>& p) {
    if (!p.batch_statistics) return 0;
    int64_t size = 0;
    with_math<S>(p.tf32, [&](auto math) {
        const UnitShape s = logits_shape<decltype(math)>(p);
        for (int i = 0; i < s.layers; ++i) size = std::max(size, 2 * s.layer[i].outputs * moment_parts(s));
    });
    return size;
}

template <typename S>
void unit_forward(Stream stream, const UnitForward<S>& p) {
    using T = Compute<S>;
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        const UnitShape s = logits_shape<Math>(p);
        const int64_t blocks = logits_blocks(p, s), moments = unit_moments_size(p);
        unit_prepare<Math>(stream, p, s, false, p.means, p.vars, p.statistics);
        const LogitsParams<S> params(p, s, blocks, moments);
        const Grid grid = {blocks, 1, 1, kUnitThreads, unit_shared_bytes(s, logits_fixed)};
        const auto stages = [&](int first, int last) {
            launch("unit_logits", s.shared ? unit_logits<Math, true> : unit_logits<Math, false>, grid, stream, params, first,
                   last);
        };
        if (p.batch_statistics) {
            launch("unit_clear_hidden", clear_hidden<S>, element_grid(p.rows()), stream, params, params.hidden);
            for (int layer = 0; layer < s.hidden_layers; ++layer) {
                stages(layer, layer);
                launch("unit_merge_moments", merge_moments<S>,
                       Grid{s.layer[layer].outputs, 1, 1, kElementThreads, join_block_bytes<DiceMoments>(kElementThreads)},
                       stream, params, layer, p.eps, gmem<const double>(params.moments),
                       gmem<T>{p.columns, int64_t(kUnitColumns) * s.columns, "columns"},
                       gmem<T>{p.statistics, 2 * s.statistics, "statistics"});
            }
        }
        stages(p.batch_statistics ? s.hidden_layers : 0, s.hidden_layers);
        launch("unit_pool", unit_pool<S>, Grid{p.pairs(), 1, 1, kPairThreads, pool_bytes(sizeof(T))}, stream, params,
               gmem<const T>{p.logits, p.rows(), "logits"}, gmem<S>{p.scores, p.rows(), "scores"},
               gmem<S>{p.pooled, p.pairs() * p.embedding_dim, "pooled"});
    });
}

#define DIEN_OPS_INSTANTIATE_PREPARE(Math)                                                              \
    template void unit_prepare<Math>(Stream, const UnitProblem<Math::Storage>&, const UnitShape&, bool, \
                                     const std::vector<const Compute<Math::Storage>*>&,                 \
                                     const std::vector<const Compute<Math::Storage>*>&, Compute<Math::Storage>*);
DIEN_OPS_INSTANTIATE_PREPARE(ExactMath<float>)
DIEN_OPS_INSTANTIATE_PREPARE(ExactMath<double>)
DIEN_OPS_INSTANTIATE_PREPARE(Tf32Math)
DIEN_OPS_INSTANTIATE_PREPARE(HalfMath<BFloat16>)
DIEN_OPS_INSTANTIATE_PREPARE(HalfMath<Half>)
#undef DIEN_OPS_INSTANTIATE_PREPARE

#define DIEN_OPS_INSTANTIATE(S)                                        \
    template int64_t unit_packed_size<S>(const UnitProblem<S>&);       \
    template int64_t unit_columns_size<S>(const UnitProblem<S>&);      \
    template int64_t unit_forward_workspace<S>(const UnitProblem<S>&); \
    template int64_t unit_moments_size<S>(const UnitProblem<S>&);      \
    template void unit_forward<S>(Stream, const UnitForward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)

}  // namespace dien_ops::cuda
