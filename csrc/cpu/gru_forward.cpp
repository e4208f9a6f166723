// SPDX-License-Identifier: Apache-2.0
// The recurrent column, forward: DIEN eq. 2-5 and 9-12 in torch.nn.GRU's parameters.
//
//     r = sigmoid(W_r x + b_ir + U_r h + b_hr)
//     z = sigmoid(W_z x + b_iz + U_z h + b_hz)
//     n = tanh(W_n x + b_in + r (U_n h + b_hn))     reset after the product
//     n = tanh(W_n x + b_in + U_n (r h) + b_hn)     reset before it
//     h' = n + k (h - n)                            k: common/gates.h
//
// Rows do not depend on each other, so a thread takes a tile of rows through all steps alone. The tile's [x, h] and the packed
// weights stay in the caches; of a step only the output and, for training, the gates go to memory. The rows of a tile are
// sorted by length, longest first: at step s the rows still running are a prefix of the tile, and padding costs nothing.
//
// A step is, for each panel of units and each block of rows: the products of [x, h] with the weights of all gates, summed in
// registers (gru_panels.h); then sigmoid, tanh and the new state of these units. The reset before the product needs all of r
// before U_n (r h): there the panels give r and z, and a second product n.
//
// W x does not depend on h. Where several rows share an x, or where the rows are too few to fill the registers, it is computed
// for all steps of a sequence at once (gru_projection), and the panels hold U alone.
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/gru.h"
#include "cpu/gru_panels.h"
#include "cpu/gru_rows.h"
#include "cpu/prefetch.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// The depth of x within the packed panels.
template <typename S>
int64_t panel_input_size(const GruForward<S>& p) {
    return p.projected == nullptr ? p.input_size : 0;
}

// Where U_n stands, packed for the reset before the product.
template <typename S>
Compute<S>* packed_u_n(const GruForward<S>& p) {
    return p.packed + panels_size<Compute<S>>(panel_input_size(p), p.hidden_size, p.reset_after);
}

// A row of a tile at its first step; step s is s strides further on.
template <typename S>
struct Row {
    int64_t length;
    const S* input;
    const S* attention;           // or null
    const Compute<S>* projected;  // or null
    S* output;
    S* gates;  // or null
};

struct Strides {
    int64_t input, attention, projected, output, gates;
};

template <typename S>
class Tile {
    using T = Compute<S>;

  public:
    Tile(const GruForward<S>& p, int64_t tile)
        : p_(p),
          H_(p.hidden_size),
          I_(panel_input_size(p)),
          depth_(padded<T>(I_ + H_)),
          order_(p.order + tile * p.tile_rows),
          count_(std::min(p.tile_rows, p.rows() - tile * p.tile_rows)),
          rows_(count_),
          scores_(count_),
          current_(count_ * depth_),
          next_(count_ * depth_),
          products_(count_ * 4 * Vec<T>::kSize),
          reset_states_(p.reset_after ? 0 : count_ * H_),
          gates_(p.reset_after ? 0 : count_ * 3 * H_),
          sums_(p.reset_after ? 0 : count_ * H_) {
        const int64_t direction = p.reverse ? -1 : 1;
        const int64_t width = panels_width<T>(H_);
        strides_ = {direction * p.input_stride_t, direction * p.attention_stride_t, direction * width,
                    direction * p.output_stride_t, direction * p.gates_size()};
        for (int64_t i = 0; i < count_; ++i) {
            const int64_t row = order_[i], b = row / p.targets, length = p.lengths[b], t = length > 0 ? p.time(row, 0) : 0;
            S* const gates = p.gates != nullptr ? p.gates + (p.entry[row] + t) * p.gates_size() : nullptr;
            rows_[i] = {length,
                        p.input + b * p.input_stride_b + t * p.input_stride_t,
                        p.attention != nullptr ? p.attention + p.attention_offset(row, t) : nullptr,
                        p.projected != nullptr ? p.projected + (b * p.steps + t) * width : nullptr,
                        p.output + p.output_offset(row, t),
                        gates};
            copy_or_zero(p.hx != nullptr ? p.hx + row * H_ : nullptr, H_, state(current_, i));
            for (int64_t after = length; after < p.steps; ++after) fill_zeros(p.output + p.output_offset(row, after), H_);
        }
    }

    void run() {
        T *now = current_, *then = next_;
        int64_t running = count_;
        for (int64_t s = 0; running > 0; ++s, std::swap(now, then)) {
            for (; running > 0 && rows_[running - 1].length == s; --running) {
                copy_or_zero(state(now, running - 1), H_, p_.h_n + order_[running - 1] * H_);
            }
            if (running > 0) step(s, running, now, then);
        }
    }

  private:
    // Row i of [rows, I + H]: x, then the state.
    T* state(T* rows, int64_t i) const { return rows + i * depth_ + I_; }

    void step(int64_t s, int64_t running, T* now, T* then) {
        for (int64_t i = 0; i < running; ++i) {
            const Row<S>& row = rows_[i];
            scores_[i] = row.attention != nullptr ? load_one(row.attention + s * strides_.attention) : T(1);
            const Vec<T> scale(input_scale(i));
            if (s + 1 < row.length) prefetch(row.input + (s + 1) * strides_.input, I_);
            for_vectors<T>(I_, [&](int64_t j, int64_t lanes) {
                (scale * load<T>(row.input + s * strides_.input + j, lanes)).store(now + i * depth_ + j, lanes);
            });
        }
        for_panels<T>(I_, H_, p_.reset_after, [&]<int64_t kVectors>(int64_t first, int64_t units, int64_t offset) {
            constexpr int64_t kStride = kVectors * Vec<T>::kSize;
            const T* const weights = p_.packed + offset;
            const T* const bias = weights + panel_size<T>(kVectors, I_, H_, p_.reset_after) - kStride;
            for (int64_t i = 0; i < running; ++i) {
                const T* const x =
                    rows_[i].projected != nullptr ? rows_[i].projected + s * strides_.projected + 4 * first : nullptr;
                const Vec<T> scale(input_scale(i));
                for_vectors<T>(kStride, [&](int64_t j, int64_t lanes) {
                    const Vec<T> start = Vec<T>::load(bias + j, lanes) + scale * load_or_zero<T>(x, j, lanes);
                    start.store(products_ + i * kStride + j, lanes);
                });
            }
            constexpr int64_t kForX = stored_for_x(kVectors);
            const T* const u = weights + I_ * kForX * Vec<T>::kSize;
            add_products<kVectors, kForX, 2>(now, weights, I_, running);
            if (p_.reset_after) {
                add_products<kVectors, stored_for_h(kVectors, true), 3>(state(now, 0), u, H_, running);
            } else {
                add_products<kVectors, stored_for_h(kVectors, false), 3>(state(now, 0), u, H_, running);
            }
            for_row_tiles<kTileRows>(0, running, [&]<int64_t kRows>(int64_t m) {
                finish_block<kRows, kVectors>(m, s, first, units, products_ + m * kStride, now, then);
            });
        });
        if (p_.reset_after) return;
        multiply<T>(reset_states_, H_, packed_u_n(p_), nullptr, false, sums_, H_, running, H_, H_);
        with_gate(p_.gate, [&](auto gate) {
            for (int64_t i = 0; i < running; ++i) finish_reset_before<gate()>(i, s, state(now, i), state(then, i));
        });
    }

    // The products of `running` rows of elements of x or h with a panel's weights of these elements, added to products_.
    template <int64_t kVectors, int64_t kStored, int64_t kThird>
    void add_products(const T* elements, const T* weights, int64_t size, int64_t running) {
        constexpr int64_t kSize = Vec<T>::kSize;
        for (int64_t k = 0; k < size; k += kPanelDepth) {
            const int64_t depth = std::min(kPanelDepth, size - k);
            for_row_tiles<kTileRows>(0, running, [&]<int64_t kRows>(int64_t m) {
                panel_products<kRows, kVectors, kStored, kThird>(
                    elements + m * depth_ + k, depth_, weights + k * kStored * kSize, depth, products_ + m * kVectors * kSize);
            });
        }
    }

    T input_scale(int64_t i) const { return p_.gate == Gate::input ? scores_[i] : T(1); }

    // The rows m.. of a panel. Each pass over the rows is a chain of dependent operations per row; the processor works on as
    // many rows at once as there are short chains, not one long one.
    template <int64_t kRows, int64_t kVectors>
    void finish_block(int64_t m, int64_t s, int64_t first, int64_t units, T* products, T* now, T* then) {
        constexpr int64_t kSize = Vec<T>::kSize, kStride = kVectors * kSize, kWidth = kStride / 4;
        // r and z: two vectors, one, or the first half of one
        constexpr int64_t kGateVectors = kVectors == 4 ? 2 : 1, kGateLanes = kVectors == 1 ? kSize / 2 : kSize;
        for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int64_t v = 0; v < kGateVectors; ++v) {
                T* const gates = products + i * kStride + v * kSize;
                sigmoid(Vec<T>::load(gates)).store(gates, kGateLanes);
            }
        }
        if (!p_.reset_after) {
            for (int64_t i = 0; i < kRows; ++i) {
                keep_gates<kWidth>(m + i, first, units, products + i * kStride, state(now, m + i));
            }
            return;
        }
        with_gate(p_.gate, [&](auto gate) {
            for (int64_t i = 0; i < kRows; ++i) {
                finish<gate(), kWidth>(m + i, s, first, units, products + i * kStride, state(now, m + i), state(then, m + i));
            }
        });
    }

    // `units` units from `first` on of row i at step s, the reset after the product. gates: r, z, W_n x + b_in, U_n h + b_hn.
    template <Gate kGate, int64_t kWidth>
    void finish(int64_t i, int64_t s, int64_t first, int64_t units, const T* gates, const T* h, T* new_h) {
        const auto group = [&](int64_t g) { return Vec<T>::load(gates + g * kWidth, units); };
        const Vec<T> r = group(0), z = group(1), u_n = group(3), n = tanh(group(2) + r * u_n);
        write_step<kGate>(i, s, first, units, r, z, n, h, new_h);
        if (rows_[i].gates != nullptr) store(u_n, rows_[i].gates + s * strides_.gates + 3 * H_ + first, units);
    }

    // The reset before the product: U_n (r h) has to wait until all of r h is there.
    template <int64_t kWidth>
    void keep_gates(int64_t i, int64_t first, int64_t units, const T* gates, const T* h) {
        const Vec<T> r = Vec<T>::load(gates, units);
        (r * Vec<T>::load(h + first, units)).store(reset_states_ + i * H_ + first, units);
        T* const kept = gates_ + i * 3 * H_ + first;
        for (int64_t g = 0; g < 3; ++g) Vec<T>::load(gates + g * kWidth, units).store(kept + g * H_, units);
    }

    template <Gate kGate>
    void finish_reset_before(int64_t i, int64_t s, const T* h, T* new_h) {
        const T *const gates = gates_ + i * 3 * H_, *const sums = sums_ + i * H_;
        for_vectors<T>(H_, [&](int64_t j, int64_t lanes) {
            const Vec<T> u_n = Vec<T>::load(sums + j, lanes) + load_or_zero<T>(p_.bias_hh, 2 * H_ + j, lanes);
            const Vec<T> r = Vec<T>::load(gates + j, lanes), z = Vec<T>::load(gates + H_ + j, lanes);
            const Vec<T> n = tanh(Vec<T>::load(gates + 2 * H_ + j, lanes) + u_n);
            write_step<kGate>(i, s, j, lanes, r, z, n, h, new_h);
        });
    }

    // The new state of `lanes` units from j on, and their gates where they are saved.
    template <Gate kGate>
    void write_step(int64_t i, int64_t s, int64_t j, int64_t lanes, Vec<T> r, Vec<T> z, Vec<T> n, const T* h, T* new_h) {
        const Vec<T> old_h = Vec<T>::load(h + j, lanes);
        const Vec<T> result = n + keep_weight<kGate>(z, Vec<T>(scores_[i])) * (old_h - n);
        result.store(new_h + j, lanes);
        store(result, rows_[i].output + s * strides_.output + j, lanes);
        if (rows_[i].gates == nullptr) return;
        S* const saved = rows_[i].gates + s * strides_.gates + j;
        store(r, saved, lanes);
        store(z, saved + H_, lanes);
        store(n, saved + 2 * H_, lanes);
    }

    const GruForward<S>& p_;
    const int64_t H_, I_, depth_;
    const int64_t* const order_;
    const int64_t count_;
    Strides strides_;
    const Scratch<Row<S>> rows_;
    const Scratch<T> scores_, current_, next_;      // [rows]; two of [rows, depth]: this step's [x, h], the next one's
    const Scratch<T> products_;                     // [rows, the vectors of a panel]
    const Scratch<T> reset_states_, gates_, sums_;  // [rows, H] r h; [rows, 3H] r, z, n's W x; [rows, H] U_n (r h)
};

}  // namespace

template <Capability kTarget, typename S>
int64_t gru_projection_width(const GruProblem<S>& p, bool panels) {
    return panels ? panels_width<Compute<S>>(p.hidden_size) : 3 * p.hidden_size;
}

template <Capability kTarget, typename S>
int64_t gru_projection_packed_size(const GruProblem<S>& p, bool panels) {
    return packed_size<Compute<S>>(p.input_size, gru_projection_width<kTarget>(p, panels));
}

template <Capability kTarget, typename S>
void gru_projection_pack(const GruProblem<S>& p, const GruProjection<S>& projection) {
    using T = Compute<S>;
    const auto element = [&](int64_t k, int64_t n) {
        const int64_t row = projection.panels ? panel_lane_row<T>(n, p.hidden_size) : n;
        return row < 0 ? T(0) : load_one(p.weight_ih + row * p.input_size + k);
    };
    pack(element, p.input_size, gru_projection_width<kTarget>(p, projection.panels), projection.packed);
}

template <Capability kTarget, typename S>
void gru_projection(const GruProblem<S>& p, const GruProjection<S>& projection, int64_t batch_begin, int64_t batch_end) {
    using T = Compute<S>;
    const int64_t I = p.input_size, width = gru_projection_width<kTarget>(p, projection.panels);
    const Scratch<T> x(p.steps * I);
    for (int64_t b = batch_begin; b < batch_end; ++b) {
        for (int64_t t = 0; t < p.lengths[b]; ++t) {
            copy_or_zero(p.input + b * p.input_stride_b + t * p.input_stride_t, I, x + t * I);
        }
        T* const projected = projection.projected + b * p.steps * width;
        multiply<T>(x, I, projection.packed, nullptr, false, projected, width, p.lengths[b], width, I);
    }
}

template <Capability kTarget, typename S>
int64_t gru_forward_block_rows() {
    return kTileRows;
}

template <Capability kTarget, typename S>
int64_t gru_forward_packed_size(const GruForward<S>& p) {
    using T = Compute<S>;
    const int64_t H = p.hidden_size;
    return panels_size<T>(panel_input_size(p), H, p.reset_after) + (p.reset_after ? 0 : packed_size<T>(H, H));
}

template <Capability kTarget, typename S>
void gru_forward_pack(const GruForward<S>& p) {
    const int64_t H = p.hidden_size;
    pack_panels(p.weight_ih, p.weight_hh, p.bias_ih, p.bias_hh, panel_input_size(p), H, p.reset_after, p.packed);
    if (!p.reset_after) pack(p.weight_hh + 2 * H * H, 1, H, H, H, packed_u_n(p));
}

template <Capability kTarget, typename S>
void gru_forward_sweep(const GruForward<S>& p, int64_t tile_begin, int64_t tile_end) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) Tile<S>(p, tile).run();
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                    \
    template int64_t gru_projection_width<kCapability, S>(const GruProblem<S>&, bool);                             \
    template int64_t gru_projection_packed_size<kCapability, S>(const GruProblem<S>&, bool);                       \
    template void gru_projection_pack<kCapability, S>(const GruProblem<S>&, const GruProjection<S>&);              \
    template void gru_projection<kCapability, S>(const GruProblem<S>&, const GruProjection<S>&, int64_t, int64_t); \
    template int64_t gru_forward_block_rows<kCapability, S>();                                                     \
    template int64_t gru_forward_packed_size<kCapability, S>(const GruForward<S>&);                                \
    template void gru_forward_pack<kCapability, S>(const GruForward<S>&);                                          \
    template void gru_forward_sweep<kCapability, S>(const GruForward<S>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
