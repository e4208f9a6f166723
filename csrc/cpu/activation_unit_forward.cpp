// SPDX-License-Identifier: Apache-2.0
// The local activation unit (DIN eq. 3): v_U = sum over t of a(e_t, v_A) e_t, where a is a small network over the query q = v_A
// and the key k = e_t. Contracts: activation_unit.h. Backward: activation_unit_backward.cpp.
//
// The network's input [q, k, q - k, q * k] is never built. With the first weight split into its four blocks,
//     W [q, k, q - k, q * k] = (W_q + W_d) q + (W_k - W_d + W_p diag(q)) k,
// so each pair of a sequence and a target folds its q into one D x H matrix, and its T keys pass through that: a quarter of the
// multiplications of the plain form, and nothing of size [B, T, 4 D] is written.
//
// Work is cut into tiles: whole pairs, about 64 rows (valid steps). All layers of a tile follow each other while its hidden
// values lie in the thread's second cache, and only scores and pooled vectors go to memory. The backward computes them anew:
// that takes less time than to fetch them again, and no memory. Dice with batch statistics needs every row of a layer before
// the next can start; then, and only then, the values before each activation are kept, for the whole batch.
//
// Hidden values have rows padded with zeros to whole vectors. Columns of weights that stand for padding are 0.
#include "cpu/activation_unit_rows.h"
#include "cpu/attention_rows.h"

namespace dien_ops::cpu {
namespace {

// transposed = (a + sign b)^T, where a and b [outputs, inputs] have rows of `stride`; then both packed forms. b may be null.
template <typename T>
void fill_matrix(const UnitMatrix<T>& m, const T* a, const T* b, T sign, int64_t stride) {
    fill_zeros(m.transposed, m.input_width * m.width);
    for (int64_t i = 0; i < m.inputs; ++i) {
        for (int64_t o = 0; o < m.outputs; ++o) {
            m.transposed[i * m.width + o] = a[o * stride + i] + (b != nullptr ? sign * b[o * stride + i] : T(0));
        }
    }
    pack(m.transposed, m.width, 1, m.inputs, m.width, m.forward);
    if (m.backward != nullptr) pack(m.transposed, 1, m.width, m.outputs, m.input_width, m.backward);
}

template <typename T>
void fill_columns(const UnitProblem<T>& p, const UnitLayer<T>& l) {
    const int64_t H = l.matrix.outputs, W = l.matrix.width;
    fill_zeros(l.columns, 4 * W);
    if (p.activation == Activation::dice) {
        for (int64_t c = 0; c < H; ++c) {
            l.columns[c] = l.mean[c];
            l.columns[W + c] = dice_scale(T(1), l.var[c], p.eps);
        }
    }
    if (l.alpha != nullptr) std::memcpy(l.columns + 3 * W, l.alpha, H * sizeof(T));
}

template <typename T>
Moments tile_moments(const UnitForward<T>& p, int64_t tile, int64_t layer) {
    int64_t widest = 0;
    for (int64_t l = 0; l < p.hidden_layers; ++l) {
        widest = widest < p.layers[l].matrix.width ? p.layers[l].matrix.width : widest;
    }
    return {p.moments + tile * (1 + 2 * widest), p.layers[layer].matrix.width};
}

// Scores and pooled vectors of a tile, from the last hidden layer's values.
template <typename T>
void score(const UnitForward<T>& p, const UnitTile<T>& tile) {
    const int64_t D = p.embedding_dim, L = p.hidden_layers;
    const int64_t W = p.layers[L > 0 ? L - 1 : 0].matrix.width;
    const T* hidden = L > 0 ? tile.after(L - 1) : tile.before(0);
    for (int64_t i = 0; i < tile.pairs(); ++i) {
        const UnitPair& pair = tile.pair(i);
        T* scores = p.scores + pair.pair * p.steps;
        const T* rows = hidden + tile.row_in_tile(i) * W;
        if (L > 0) {
            dot_rows(rows, W, p.output_weight, scores, pair.rows, W);
            for (int64_t t = 0; t < pair.rows; ++t) scores[t] += p.output_bias;
        } else {
            for (int64_t t = 0; t < pair.rows; ++t) scores[t] = rows[t * W];
        }
        if (p.softmax) softmax_row(scores, pair.rows);
        accumulate_outer<T>(scores, 1, tile.keys(i), D, p.pooled + pair.pair * D, D, 1, D, pair.rows);
    }
}

}  // namespace

template <Capability kTarget, typename T>
void unit_prepare(const UnitProblem<T>& p) {
    const int64_t D = p.embedding_dim;
    const T* first = p.layers[0].weight;  // [H, 4 D]: W_q, W_k, W_d, W_p side by side
    fill_matrix(p.query_matrix, first, first + 2 * D, T(1), 4 * D);
    fill_matrix(p.layers[0].matrix, first + D, first + 2 * D, T(-1), 4 * D);
    fill_matrix<T>(p.product_matrix, first + 3 * D, nullptr, T(0), 4 * D);
    for (int64_t i = 0; i < p.hidden_layers || i == 0; ++i) {
        const UnitLayer<T>& l = p.layers[i];
        if (i > 0) fill_matrix<T>(l.matrix, l.weight, nullptr, T(0), l.matrix.inputs);
        fill_zeros(l.padded_bias, l.matrix.width);
        std::memcpy(l.padded_bias, l.bias, l.matrix.outputs * sizeof(T));
        fill_columns(p, l);
    }
}

template <Capability kTarget, typename T>
void unit_forward(const UnitForward<T>& p, int64_t first_stage, int64_t last_stage, int64_t tile_begin, int64_t tile_end) {
    UnitTile<T> tile(p);
    for (int64_t i = tile_begin; i < tile_end; ++i) {
        tile.select(i);
        for (int64_t stage = first_stage; stage <= last_stage; ++stage) {
            if (stage > 0) tile.activate(stage - 1);
            if (stage < p.hidden_layers || stage == 0) tile.linear(stage);
            if (stage == p.hidden_layers) {
                score(p, tile);
            } else if (p.batch_statistics) {
                const int64_t W = p.layers[stage].matrix.width;
                add_moments<T>(tile.before(stage), W, tile.rows(), tile_moments(p, i, stage));
            }
        }
    }
}

template <Capability kTarget, typename T>
void unit_statistics(const UnitForward<T>& p, int64_t layer) {
    const UnitLayer<T>& l = p.layers[layer];
    if (p.tile_count == 0) return;
    const Moments total = tile_moments(p, 0, layer);
    for (int64_t tile = 1; tile < p.tile_count; ++tile) total.merge(tile_moments(p, tile, layer));
    finish_moments(total, l.mean, l.var);
    fill_columns(p, l);
    for (int64_t tile = 0; tile < p.tile_count; ++tile) {
        fill_zeros(tile_moments(p, tile, layer).data, 1 + 2 * l.matrix.width);
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                            \
    template void unit_prepare<kCapability, T>(const UnitProblem<T>&);                                     \
    template void unit_forward<kCapability, T>(const UnitForward<T>&, int64_t, int64_t, int64_t, int64_t); \
    template void unit_statistics<kCapability, T>(const UnitForward<T>&, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
