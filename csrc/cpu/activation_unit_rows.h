// SPDX-License-Identifier: Apache-2.0
// What the activation unit's forward and backward share: the layers over the rows of one tile. Design:
// activation_unit_forward.cpp.
#pragma once

#include <cstring>

#include "cpu/activation_unit.h"
#include "cpu/dice_rows.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

template <typename T>
constexpr int64_t packed_capacity(int64_t k, int64_t n) {
    constexpr int64_t kPanel = kUnitLargestPanel / sizeof(T);
    return (n + kPanel - 1) / kPanel * kPanel * k;
}

// Some rows of hidden values, layer by layer: [rows, width of layer 0], [rows, width of layer 1], ...
template <typename T>
struct HiddenRows {
    T* data;
    int64_t capacity;  // rows
    int64_t first;     // the first row that is meant

    T* at(const UnitLayer<T>& layer) const { return data + layer.offset * capacity + first * layer.matrix.width; }
};

// One tile, and a thread's memory for it. Sized for the largest tile and reused for all.
template <typename T>
class UnitTile {
  public:
    explicit UnitTile(const UnitProblem<T>& p)
        : p_(p),
          before_(p.hidden == nullptr ? p.most_tile_rows * p.total_width : 0),
          after_(p.most_tile_rows * p.total_width),
          queries_(p.most_tile_pairs * p.embedding_dim),
          offsets_(p.most_tile_pairs * p.layers[0].matrix.width),
          folded_(packed_capacity<T>(p.embedding_dim, p.layers[0].matrix.width)) {}

    void select(int64_t tile) {
        first_pair_ = p_.tiles[tile];
        pairs_ = p_.tiles[tile + 1] - first_pair_;
        const UnitPair& last = pair(pairs_ - 1);
        rows_ = last.first_row + last.rows - pair(0).first_row;
        for (int64_t i = 0; i < pairs_; ++i) {
            std::memcpy(queries_ + i * p_.embedding_dim, p_.query + pair(i).pair * p_.embedding_dim,
                        p_.embedding_dim * sizeof(T));
        }
    }

    int64_t rows() const { return rows_; }
    int64_t pairs() const { return pairs_; }
    const UnitPair& pair(int64_t i) const { return p_.pairs[first_pair_ + i]; }
    int64_t row_in_tile(int64_t i) const { return pair(i).first_row - pair(0).first_row; }
    const T* queries() const { return queries_; }  // [pairs, D]
    const T* keys(int64_t i) const { return p_.keys + pair(i).sequence * p_.steps * p_.embedding_dim; }

    // Rows of a buffer of the whole batch, or of one that holds a tile.
    HiddenRows<T> rows_of(T* whole_batch, T* one_tile) const {
        if (whole_batch != nullptr) return {whole_batch, p_.hidden_rows, pair(0).first_row};
        return {one_tile, p_.most_tile_rows, 0};
    }
    T* before(int64_t layer) const {
        return rows_of(p_.hidden, before_).at(p_.layers[layer]);
    }  // the activation: [rows, width]
    T* after(int64_t layer) const { return rows_of(nullptr, after_).at(p_.layers[layer]); }  // likewise

    // before(layer) from the queries and keys, or from after(layer - 1).
    void linear(int64_t layer) {
        const UnitLayer<T>& l = p_.layers[layer];
        const UnitMatrix<T>& m = l.matrix;
        if (layer > 0) {
            multiply<T>(after(layer - 1), m.input_width, m.forward, l.padded_bias, false, before(layer), m.width, rows_,
                        m.width, m.inputs);
            return;
        }
        const int64_t D = p_.embedding_dim;
        multiply<T>(queries_, D, p_.query_matrix.forward, l.padded_bias, false, offsets_, m.width, pairs_, m.width, D);
        for (int64_t i = 0; i < pairs_; ++i) {
            fold(queries_ + i * D, m.width);
            multiply<T>(keys(i), D, folded_, offsets_ + i * m.width, false, before(0) + row_in_tile(i) * m.width, m.width,
                        pair(i).rows, m.width, D);
        }
    }

    void activate(int64_t layer) {
        const UnitLayer<T>& l = p_.layers[layer];
        const int64_t W = l.matrix.width;
        const T* z = before(layer);
        T* y = after(layer);
        if (p_.activation == Activation::dice) return dice_rows(dice_columns<T>(l.columns, W), z, W, y, W, rows_, W);
        const T* alpha = dice_columns<T>(l.columns, W).alpha;
        for_values(W, [&](int64_t r, int64_t c) {
            const Vec<T> v = Vec<T>::load(z + r * W + c);
            const Vec<T> a =
                p_.activation == Activation::sigmoid ? sigmoid(v) : where_positive(v, v, Vec<T>::load(alpha + c) * v);
            a.store(y + r * W + c);
        });
    }

    // Calls f(row, column) for every vector of the tile's rows of width W.
    template <typename F>
    void for_values(int64_t W, F&& f) const {
        for (int64_t r = 0; r < rows_; ++r) {
            for (int64_t c = 0; c < W; c += Vec<T>::kSize) f(r, c);
        }
    }

  private:
    // folded = W_k - W_d + W_p diag(q), in the packed layout: panels of columns, in each a row per d.
    void fold(const T* q, int64_t width) {
        const T *keys = p_.layers[0].matrix.forward, *products = p_.product_matrix.forward;
        T* out = folded_;
        for (int64_t n = 0; n < width; n += kPanelWidth<T>) {
            for (int64_t d = 0; d < p_.embedding_dim; ++d) {
                const Vec<T> q_d(q[d]);
                for (int64_t v = 0; v < kTileVectors; ++v) {
                    (Vec<T>::load(keys) + q_d * Vec<T>::load(products)).store(out);
                    keys += Vec<T>::kSize, products += Vec<T>::kSize, out += Vec<T>::kSize;
                }
            }
        }
    }

    const UnitProblem<T>& p_;
    int64_t first_pair_, pairs_, rows_;
    const Scratch<T> before_, after_;  // hidden values of one tile
    const Scratch<T> queries_;         // [pairs, D]
    const Scratch<T> offsets_;         // [pairs, width of the first layer]: (W_q + W_d) q + bias
    const Scratch<T> folded_;
};

}  // namespace
}  // namespace dien_ops::cpu
