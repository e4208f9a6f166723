// SPDX-License-Identifier: Apache-2.0
// The recurrent column, forward: DIEN eq. 2-5 and 9-12 in torch.nn.GRU's parameters.
//
//     r = sigmoid(W_r x + b_ir + U_r h + b_hr)
//     z = sigmoid(W_z x + b_iz + U_z h + b_hz)
//     n = tanh(W_n x + b_in + r (U_n h + b_hn))     reset after the product
//     n = tanh(W_n x + b_in + U_n (r h) + b_hn)     reset before it
//     h' = n + k (h - n)                            k: common/gates.h
//
// The input's share W x does not depend on h: gru_project_input computes it for all steps of a sequence at once, and once
// for all of its targets. What remains is a chain of T small products per row. Rows do not depend on each other, so a thread
// takes a tile of rows through all steps alone; the tile's states, [tile_rows, H], and the packed U stay in the caches. The
// rows of a tile are sorted by length, longest first: at step s the rows still running are a prefix of the tile, and padding
// costs nothing.
//
// A step is: product with U_r and U_z; sigmoids (pass 1); product with U_n; tanh and the new state (pass 2).
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/gru.h"
#include "cpu/gru_rows.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// Where the parts of `packed` begin. U_r and U_z together are [H, 2H], U_n is [H, H], W is [I, 3H].
template <typename T>
struct Packed {
    T *u_rz, *u_n, *w;
};

template <typename T>
Packed<T> packed_parts(T* packed, int64_t H) {
    T* const u_n = packed + packed_size<T>(H, 2 * H);
    return {packed, u_n, u_n + packed_size<T>(H, H)};
}

// A step of one row. Rows of the scratch buffers are this row's.
template <typename T>
struct Step {
    const T* projected;    // [3H] W x
    const T *b_ih, *b_hh;  // [3H] or null
    T a;                   // the attention score
    T input_scale;         // a where gate is input, else 1
    T* h;                  // [H] the state, replaced in pass 2
    T *rz, *rh, *u_n;      // scratch: [2H] U h and then r, z; [H] r h; [H] U_n h or U_n (r h)
    T *output, *gates;     // [H]; [gates_size] or null
};

template <typename T>
void pass_1(const GruForward<T>& p, const Step<T>& s) {
    const int64_t H = p.hidden_size;
    const Vec<T> scale(s.input_scale);
    for_vectors<T>(2 * H, [&](int64_t j, int64_t lanes) {
        const Vec<T> x = scale * Vec<T>::load(s.projected + j, lanes) + load_or_zero(s.b_ih, j, lanes);
        const Vec<T> u = Vec<T>::load(s.rz + j, lanes) + load_or_zero(s.b_hh, j, lanes);
        sigmoid(x + u).store(s.rz + j, lanes);
    });
    if (p.reset_after) return;
    for_vectors<T>(H, [&](int64_t j, int64_t lanes) {
        (Vec<T>::load(s.rz + j, lanes) * Vec<T>::load(s.h + j, lanes)).store(s.rh + j, lanes);
    });
}

template <Gate kGate, typename T>
void pass_2(const GruForward<T>& p, const Step<T>& s) {
    const int64_t H = p.hidden_size;
    const Vec<T> a(s.a), scale(s.input_scale);
    for_vectors<T>(H, [&](int64_t j, int64_t lanes) {
        const Vec<T> x = scale * Vec<T>::load(s.projected + 2 * H + j, lanes) + load_or_zero(s.b_ih, 2 * H + j, lanes);
        const Vec<T> u_n = Vec<T>::load(s.u_n + j, lanes) + load_or_zero(s.b_hh, 2 * H + j, lanes);
        const Vec<T> r = Vec<T>::load(s.rz + j, lanes), z = Vec<T>::load(s.rz + H + j, lanes);
        const Vec<T> n = tanh(x + (p.reset_after ? r * u_n : u_n));
        const Vec<T> h = Vec<T>::load(s.h + j, lanes);
        const Vec<T> new_h = n + keep_weight<kGate>(z, a) * (h - n);
        new_h.store(s.h + j, lanes);
        new_h.store(s.output + j, lanes);
        if (s.gates == nullptr) return;
        r.store(s.gates + j, lanes);
        z.store(s.gates + H + j, lanes);
        n.store(s.gates + 2 * H + j, lanes);
        if (p.reset_after) u_n.store(s.gates + 3 * H + j, lanes);
    });
}

template <typename T>
void sweep_tile(const GruForward<T>& p, int64_t tile) {
    const int64_t H = p.hidden_size, first = tile * p.tile_rows;
    const int64_t rows = std::min(p.tile_rows, p.rows() - first);
    const int64_t* const order = p.order + first;
    const Packed<T> packed = packed_parts(p.packed, H);
    const Scratch<T> h(rows * H), rz(rows * 2 * H), rh(rows * H), u_n(rows * H);

    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = order[i];
        copy_or_zero(p.hx != nullptr ? p.hx + row * H : nullptr, H, h + i * H);
        for (int64_t t = p.length(row); t < p.steps; ++t) {
            fill_zeros(p.output + p.output_offset(row, t), H);
            if (p.gates != nullptr) fill_zeros(p.gates + (row * p.steps + t) * p.gates_size(), p.gates_size());
        }
    }
    const auto step = [&](int64_t i, int64_t s) {
        const int64_t row = order[i], t = p.time(row, s);
        const T a = p.score(row, t);
        return Step<T>{p.projected + (row / p.targets * p.steps + t) * 3 * H,
                       p.bias_ih,
                       p.bias_hh,
                       a,
                       p.gate == Gate::input ? a : T(1),
                       h + i * H,
                       rz + i * 2 * H,
                       rh + i * H,
                       u_n + i * H,
                       p.output + p.output_offset(row, t),
                       p.gates != nullptr ? p.gates + (row * p.steps + t) * p.gates_size() : nullptr};
    };
    int64_t running = rows;
    for (int64_t s = 0; s < p.steps; ++s) {
        while (running > 0 && p.length(order[running - 1]) <= s) --running;
        if (running == 0) break;
        multiply<T>(h, H, packed.u_rz, nullptr, false, rz, 2 * H, running, 2 * H, H);
        for (int64_t i = 0; i < running; ++i) pass_1(p, step(i, s));
        multiply<T>(p.reset_after ? h : rh, H, packed.u_n, nullptr, false, u_n, H, running, H, H);
        with_gate(p.gate, [&](auto gate) {
            for (int64_t i = 0; i < running; ++i) pass_2<gate()>(p, step(i, s));
        });
    }
    for (int64_t i = 0; i < rows; ++i) copy_or_zero<T>(h + i * H, H, p.h_n + order[i] * H);
}

}  // namespace

template <Capability kTarget, typename T>
int64_t gru_forward_packed_size(int64_t I, int64_t H) {
    return packed_size<T>(H, 2 * H) + packed_size<T>(H, H) + packed_size<T>(I, 3 * H);
}

template <Capability kTarget, typename T>
void gru_forward_pack(const GruForward<T>& p) {
    const int64_t I = p.input_size, H = p.hidden_size;
    const Packed<T> packed = packed_parts(p.packed, H);
    pack(p.weight_hh, 1, H, H, 2 * H, packed.u_rz);
    pack(p.weight_hh + 2 * H * H, 1, H, H, H, packed.u_n);
    pack(p.weight_ih, 1, I, I, 3 * H, packed.w);
}

template <Capability kTarget, typename T>
void gru_project_input(const GruForward<T>& p, int64_t batch_begin, int64_t batch_end) {
    const int64_t I = p.input_size, H = p.hidden_size;
    const Packed<T> packed = packed_parts(p.packed, H);
    for (int64_t b = batch_begin; b < batch_end; ++b) {
        multiply<T>(p.input + b * p.input_stride_b, p.input_stride_t, packed.w, nullptr, false,
                    p.projected + b * p.steps * 3 * H, 3 * H, p.lengths[b], 3 * H, I);
    }
}

template <Capability kTarget, typename T>
void gru_forward_sweep(const GruForward<T>& p, int64_t tile_begin, int64_t tile_end) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) sweep_tile(p, tile);
}

#define DIEN_OPS_INSTANTIATE(T)                                                              \
    template int64_t gru_forward_packed_size<kCapability, T>(int64_t, int64_t);              \
    template void gru_forward_pack<kCapability, T>(const GruForward<T>&);                    \
    template void gru_project_input<kCapability, T>(const GruForward<T>&, int64_t, int64_t); \
    template void gru_forward_sweep<kCapability, T>(const GruForward<T>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
