// SPDX-License-Identifier: Apache-2.0
// The local activation unit's backward. Contracts: activation_unit.h. What is computed, and in which tiles: see
// activation_unit_forward.cpp.
//
// A tile's hidden values are computed anew (or, with Dice's batch statistics, read), then its gradients go down through the
// layers; between Dice's stages only the logits' are kept. The first layer's folded matrix M = W_k - W_d + W_p diag(q) is a
// function of the query; with G = sum over t of k_t g_t^T, the gradient of M for one pair,
//     grad (W_k - W_d) += G     grad W_p += G diag(q)     grad q = the diagonal of W_p^T G     grad k_t = M^T g_t
// and q's other share comes through (W_q + W_d) q. W_d's gradient is that of the first block less that of the second; the
// caller takes the difference.
//
// A thread works on partitions: consecutive tiles, so that the targets of a sequence, which share its keys, add to the keys'
// gradient one after the other. Each partition has its own share of the parameters' gradients, and of those of the keys whose
// sequence an earlier partition began. Partitions depend on lengths and shapes alone and the shares are summed in their order,
// so that the bits do not depend on the threads.
#include "cpu/activation_unit_rows.h"
#include "cpu/attention_rows.h"

namespace dien_ops::cpu {
namespace {

// total [n] = the sum of `rows` rows of x
template <typename T>
void sum_rows(const T* x, int64_t rows, int64_t n, T* total) {
    for (int64_t c = 0; c < n; c += Vec<T>::kSize) {
        Vec<T> column;
        for (int64_t r = 0; r < rows; ++r) column += Vec<T>::load(x + r * n + c);
        column.store(total + c);
    }
}

// Adds n values of each later partition, `stride` apart, to the first one's.
template <typename V>
void add_partitions(V* values, int64_t n, int64_t partitions, int64_t stride) {
    for (int64_t partition = 1; partition < partitions; ++partition) {
        for (int64_t i = 0; i < n; ++i) values[i] += values[partition * stride + i];
    }
}

template <typename T>
class UnitGradient {
  public:
    explicit UnitGradient(const UnitBackward<T>& p)
        : p_(p),
          tile_(p),
          gradient_(p.most_tile_rows * p.total_width),
          grad_logits_(p.logit_gradient == nullptr ? p.most_tile_rows : 0),
          grad_offsets_(p.most_tile_pairs * p.layers[0].matrix.width),
          grad_queries_(p.most_tile_pairs * p.embedding_dim),
          grad_folded_(p.embedding_dim * p.layers[0].matrix.width),
          folded_(packed_capacity<T>(p.layers[0].matrix.outputs, p.embedding_dim)),
          padded_query_(packed_capacity<T>(1, p.embedding_dim)) {}

    void select(int64_t partition, int64_t tile) {
        share_ = p_.shares + partition * p_.share_size;
        sums_ = p_.sums + partition * (4 * p_.total_width + 1);
        continued_ = p_.continued_sequence(partition);
        continued_keys_ = continued_ < 0 ? nullptr : p_.continued_keys + partition * p_.steps * p_.embedding_dim;
        tile_.select(tile);
    }

    void stage(int64_t stage) {
        const int64_t L = p_.hidden_layers;
        const bool kept = p_.hidden != nullptr;
        if (stage == L) {
            for (int64_t layer = 0; layer < L; ++layer) {
                if (!kept) tile_.linear(layer);
                if (!kept || layer == L - 1) tile_.activate(layer);
            }
            from_scores();
            through_output();
        } else {
            if (kept && stage > 0) tile_.activate(stage - 1);
            if (kept) spread_logits();
            for (int64_t layer = L - 1; kept && layer > stage; --layer) {
                through_activation(layer);
                to_layer_below(layer);
            }
            through_activation(stage);
        }
        if (stage < L || L == 0) through_linear(stage);
        if (stage > 0) add_sums(stage - 1);
    }

  private:
    // Of the values after the activation, and from through_activation on, before it: [rows, width]. Where stages end between
    // the layers, each makes those of the layers above again from the logits'.
    T* gradient(int64_t layer) const { return tile_.rows_of(nullptr, gradient_).at(p_.layers[layer]); }
    // Of the scores before the softmax: [rows].
    T* logit_gradient() const {
        return p_.logit_gradient != nullptr ? p_.logit_gradient + tile_.pair(0).first_row : static_cast<T*>(grad_logits_);
    }
    double* sums(int64_t layer) const { return sums_ + 4 * p_.layers[layer].offset; }  // [4, width]
    T* grad_keys(const UnitPair& pair) const {
        const bool continued = pair.sequence == continued_;
        return continued ? continued_keys_ : p_.grad_keys + pair.sequence * p_.steps * p_.embedding_dim;
    }

    // From the gradients of pooled vectors and scores to that of the logits.
    void from_scores() {
        const int64_t D = p_.embedding_dim;
        for (int64_t i = 0; i < tile_.pairs(); ++i) {
            const UnitPair& pair = tile_.pair(i);
            T* g = logit_gradient() + tile_.row_in_tile(i);
            const T* scores = p_.scores + pair.pair * p_.steps;
            const T* grad_scores = p_.grad_scores != nullptr ? p_.grad_scores + pair.pair * p_.steps : nullptr;
            if (p_.grad_pooled != nullptr) {
                const T* grad_pooled = p_.grad_pooled + pair.pair * D;
                dot_rows(tile_.keys(i), D, grad_pooled, g, pair.rows, D);
                accumulate_outer<T>(scores, p_.steps, grad_pooled, D, grad_keys(pair), D, pair.rows, D, 1);
            } else {
                fill_zeros(g, pair.rows);
            }
            for (int64_t t = 0; grad_scores != nullptr && t < pair.rows; ++t) g[t] += grad_scores[t];
            if (p_.softmax) softmax_row_gradient<T>(scores, g, g, pair.rows);
        }
    }

    // From that to the gradient of the last hidden layer's values; without hidden layers, to that of the only layer's.
    void spread_logits() {
        const int64_t L = p_.hidden_layers, last = L > 0 ? L - 1 : 0, W = p_.layers[last].matrix.width;
        const T* g = logit_gradient();
        T* hidden = gradient(last);
        if (L == 0) {
            fill_zeros(hidden, tile_.rows() * W);
            for (int64_t r = 0; r < tile_.rows(); ++r) hidden[r * W] = g[r];
            return;
        }
        tile_.for_values(
            W, [&](int64_t r, int64_t c) { (Vec<T>(g[r]) * Vec<T>::load(p_.output_weight + c)).store(hidden + r * W + c); });
    }

    void through_output() {
        spread_logits();
        if (p_.hidden_layers == 0) return;
        const int64_t last = p_.hidden_layers - 1, W = p_.layers[last].matrix.width;
        const T* g = logit_gradient();
        accumulate_outer<T>(g, 1, tile_.after(last), W, share_ + p_.output_gradient, W, 1, W, tile_.rows());
        if (p_.softmax) return;  // it takes no notice of the bias
        for (int64_t r = 0; r < tile_.rows(); ++r) sums_[4 * p_.total_width] += g[r];
    }

    // What the gradients of alpha and of Dice's statistics need from the rows of this tile.
    void add_sums(int64_t layer) {
        if (p_.activation == Activation::sigmoid) return;
        const UnitLayer<T>& l = p_.layers[layer];
        const int64_t W = l.matrix.width;
        const T *z = tile_.before(layer), *g = gradient(layer);
        if (p_.activation == Activation::dice) {
            return add_dice_sums(dice_columns<T>(l.columns, W), z, W, g, W, tile_.rows(), W, sums(layer));
        }
        add_column_sums<1, 4, T>(tile_.rows(), W, sums(layer), [&](int64_t r, int64_t c, int64_t, Vec<T>* terms) {
            const Vec<T> v = Vec<T>::load(z + r * W + c);
            terms[0] = where_positive(v, Vec<T>(), v * Vec<T>::load(g + r * W + c));
        });
    }

    void through_activation(int64_t layer) {
        const UnitLayer<T>& l = p_.layers[layer];
        const int64_t W = l.matrix.width;
        const T *z = tile_.before(layer), *y = tile_.after(layer);
        T* g = gradient(layer);
        if (p_.activation == Activation::dice) {
            const DiceFeedback<T> feedback = p_.batch_statistics ? dice_feedback<T>(l.feedback, W) : DiceFeedback<T>{};
            return dice_gradient_rows(dice_columns<T>(l.columns, W), feedback, z, W, g, W, g, W, tile_.rows(), W);
        }
        const T* alpha = dice_columns<T>(l.columns, W).alpha;
        tile_.for_values(W, [&](int64_t r, int64_t c) {
            const int64_t at = r * W + c;
            const Vec<T> grad = Vec<T>::load(g + at);
            if (p_.activation == Activation::sigmoid) {
                const Vec<T> v = Vec<T>::load(y + at);
                (grad * v * (Vec<T>(T(1)) - v)).store(g + at);
            } else {
                where_positive(Vec<T>::load(z + at), grad, Vec<T>::load(alpha + c) * grad).store(g + at);
            }
        });
    }

    void through_linear(int64_t layer) {
        const UnitLayer<T>& l = p_.layers[layer];
        const UnitMatrix<T>& m = l.matrix;
        if (layer == 0) return through_first_layer();
        const T* g = gradient(layer);
        accumulate_outer<T>(tile_.after(layer - 1), m.input_width, g, m.width, share_ + m.gradient, m.width, m.inputs, m.width,
                            tile_.rows());
        add_bias_gradient(layer, g, tile_.rows());
        to_layer_below(layer);
    }

    void to_layer_below(int64_t layer) {
        const UnitMatrix<T>& m = p_.layers[layer].matrix;
        multiply<T>(gradient(layer), m.width, m.backward, nullptr, false, gradient(layer - 1), m.input_width, tile_.rows(),
                    m.input_width, m.outputs);
    }

    // From the gradient g [rows, width] of the layer's values before the activation, or of sums over some of these.
    void add_bias_gradient(int64_t layer, const T* g, int64_t rows) {
        const int64_t W = p_.layers[layer].matrix.width;
        add_column_sums<1, 4, T>(rows, W, sums(layer) + 3 * W,
                                 [&](int64_t r, int64_t c, int64_t, Vec<T>* terms) { terms[0] = Vec<T>::load(g + r * W + c); });
    }

    void through_first_layer() {
        const UnitMatrix<T>& m = p_.layers[0].matrix;
        const int64_t D = p_.embedding_dim, W = m.width, pairs = tile_.pairs();
        for (int64_t i = 0; i < pairs; ++i) {
            const UnitPair& pair = tile_.pair(i);
            const T *query = tile_.queries() + i * D, *g = gradient(0) + tile_.row_in_tile(i) * W;
            sum_rows(g, pair.rows, W, grad_offsets_ + i * W);
            fill_zeros<T>(grad_folded_, D * W);
            accumulate_outer<T>(tile_.keys(i), D, g, W, grad_folded_, W, D, W, pair.rows);
            unfold(query, grad_queries_ + i * D);
            fold(query);
            multiply<T>(g, W, folded_, nullptr, true, grad_keys(pair), D, pair.rows, D, m.outputs);
        }
        const UnitMatrix<T>& q = p_.query_matrix;
        add_bias_gradient(0, grad_offsets_, pairs);
        accumulate_outer<T>(tile_.queries(), D, grad_offsets_, W, share_ + q.gradient, W, D, W, pairs);
        multiply<T>(grad_offsets_, W, q.backward, nullptr, true, grad_queries_, D, pairs, D, m.outputs);
        for (int64_t i = 0; i < pairs; ++i) {
            std::memcpy(p_.grad_query + tile_.pair(i).pair * D, grad_queries_ + i * D, D * sizeof(T));
        }
    }

    // From grad_folded_, the gradient of M^T [D, W], to those of its parts. grad_query is what comes through diag(q).
    void unfold(const T* query, T* grad_query) {
        const UnitMatrix<T>&keys = p_.layers[0].matrix, &products = p_.product_matrix;
        for (int64_t d = 0; d < p_.embedding_dim; ++d) {
            const int64_t row = d * keys.width;
            const Vec<T> q(query[d]);
            Vec<T> total;
            for (int64_t at = row; at < row + keys.width; at += Vec<T>::kSize) {
                const Vec<T> g = Vec<T>::load(grad_folded_ + at);
                T *keys_share = share_ + keys.gradient + at, *products_share = share_ + products.gradient + at;
                (Vec<T>::load(keys_share) + g).store(keys_share);
                (Vec<T>::load(products_share) + q * g).store(products_share);
                total += g * Vec<T>::load(products.transposed + at);
            }
            grad_query[d] = sum(total);
        }
    }

    // folded_ = M, packed: panels of columns d, in each a row per output of the layer.
    void fold(const T* query) {
        const int64_t D = p_.embedding_dim;
        const T *keys = p_.layers[0].matrix.backward, *products = p_.product_matrix.backward;
        T* out = folded_;
        fill_zeros<T>(padded_query_, packed_capacity<T>(1, D));
        std::memcpy(padded_query_, query, D * sizeof(T));
        for (int64_t d = 0; d < D; d += kPanelWidth<T>) {
            for (int64_t o = 0; o < p_.layers[0].matrix.outputs; ++o) {
                for (int64_t v = 0; v < kTileVectors; ++v) {
                    const Vec<T> q = Vec<T>::load(padded_query_ + d + v * Vec<T>::kSize);
                    (Vec<T>::load(keys) + q * Vec<T>::load(products)).store(out);
                    keys += Vec<T>::kSize, products += Vec<T>::kSize, out += Vec<T>::kSize;
                }
            }
        }
    }

    const UnitBackward<T>& p_;
    UnitTile<T> tile_;
    T* share_;
    double* sums_;
    int64_t continued_;  // the sequence, and where its keys' gradient goes
    T* continued_keys_;
    const Scratch<T> gradient_;      // of one tile's hidden values
    const Scratch<T> grad_logits_;   // [rows]
    const Scratch<T> grad_offsets_;  // [pairs, width of the first layer]
    const Scratch<T> grad_queries_;  // [pairs, D]
    const Scratch<T> grad_folded_;   // [D, width of the first layer]
    const Scratch<T> folded_;
    const Scratch<T> padded_query_;
};

}  // namespace

template <Capability kTarget, typename T>
void unit_backward(const UnitBackward<T>& p, int64_t first_stage, int64_t last_stage, int64_t partition_begin,
                   int64_t partition_end) {
    UnitGradient<T> gradient(p);
    for (int64_t partition = partition_begin; partition < partition_end; ++partition) {
        for (int64_t tile = p.partitions[partition]; tile < p.partitions[partition + 1]; ++tile) {
            gradient.select(partition, tile);
            for (int64_t stage = first_stage; stage >= last_stage; --stage) gradient.stage(stage);
        }
    }
}

template <Capability kTarget, typename T>
void unit_feedback(const UnitBackward<T>& p, int64_t layer) {
    const UnitLayer<T>& l = p.layers[layer];
    const int64_t W = l.matrix.width;
    double* sums = p.sums + 4 * l.offset;
    add_partitions(sums, 3 * W, p.partition_count, 4 * p.total_width + 1);
    if (p.batch_statistics) {
        fill_dice_feedback(sums, double(p.row_count), l.var, dice_columns<T>(l.columns, W).scale, p.eps, W, l.feedback);
    }
}

template <Capability kTarget, typename T>
void unit_reduce(const UnitBackward<T>& p) {
    const int64_t sums_size = 4 * p.total_width + 1;
    add_partitions(p.shares, p.share_size, p.partition_count, p.share_size);
    add_partitions(p.sums + sums_size - 1, 1, p.partition_count, sums_size);
    const int64_t keys_size = p.steps * p.embedding_dim;
    for (int64_t partition = 0; partition < p.partition_count; ++partition) {
        const int64_t sequence = p.continued_sequence(partition);
        if (sequence < 0) continue;
        T* total = p.grad_keys + sequence * keys_size;
        const T* more = p.continued_keys + partition * keys_size;
        for (int64_t i = 0; i < keys_size; ++i) total[i] += more[i];
    }
    for (int64_t i = 0; i < p.hidden_layers || i == 0; ++i) {
        const UnitLayer<T>& l = p.layers[i];
        add_partitions(p.sums + 4 * l.offset + 3 * l.matrix.width, l.matrix.width, p.partition_count, sums_size);
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                              \
    template void unit_backward<kCapability, T>(const UnitBackward<T>&, int64_t, int64_t, int64_t, int64_t); \
    template void unit_feedback<kCapability, T>(const UnitBackward<T>&, int64_t);                            \
    template void unit_reduce<kCapability, T>(const UnitBackward<T>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
