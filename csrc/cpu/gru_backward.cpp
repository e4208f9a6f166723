// SPDX-License-Identifier: Apache-2.0
// The recurrent column, backward. With dh the gradient of h' (from the step after and from the output):
//
//     dn = dh (1 - k)          dk = dh (h - n)          dh <- dh k            h' = n + k (h - n)
//     dz, da from dk: common/gates.h
//     pre-activations: dn~ = dn (1 - n^2), dz~ = dz z (1 - z), dr~ = dr r (1 - r)
//     reset after:   d(U_n h) = dn~ r,   dr = dn~ (U_n h + b_hn),   dh += U_n^T d(U_n h)
//     reset before:  d(r h) = U_n^T dn~, dr = d(r h) h,             dh += d(r h) r
//     dh += U_r^T dr~ + U_z^T dz~
//
// One reverse sweep over time, tiles of rows as in the forward, leaves the gradients of all pre-activations in grad_gates;
// rows enter the sweep at their last step. Everything else is a product over all steps at once: the input's gradient and the
// weights' gradients. Several targets of one sequence share W x, so their gradients are summed first (grad_projected).
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/gru.h"
#include "cpu/gru_rows.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// Where the parts of `packed` begin: U_r and U_z together are [2H, H], U_n is [H, H], W is [3H, I].
template <typename T>
struct Packed {
    T *u_rz, *u_n, *w;
};

template <typename T>
Packed<T> packed_parts(T* packed, int64_t H) {
    T* const u_n = packed + packed_size<T>(2 * H, H);
    return {packed, u_n, u_n + packed_size<T>(H, H)};
}

// A step of one row.
template <typename T>
struct Step {
    const T* gates;        // [gates_size] r, z, n, (U_n h + b_hn)
    const T* h;            // [H] the state before the step, or null (zeros)
    const T* grad_output;  // [H] or null (zeros)
    T a;                   // the attention score
    T* dh;                 // [H] in: gradient of the state after the step; out: of the state before it
    T *d_rz, *d_un;        // scratch: [2H] dr~, dz~; [H] gradient of U_n's product
    T* d_rh;               // scratch: [H] gradient of r h, where the reset comes before the product
    T* grad_gates;         // [gates_size]
};

// Through h' = n + k (h - n), tanh and, where it comes after the product, the reset. Returns da.
template <Gate kGate, typename T>
T pass_1(const GruBackward<T>& p, const Step<T>& s) {
    const int64_t H = p.hidden_size;
    const Vec<T> a(s.a), one(T(1));
    Vec<T> da_lanes;
    for_vectors<T>(H, [&](int64_t j, int64_t lanes) {
        const Vec<T> r = Vec<T>::load(s.gates + j, lanes), z = Vec<T>::load(s.gates + H + j, lanes);
        const Vec<T> n = Vec<T>::load(s.gates + 2 * H + j, lanes), h = load_or_zero(s.h, j, lanes);
        const Vec<T> dh = Vec<T>::load(s.dh + j, lanes) + load_or_zero(s.grad_output, j, lanes);
        const Vec<T> k = keep_weight<kGate>(z, a);
        const KeepGradient<Vec<T>> keep = keep_gradient<kGate>(dh * (h - n), z, a);
        const Vec<T> dn = dh * (one - k) * (one - n * n);
        const Vec<T> dz = keep.dz * z * (one - z);
        da_lanes += keep.da;
        (dh * k).store(s.dh + j, lanes);
        dz.store(s.d_rz + H + j, lanes);
        dz.store(s.grad_gates + H + j, lanes);
        dn.store(s.grad_gates + 2 * H + j, lanes);
        if (!p.reset_after) {
            dn.store(s.d_un + j, lanes);
            return;
        }
        const Vec<T> d_un = dn * r;
        const Vec<T> dr = dn * Vec<T>::load(s.gates + 3 * H + j, lanes) * r * (one - r);
        dr.store(s.d_rz + j, lanes);
        dr.store(s.grad_gates + j, lanes);
        d_un.store(s.d_un + j, lanes);
        d_un.store(s.grad_gates + 3 * H + j, lanes);
    });
    return sum(da_lanes);
}

// The reset before the product: d(r h) is known now.
template <typename T>
void pass_2(const GruBackward<T>& p, const Step<T>& s) {
    const int64_t H = p.hidden_size;
    const Vec<T> one(T(1));
    for_vectors<T>(H, [&](int64_t j, int64_t lanes) {
        const Vec<T> r = Vec<T>::load(s.gates + j, lanes), h = load_or_zero(s.h, j, lanes);
        const Vec<T> d_rh = Vec<T>::load(s.d_rh + j, lanes);
        const Vec<T> dr = d_rh * h * r * (one - r);
        dr.store(s.d_rz + j, lanes);
        dr.store(s.grad_gates + j, lanes);
        (Vec<T>::load(s.dh + j, lanes) + d_rh * r).store(s.dh + j, lanes);
    });
}

// AIGRU scales the input's share by a: da is the gradient of the scaled share times W x.
template <typename T>
T input_score_gradient(const T* grad_gates, const T* projected, int64_t n) {
    Vec<T> lanes_sum;
    for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
        lanes_sum += Vec<T>::load(grad_gates + j, lanes) * Vec<T>::load(projected + j, lanes);
    });
    return sum(lanes_sum);
}

// The state before the step at time t, or null where it is zero.
template <typename T>
const T* state_before(const GruBackward<T>& p, int64_t row, int64_t s) {
    if (s > 0) return p.output + p.output_offset(row, p.time(row, s - 1));
    return p.hx != nullptr ? p.hx + row * p.hidden_size : nullptr;
}

template <typename T>
void sweep_tile(const GruBackward<T>& p, int64_t tile) {
    const int64_t H = p.hidden_size, first = tile * p.tile_rows;
    const int64_t rows = std::min(p.tile_rows, p.rows() - first);
    const int64_t* const order = p.order + first;
    const Packed<T> packed = packed_parts(p.packed, H);
    const Scratch<T> dh(rows * H), d_rz(rows * 2 * H), d_un(rows * H), d_rh(rows * H);

    const auto grad_attention = [&](int64_t row, int64_t t) -> T& {
        return p.grad_attention[row / p.targets * p.attention_stride_b + row % p.targets * p.attention_stride_c +
                                t * p.attention_stride_t];
    };
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = order[i];
        copy_or_zero(p.grad_h_n != nullptr ? p.grad_h_n + row * H : nullptr, H, dh + i * H);
        if (p.grad_attention == nullptr) continue;
        for (int64_t t = p.length(row); t < p.steps; ++t) grad_attention(row, t) = T(0);
    }
    const auto step = [&](int64_t i, int64_t s) {
        const int64_t row = order[i], t = p.time(row, s);
        return Step<T>{p.gates + (row * p.steps + t) * p.gates_size(),
                       state_before(p, row, s),
                       p.grad_output != nullptr ? p.grad_output + p.output_offset(row, t) : nullptr,
                       p.score(row, t),
                       dh + i * H,
                       d_rz + i * 2 * H,
                       d_un + i * H,
                       d_rh + i * H,
                       p.grad_gates + (row * p.steps + t) * p.gates_size()};
    };
    int64_t running = 0;
    for (int64_t s = p.steps - 1; s >= 0; --s) {
        while (running < rows && p.length(order[running]) > s) ++running;
        if (running == 0) continue;
        with_gate(p.gate, [&](auto gate) {
            for (int64_t i = 0; i < running; ++i) {
                const T da = pass_1<gate()>(p, step(i, s));
                if (gate() != Gate::none && gate() != Gate::input) grad_attention(order[i], p.time(order[i], s)) = da;
            }
        });
        if (p.reset_after) {
            multiply<T>(d_un, H, packed.u_n, nullptr, true, dh, H, running, H, H);
        } else {
            multiply<T>(d_un, H, packed.u_n, nullptr, false, d_rh, H, running, H, H);
            for (int64_t i = 0; i < running; ++i) pass_2(p, step(i, s));
        }
        multiply<T>(d_rz, 2 * H, packed.u_rz, nullptr, true, dh, H, running, H, 2 * H);
        if (p.gate != Gate::input) continue;
        for (int64_t i = 0; i < running; ++i) {
            const int64_t row = order[i], t = p.time(row, s);
            grad_attention(row, t) =
                input_score_gradient(step(i, s).grad_gates, p.projected + (row / p.targets * p.steps + t) * 3 * H, 3 * H);
        }
    }
    for (int64_t i = 0; i < rows; ++i) copy_or_zero<T>(dh + i * H, H, p.grad_hx + order[i] * H);
}

// grad_projected[b, t] = sum over targets of (a if gate is input else 1) * grad_gates[b, c, t][0:3H]
template <typename T>
void sum_targets(const GruBackward<T>& p, int64_t b) {
    const int64_t n = 3 * p.hidden_size;
    for (int64_t t = 0; t < p.lengths[b]; ++t) {
        T* const result = p.grad_projected + (b * p.steps + t) * n;
        for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
            Vec<T> total;
            for (int64_t c = 0; c < p.targets; ++c) {
                const int64_t row = b * p.targets + c;
                const Vec<T> g = Vec<T>::load(p.grad_gates + (row * p.steps + t) * p.gates_size() + j, lanes);
                total += p.gate == Gate::input ? Vec<T>(p.score(row, t)) * g : g;
            }
            total.store(result + j, lanes);
        });
    }
}

// The gradient of W x for the steps of one sequence: rows of *stride elements, of which the first 3H count.
template <typename T>
const T* projected_gradient(const GruBackward<T>& p, int64_t b, int64_t* stride) {
    if (p.grad_projected != nullptr) {
        *stride = 3 * p.hidden_size;
        return p.grad_projected + b * p.steps * *stride;
    }
    *stride = p.gates_size();
    return p.grad_gates + b * p.steps * *stride;
}

// total[j] += sum over k of rows[k * stride + j], j < n. Four running sums: a quarter of the roundings each.
template <typename T>
void add_column_sums(const T* rows, int64_t stride, int64_t count, int64_t n, T* total) {
    for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
        Vec<T> sums[4];
        for (int64_t k = 0; k < count; ++k) sums[k % 4] += Vec<T>::load(rows + k * stride + j, lanes);
        const Vec<T> column = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        (Vec<T>::load(total + j, lanes) + column).store(total + j, lanes);
    });
}

// total[j] += x[j], j < n
template <typename T>
void add(const T* x, int64_t n, T* total) {
    for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
        (Vec<T>::load(total + j, lanes) + Vec<T>::load(x + j, lanes)).store(total + j, lanes);
    });
}

template <typename T>
void reset_state(const T* r, const T* h, int64_t H, T* reset) {
    for_vectors<T>(H, [&](int64_t j, int64_t lanes) {
        (Vec<T>::load(r + j, lanes) * Vec<T>::load(h + j, lanes)).store(reset + j, lanes);
    });
}

// Gradients of rows [begin, end) of the 3H rows of weight_hh, from one row of the batch, added to weight [end - begin, H]. In
// grad_gates, the gradients of these rows' products with h stand `shift` behind their place in weight_hh.
template <typename T>
void add_recurrent_weights(const GruBackward<T>& p, int64_t row, int64_t begin, int64_t end, int64_t shift, T* reset_states,
                           T* weight) {
    const int64_t H = p.hidden_size, G = p.gates_size(), length = p.length(row);
    if (begin >= end || length == 0) return;
    const bool resets = !p.reset_after && begin >= 2 * H;  // U_n is multiplied with r h, not with h
    const T* const gates = p.gates + row * p.steps * G;
    const T* const grads = p.grad_gates + row * p.steps * G + shift + begin;

    // The times of the steps that have a predecessor in the output, and those of the predecessors: both run upwards.
    const int64_t t0 = p.reverse ? 0 : 1, before = p.reverse ? 1 : 0, count = length - 1;
    if (count > 0 && resets) {
        for (int64_t k = 0; k < count; ++k) {
            reset_state(gates + (t0 + k) * G, p.output + p.output_offset(row, before + k), H, reset_states + k * H);
        }
        accumulate_outer<T>(grads + t0 * G, G, reset_states, H, weight, H, end - begin, H, count);
    } else if (count > 0) {
        accumulate_outer<T>(grads + t0 * G, G, p.output + p.output_offset(row, before), p.output_stride_t, weight, H,
                            end - begin, H, count);
    }
    if (p.hx == nullptr) return;
    const int64_t first = p.time(row, 0);
    if (resets) reset_state(gates + first * G, p.hx + row * H, H, reset_states);
    accumulate_outer<T>(grads + first * G, G, resets ? reset_states : p.hx + row * H, H, weight, H, end - begin, H, 1);
}

}  // namespace

template <Capability kTarget, typename T>
int64_t gru_backward_packed_size(int64_t I, int64_t H) {
    return packed_size<T>(2 * H, H) + packed_size<T>(H, H) + packed_size<T>(3 * H, I);
}

template <Capability kTarget, typename T>
void gru_backward_pack(const GruBackward<T>& p) {
    const int64_t I = p.input_size, H = p.hidden_size;
    const Packed<T> packed = packed_parts(p.packed, H);
    pack(p.weight_hh, H, 1, 2 * H, H, packed.u_rz);
    pack(p.weight_hh + 2 * H * H, H, 1, H, H, packed.u_n);
    pack(p.weight_ih, I, 1, 3 * H, I, packed.w);
}

template <Capability kTarget, typename T>
void gru_backward_sweep(const GruBackward<T>& p, int64_t tile_begin, int64_t tile_end) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) sweep_tile(p, tile);
}

template <Capability kTarget, typename T>
void gru_backward_input(const GruBackward<T>& p, int64_t batch_begin, int64_t batch_end) {
    const int64_t I = p.input_size, H = p.hidden_size;
    const Packed<T> packed = packed_parts(p.packed, H);
    for (int64_t b = batch_begin; b < batch_end; ++b) {
        if (p.grad_projected != nullptr) sum_targets(p, b);
        int64_t stride = 0;
        const T* const grads = projected_gradient(p, b, &stride);
        T* const grad_input = p.grad_input + b * p.input_stride_b;
        multiply<T>(grads, stride, packed.w, nullptr, false, grad_input, p.input_stride_t, p.lengths[b], I, 3 * H);
        for (int64_t t = p.lengths[b]; t < p.steps; ++t) fill_zeros(grad_input + t * p.input_stride_t, I);
    }
}

template <Capability kTarget, typename T>
void gru_backward_weights(const GruBackward<T>& p, int64_t begin, int64_t end) {
    // Summed over groups of sequences or rows first: the roundings of a long sum grow with the number of its terms.
    constexpr int64_t kGroup = 16;
    const int64_t I = p.input_size, H = p.hidden_size, G = p.gates_size(), n = end - begin;
    const int64_t split = std::clamp(2 * H, begin, end);  // rows of r and z below, of n from here on
    const Scratch<T> weight(n * std::max(I, H)), bias(2 * n), reset_states(p.steps * H);
    T* const recurrent_bias = bias + n;  // of the rows from split on
    for (int64_t first = 0; first < p.batch; first += kGroup) {
        fill_zeros<T>(weight, n * I);
        for (int64_t b = first; b < std::min(first + kGroup, p.batch); ++b) {
            int64_t stride = 0;
            const T* const grads = projected_gradient(p, b, &stride) + begin;
            accumulate_outer<T>(grads, stride, p.input + b * p.input_stride_b, p.input_stride_t, weight, I, n, I, p.lengths[b]);
        }
        add<T>(weight, n * I, p.grad_weight_ih + begin * I);
    }
    for (int64_t first = 0; first < p.rows(); first += kGroup) {
        const int64_t last = std::min(first + kGroup, p.rows());
        fill_zeros<T>(weight, n * H);
        fill_zeros<T>(bias, 2 * n);
        for (int64_t row = first; row < last; ++row) {
            const T* const grads = p.grad_gates + row * p.steps * G;
            add_column_sums<T>(grads + begin, G, p.length(row), n, bias);
            if (p.reset_after) add_column_sums<T>(grads + split + H, G, p.length(row), end - split, recurrent_bias);
            add_recurrent_weights<T>(p, row, begin, split, 0, reset_states, weight);
            add_recurrent_weights<T>(p, row, split, end, p.reset_after ? H : 0, reset_states, weight + (split - begin) * H);
        }
        add<T>(weight, n * H, p.grad_weight_hh + begin * H);
        add<T>(bias, n, p.grad_bias_ih + begin);
        // What is added to W x + U h is added to both biases; the reset, where it comes after the product, tells those of n
        // apart.
        add<T>(bias, split - begin, p.grad_bias_hh + begin);
        add<T>(p.reset_after ? recurrent_bias : bias + (split - begin), end - split, p.grad_bias_hh + split);
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                \
    template int64_t gru_backward_packed_size<kCapability, T>(int64_t, int64_t);               \
    template void gru_backward_pack<kCapability, T>(const GruBackward<T>&);                    \
    template void gru_backward_sweep<kCapability, T>(const GruBackward<T>&, int64_t, int64_t); \
    template void gru_backward_input<kCapability, T>(const GruBackward<T>&, int64_t, int64_t); \
    template void gru_backward_weights<kCapability, T>(const GruBackward<T>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
