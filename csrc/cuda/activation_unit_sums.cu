// SPDX-License-Identifier: Apache-2.0
// The local activation unit's backward: sums over what the blocks of unit_gradients (activation_unit_backward.cu) leave behind,
// each in an order that sizes and lengths fix.
//
// finish_layer adds up the blocks' parts of a layer's gradients, and makes those of W_q, W_k, W_d and W_p out of those of the
// three blocks that the first layer has. finish_query adds a sequence's tiles. finish_keys adds the parts of blocks that share
// their targets, and writes the zeros behind the lengths. sum_pairs has what is left, the output's bias.
//
// feed_back runs between two stages, for Dice with batch statistics: from a layer's sums over all rows, what its gradient
// loses through mean and deviation.
#include "cuda/activation_unit_backward.cuh"

namespace dien_ops::cuda {
namespace {

// The sum over the block's threads, in a fixed order; thread 0 has it.
template <typename T>
DIEN_OPS_DEVICE T sum_over_threads(const view<T>& memory, T x) {
    return over_block(memory, warp_sum(x), [](T a, T b) { return a + b; });
}

// What goes back through Dice's statistics of a layer's column, from the sums over all rows. A block for each column.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void feed_back(UnitParams<S> p, int layer, DiceEps eps, gmem<const Compute<S>> sums, int64_t blocks,
               gmem<const Compute<S>> statistics, gmem<Compute<S>> columns) {
    const UnitLayer& l = p.s.layer[layer];
    const int64_t column = l.columns + block_index(), sums_size = unit_sums(p.s) * p.s.columns;
    Arena arena;
    const auto of_warps = arena.take<double>(kElementThreads / kWarp, "of warps");
    double logit = 0, centered = 0;
    for (int64_t block = thread_index(); block < blocks; block += kElementThreads) {
        logit += sums.ld(block * sums_size + kSumLogit * p.s.columns + column);
        centered += sums.ld(block * sums_size + kSumCentered * p.s.columns + column);
    }
    logit = sum_over_threads(of_warps, logit);
    centered = sum_over_threads(of_warps, centered);
    if (thread_index() > 0) return;
    const double count = double(p.total_steps() * p.s.targets);
    const double var = statistics.ld(p.s.statistics + l.statistic + block_index());
    const double scale = columns.ld(int64_t(kScale) * p.s.columns + column);
    using T = Compute<S>;
    columns.st(int64_t(kMeanLogitGradient) * p.s.columns + column, count > 0 ? T(logit / count) : T(0));
    columns.st(int64_t(kPull) * p.s.columns + column, count > 0 ? T(eps.pull(scale, var, centered / count)) : T(0));
}

// A layer's gradients in torch's layout, from the blocks' parts: a lane for each number, weight, bias, output weight and alpha
// after each other, and for it 8 warps, which share the parts.
template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void finish_layer(UnitShape s, int layer, int64_t blocks, gmem<const T> gradients, gmem<const T> sums, gmem<T> weight,
                  gmem<T> bias, gmem<T> output_weight, gmem<T> alpha) {
    constexpr int kWarps = kElementThreads / kWarp;
    const UnitLayer& l = s.layer[layer];
    const int64_t H = l.outputs, inputs = layer == 0 ? 4 * s.dim : l.inputs, numbers = H * inputs;
    int64_t i = block_index() * kWarp + lane_index();
    Arena arena;
    const auto of_warps = arena.take<T>(kElementThreads, "of warps");
    T sum = 0;
    const bool of_weight = i < numbers;
    if (of_weight) {
        const int64_t o = i / inputs, input = i % inputs;
        int64_t part = layer == 0 ? input / s.dim : 0, at = input;
        // x has q, k, q * k; q - k is in W_q + W_d and in W_k - W_d.
        const bool difference = layer == 0 && part == 2;
        if (difference) at = input - 2 * s.dim;
        if (layer == 0 && part == 3) at = input - s.dim;
        at += l.gradient + o * unit_width(l.inputs);
#pragma unroll 8
        for (int64_t block = warp_index(); block < blocks; block += kWarps) {
            T value = gradients.ld(block * s.gradient + at);
            if (difference) value -= gradients.ld(block * s.gradient + at + s.dim);
            sum += value;
        }
    } else if (const int64_t kind = (i - numbers) / H; kind < 3 && kind < unit_sums(s)) {
        const int64_t at = kind * s.columns + l.columns + (i - numbers) % H;
#pragma unroll 8
        for (int64_t block = warp_index(); block < blocks; block += kWarps) {
            sum += sums.ld(block * unit_sums(s) * s.columns + at);
        }
    }
    of_warps.st(thread_index(), sum);
    sync_block();
    if (warp_index() > 0) return;
    for (int w = 1; w < kWarps; ++w) sum += of_warps.ld(w * kWarp + lane_index());
    if (of_weight) return weight.st(i, sum);
    i -= numbers;
    if (bias && i < H) bias.st(i, sum);
    if (output_weight && i >= H && i < 2 * H) output_weight.st(i - H, sum);
    if (alpha && i >= 2 * H && i < 3 * H) alpha.st(i - 2 * H, sum);
}

// One block: to [1] = the sum of n numbers.
template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void sum_pairs(gmem<const T> from, int64_t n, gmem<T> to) {
    Arena arena;
    const auto of_warps = arena.take<T>(kElementThreads / kWarp, "of warps");
    T sum = 0;
#pragma unroll 4
    for (int64_t i = thread_index(); i < n; i += kElementThreads) sum += from.ld(i);
    sum = sum_over_threads(of_warps, sum);
    if (thread_index() == 0) to.st(0, sum);
}

template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void finish_query(UnitParams<S> p, gmem<const Compute<S>> query_sums, gmem<S> grad_query) {
    const int64_t i = element_index(), pair = i / p.s.dim, e = i % p.s.dim;
    if (pair >= p.s.batch * p.s.targets) return;
    const int64_t b = pair / p.s.targets, c = pair % p.s.targets, length = p.length(b), first = p.first_step(b);
    Compute<S> sum = 0;
    if (length > 0) {
        for (int64_t tile = first / p.s.rows; tile <= (first + length - 1) / p.s.rows; ++tile) {
            sum += query_sums.ld(((tile + b) * p.s.targets + c) * p.s.dim + e);
        }
    }
    grad_query.st(i, to_storage<S>(sum));
}

// grad_keys: the sum of the parts, where there are several, and zeros behind the lengths.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void finish_keys(UnitParams<S> p, gmem<const Compute<S>> keys_sums, int64_t parts, gmem<S> grad_keys) {
    const int64_t i = element_index(), numbers = p.s.batch * p.s.steps * p.s.dim;
    if (i >= numbers) return;
    const int64_t place = i / p.s.dim, b = place / p.s.steps;
    const bool present = place % p.s.steps < p.length(b);
    if (present && parts == 1) return;
    Compute<S> sum = 0;
    if (present) {
#pragma unroll 4
        for (int64_t part = 0; part < parts; ++part) sum += keys_sums.ld(part * numbers + i);
    }
    grad_keys.st(i, to_storage<S>(sum));
}

}  // namespace

template <typename S>
void unit_feed_back(Stream stream, const UnitBackward<S>& p, const UnitGradientParams<S>& params, int layer) {
    using T = Compute<S>;
    const UnitShape& s = params.s;
    launch("unit_feed_back", feed_back<S>,
           Grid{s.layer[layer].outputs, 1, 1, kElementThreads, arena_bytes<double>(kElementThreads / kWarp)}, stream, params,
           layer, p.eps, gmem<const T>(params.sums), params.blocks(),
           gmem<const T>{p.statistics, 2 * s.statistics, "statistics"},
           gmem<T>{p.columns, int64_t(kUnitColumns) * s.columns, "columns"});
}

template <typename S>
void unit_sum_gradients(Stream stream, const UnitBackward<S>& p, const UnitGradientParams<S>& params) {
    using T = Compute<S>;
    const UnitShape& s = params.s;
    for (int i = 0; i < s.layers; ++i) {
        const UnitLayer& l = s.layer[i];
        const int64_t H = l.outputs, numbers = H * (i == 0 ? 4 * s.dim : l.inputs);
        gmem<T> bias = {p.grad_biases[i], H, "grad_biases"}, alpha = {}, output = {};
        if (s.hidden_layers == 0) bias = {};
        if (!p.grad_alphas.empty()) alpha = {p.grad_alphas[i], H, "grad_alphas"};
        if (i + 1 == s.hidden_layers) output = {p.grad_weights.back(), H, "grad_weights of the output"};
        launch("unit_finish_layer", finish_layer<T>,
               Grid{divide_up<int64_t>(numbers + 3 * H, kWarp), 1, 1, kElementThreads, arena_bytes<T>(kElementThreads)}, stream,
               s, i, params.blocks(), gmem<const T>(params.gradients), gmem<const T>(params.sums),
               gmem<T>{p.grad_weights[i], numbers, "grad_weights"}, bias, output, alpha);
    }
    launch("unit_sum_pairs", sum_pairs<T>, Grid{1, 1, 1, kElementThreads, arena_bytes<T>(kElementThreads / kWarp)}, stream,
           gmem<const T>(params.pair_sums), p.pairs(), gmem<T>{p.grad_biases.back(), 1, "grad_biases of the output"});
    launch("unit_finish_query", finish_query<S>, element_grid(p.pairs() * p.embedding_dim), stream, params,
           gmem<const T>(params.query_sums), gmem<S>{p.grad_query, p.pairs() * p.embedding_dim, "grad_query"});
    if (p.numbers.lengths != nullptr || params.target_parts != 1) {
        launch("unit_finish_keys", finish_keys<S>, element_grid(p.batch * p.steps * p.embedding_dim), stream, params,
               gmem<const T>(params.keys_sums), params.target_parts, params.grad_keys);
    }
}

#define DIEN_OPS_INSTANTIATE(S)                                                                         \
    template void unit_feed_back<S>(Stream, const UnitBackward<S>&, const UnitGradientParams<S>&, int); \
    template void unit_sum_gradients<S>(Stream, const UnitBackward<S>&, const UnitGradientParams<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
