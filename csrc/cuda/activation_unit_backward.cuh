// SPDX-License-Identifier: Apache-2.0
// What the unit's backward over tiles (activation_unit_backward.cu) and the sums over its blocks (activation_unit_sums.cu)
// share: how the work is cut up, and where what the blocks leave behind lies.
#pragma once

#include "cuda/activation_unit.cuh"

namespace dien_ops::cuda {

// Sums over rows: the bias's gradient, the output weight's, alpha's, or the first of Dice's three, and the other two.
enum UnitSum { kSumBias, kSumOutput, kSumAlpha, kSumLogit, kSumCentered, kUnitSums };

// Those that there are.
DIEN_OPS_HOST_DEVICE inline int unit_sums(const UnitShape& s) {
    if (s.batch_statistics) return kUnitSums;
    return s.activation == Activation::sigmoid ? kSumAlpha : kSumLogit;
}

// How the work is cut up, and where what the blocks leave behind lies in `partial`; from sizes alone.
struct UnitParts {
    static constexpr int64_t kMost = 264;  // blocks: two for each multiprocessor of an H100
    static constexpr int64_t kMostBytes = 64 << 20;

    int64_t tiles, targets;      // parts of the tiles, and of the targets
    int64_t gradients, sums;     // [blocks, s.gradient], [blocks, unit_sums, columns]
    int64_t query, keys;         // [tiles + B, C, D], [targets, B * T, D] where they are more than 1
    int64_t pair_sums, numbers;  // [B * C], all of it

    int64_t blocks() const { return tiles * targets; }
    UnitParts(const UnitShape& s, int64_t size) {
        const int64_t most = std::max<int64_t>(1, std::min(kMost, kMostBytes / std::max<int64_t>(1, s.gradient * size)));
        const int64_t most_tiles = s.most_tiles();
        tiles = std::min(most_tiles, most);
        targets = tiles == 0 ? 0 : std::min(s.targets, std::max<int64_t>(1, most / tiles));
        int64_t at = 0;
        const auto take = [&](int64_t n) { return (at += round_up<int64_t>(n, 16)) - round_up<int64_t>(n, 16); };
        gradients = take(blocks() * s.gradient);
        sums = take(blocks() * unit_sums(s) * s.columns);
        query = take((most_tiles + s.batch) * s.targets * s.dim);
        keys = take(targets > 1 ? targets * s.batch * s.steps * s.dim : 0);
        pair_sums = take(s.batch * s.targets);
        numbers = at;
    }
};

template <typename S>
struct UnitGradientParams : UnitParams<S> {
    using T = Compute<S>;
    int64_t tile_parts, target_parts;
    gmem<const S> scores, grad_pooled;
    gmem<const T> grad_logits, hidden;
    gmem<T> hidden_gradient, gradients, sums, query_sums, keys_sums, pair_sums;
    gmem<S> grad_keys;

    UnitGradientParams(const UnitBackward<S>& p, const UnitShape& s, const UnitParts& parts)
        : UnitParams<S>(p, s, parts.blocks()),
          tile_parts(parts.tiles),
          target_parts(parts.targets),
          scores(p.scores, p.rows(), "scores"),
          grad_pooled(p.grad_pooled, p.pairs() * p.embedding_dim, "grad_pooled"),
          grad_logits(p.grad_logits, p.rows(), "grad_logits"),
          hidden(p.hidden, s.hidden, "hidden"),
          hidden_gradient(p.hidden_gradient, s.hidden, "gradient of hidden"),
          gradients(p.partial + parts.gradients, parts.sums - parts.gradients, "parts of weights' gradients"),
          sums(p.partial + parts.sums, parts.query - parts.sums, "parts of columns' sums"),
          query_sums(p.partial + parts.query, parts.keys - parts.query, "parts of grad_query"),
          keys_sums(p.partial + parts.keys, parts.pair_sums - parts.keys, "parts of grad_keys"),
          pair_sums(p.partial + parts.pair_sums, p.pairs(), "sums of pairs"),
          grad_keys(p.grad_keys, p.batch * p.steps * p.embedding_dim, "grad_keys") {}

    int64_t blocks() const { return tile_parts * target_parts; }
};

// After the stage that brings a layer's gradient behind its activation: kMeanLogitGradient and kPull of its columns.
template <typename S>
void unit_feed_back(Stream stream, const UnitBackward<S>& p, const UnitGradientParams<S>& params, int layer);

// After the last stage: all gradients, but what of grad_keys is there already.
template <typename S>
void unit_sum_gradients(Stream stream, const UnitBackward<S>& p, const UnitGradientParams<S>& params);

}  // namespace dien_ops::cuda
