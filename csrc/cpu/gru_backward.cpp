// SPDX-License-Identifier: Apache-2.0
// The recurrent column, backward. With dh the gradient of h' (from the step after and from the output):
//
//     dn = dh (1 - k)          dk = dh (h - n)          dh <- dh k            h' = n + k (h - n)
//     dz, da from dk: common/gates.h
//     pre-activations: dn~ = dn (1 - n^2), dz~ = dz z (1 - z), dr~ = dr r (1 - r)
//     reset after:   d(U_n h) = dn~ r,   dr = dn~ (U_n h + b_hn),   dh += U_n^T d(U_n h)
//     reset before:  d(r h) = U_n^T dn~, dr = d(r h) h,             dh += d(r h) r
//     dh += U_r^T dr~ + U_z^T dz~
//     dx = W^T (dr~, dz~, dn~), and the gradients of the weights: sums over rows and time of these with x and h
//
// Tiles of rows go backwards through time, as they went forwards; rows enter at their last step. The gradients of the
// pre-activations of a step and its [x, h] are kept in a chunk of at most kChunk entries, an entry being one step of one row,
// without gaps whatever the lengths. A full chunk, still in the cache, gives its entries' dx and is added to the gradients of
// the weights, summed from zero in registers first: long sums term by term would be rounded at their full size each time.
//
// Where several rows share an x (targets), the gradients of W x are summed over them first: dx and the gradient of W then cost
// one product per sequence (gru_backward_input).
//
// The gradients of an entry stand in the order n, r, z, U_n h: W's are the first three, U's the last three. With the reset
// before the product there are three: n, r, z.
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/gru.h"
#include "cpu/gru_rows.h"
#include "cpu/prefetch.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

constexpr int64_t kChunk = 128;

// Where the parts of `packed` begin: U is [3H, H], with the reset before the product as [2H, H] and [H, H]; W is [3H, I].
template <typename T>
struct Packed {
    T *u, *u_n, *w;
};

template <typename S>
Packed<Compute<S>> packed_parts(const GruBackward<S>& p) {
    using T = Compute<S>;
    const int64_t H = p.hidden_size;
    T* const u_n = p.packed + packed_size<T>((p.reset_after ? 3 : 2) * H, H);
    return {p.packed, u_n, u_n + (p.reset_after ? 0 : packed_size<T>(H, H))};
}

// One group's sums: the gradients of W and U, transposed, and of the biases. Columns of W are in the order n, r, z, of U in
// the order r, z, n, of the biases in that of an entry.
template <typename T>
struct Sums {
    T *w, *u, *bias;  // [I, 3H], [H, 3H], [gates_size]
};

template <typename S>
int64_t sums_size(const GruBackward<S>& p) {
    return (p.input_size + p.hidden_size) * 3 * p.hidden_size + p.gates_size();
}

template <typename S>
Sums<Compute<S>> sums_of(const GruBackward<S>& p, int64_t group) {
    Compute<S>* const first = p.sums + group * sums_size(p);
    const int64_t width = 3 * p.hidden_size;
    return {first, first + p.input_size * width, first + (p.input_size + p.hidden_size) * width};
}

// The rows of a group, as positions in `order`.
struct Range {
    int64_t begin, end;
};

template <typename S>
Range rows_of(const GruBackward<S>& p, int64_t group) {
    return {p.group_begin[group], p.group_begin[group + 1]};
}

// A group's part of the gradient of W x of the sequence at this position of the order of sequences, [T, 3H], gates n, r, z. A
// sequence whose rows are spread over two groups has two parts.
template <typename S>
Compute<S>* projected_part(const GruBackward<S>& p, int64_t group, int64_t position) {
    return p.grad_projected + (position + group) * p.steps * 3 * p.hidden_size;
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

// total[j] += scale * x[j], j < n
template <typename T>
void add(const T* x, T scale, int64_t n, T* total) {
    for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
        (Vec<T>::load(total + j, lanes) + Vec<T>(scale) * Vec<T>::load(x + j, lanes)).store(total + j, lanes);
    });
}

template <typename T, typename S>
T dot(const T* x, const S* y, int64_t n) {
    Vec<T> lanes_sum;
    for_vectors<T>(n, [&](int64_t j, int64_t lanes) { lanes_sum += Vec<T>::load(x + j, lanes) * load<T>(y + j, lanes); });
    return sum(lanes_sum);
}

template <typename T, typename S>
void store_one(T x, S* p) {
    store(Vec<T>(x), p, 1);
}

// A row of a tile at its first step; step s is s strides further on. Pointers may be null as in the contract.
template <typename S>
struct Row {
    int64_t length;
    const S *input, *attention, *hx, *output, *gates, *grad_output;
    S *grad_input, *grad_attention;
    const Compute<S>* projected;  // null where it is not needed
    Compute<S>* grad_projected;   // null where the input's gradient is this row's alone
};

struct Strides {
    int64_t input, attention, output, gates, projected;
};

// What becomes of an entry's gradient of a x, where a is 1 but for AIGRU.
template <typename S>
struct Entry {
    const S* input;
    S *grad_input, *grad_attention;
    Compute<S> a;
};

template <typename S>
class GroupSweep {
    using T = Compute<S>;

  public:
    GroupSweep(const GruBackward<S>& p, int64_t group)
        : p_(p),
          group_(group),
          H_(p.hidden_size),
          I_(p.targets == 1 ? p.input_size : 0),
          packed_(packed_parts(p)),
          sums_(sums_of(p, group)),
          grads_stride_(padded<T>(p.gates_size())),
          inputs_stride_(padded<T>(I_ + (p.reset_after ? 1 : 2) * H_)),
          capacity_(std::max(kChunk, p.tile_rows)),
          rows_(p.tile_rows),
          entries_(capacity_),
          grads_(capacity_ * grads_stride_),
          inputs_(capacity_ * inputs_stride_),
          grad_inputs_(capacity_ * I_),
          dh_(p.tile_rows * H_),
          d_reset_states_(p.reset_after ? 0 : p.tile_rows * H_) {}

    void run() {
        fill_zeros(sums_.w, sums_size(p_));
        const Range rows = rows_of(p_, group_);
        if (p_.grad_projected != nullptr && rows.begin < rows.end) {
            for (int64_t position = rows.begin / p_.targets; position <= (rows.end - 1) / p_.targets; ++position) {
                const int64_t length = p_.length(p_.order[position * p_.targets]);
                fill_zeros(projected_part(p_, group_, position), length * 3 * H_);
            }
        }
        for (int64_t first = rows.begin; first < rows.end; first += p_.tile_rows) {
            sweep(first, std::min(p_.tile_rows, rows.end - first));
        }
        flush();
    }

  private:
    // The parts of an entry.
    T* grads(int64_t entry) const { return grads_ + entry * grads_stride_; }
    T* x(int64_t entry) const { return inputs_ + entry * inputs_stride_; }
    T* h(int64_t entry) const { return x(entry) + I_; }
    T* reset_h(int64_t entry) const { return h(entry) + H_; }

    void sweep(int64_t first, int64_t count) {
        begin(first, count);
        int64_t running = 0;
        for (int64_t s = p_.steps - 1; s >= 0; --s) {
            while (running < count && rows_[running].length > s) ++running;
            if (running == 0) continue;
            if (count_ + running > capacity_) flush();
            step(s, running);
            count_ += running;
        }
        for (int64_t i = 0; i < count; ++i) copy_or_zero<T>(dh_ + i * H_, H_, p_.grad_hx + p_.order[first + i] * H_);
    }

    void begin(int64_t first, int64_t count) {
        const int64_t direction = p_.reverse ? -1 : 1;
        strides_ = {direction * p_.input_stride_t, direction * p_.attention_stride_t, direction * p_.output_stride_t,
                    direction * p_.gates_size(), direction * 3 * H_};
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = p_.order[first + i], b = row / p_.targets, length = p_.lengths[b];
            const int64_t t = length > 0 ? p_.time(row, 0) : 0;
            const int64_t input = b * p_.input_stride_b + t * p_.input_stride_t, output = p_.output_offset(row, t);
            const auto at = [](auto* p, int64_t offset) { return p != nullptr ? p + offset : nullptr; };
            rows_[i] = {
                length,
                p_.input + input,
                at(p_.attention, p_.attention_offset(row, t)),
                at(p_.hx, row * H_),
                p_.output + output,
                p_.gates + (p_.entry[row] + t) * p_.gates_size(),
                at(p_.grad_output, output),
                p_.grad_input + input,
                at(p_.grad_attention, p_.attention_offset(row, t)),
                at(p_.projected, (b * p_.steps + t) * 3 * H_),
                p_.grad_projected != nullptr ? projected_part(p_, group_, (first + i) / p_.targets) + t * 3 * H_ : nullptr};
            copy_or_zero(p_.grad_h_n != nullptr ? p_.grad_h_n + row * H_ : nullptr, H_, dh_ + i * H_);
            for (int64_t after = length; after < p_.steps; ++after) {
                if (p_.grad_projected == nullptr) {
                    fill_zeros(p_.grad_input + b * p_.input_stride_b + after * p_.input_stride_t, I_);
                }
                if (p_.grad_attention != nullptr) fill_zeros(p_.grad_attention + p_.attention_offset(row, after), 1);
            }
        }
    }

    // Step s of the first `running` rows: the entries count_.. of the chunk, and dh of the step before.
    void step(int64_t s, int64_t running) {
        with_gate(p_.gate, [&](auto gate) {
            for (int64_t i = 0; i < running; ++i) through_gates<gate()>(s, i, count_ + i);
        });
        T* const first = grads(count_);
        if (p_.reset_after) {
            multiply<T>(first + H_, grads_stride_, packed_.u, nullptr, true, dh_, H_, running, H_, 3 * H_);
        } else {
            multiply<T>(first, grads_stride_, packed_.u_n, nullptr, false, d_reset_states_, H_, running, H_, H_);
            for (int64_t i = 0; i < running; ++i) through_reset(s, i, count_ + i);
            multiply<T>(first + H_, grads_stride_, packed_.u, nullptr, true, dh_, H_, running, H_, 2 * H_);
        }
        if (p_.grad_projected == nullptr) return;
        for (int64_t i = 0; i < running; ++i) {
            const Row<S>& row = rows_[i];
            const T* const d_projected = grads(count_ + i);
            add(d_projected, entries_[count_ + i].a, 3 * H_, row.grad_projected + s * strides_.projected);
            if (p_.gate != Gate::input) continue;
            const T* const projected = row.projected + s * strides_.projected;  // r, z, n
            store_one(dot(d_projected, projected + 2 * H_, H_) + dot(d_projected + H_, projected, 2 * H_),
                      row.grad_attention + s * strides_.attention);
        }
    }

    // Through h' = n + k (h - n), tanh and, where it comes after the product, the reset.
    template <Gate kGate>
    void through_gates(int64_t s, int64_t i, int64_t entry) {
        const Row<S>& row = rows_[i];
        const S* const gates = row.gates + s * strides_.gates;
        const S* const before = s > 0 ? row.output + (s - 1) * strides_.output : row.hx;
        const S* const grad_output = row.grad_output != nullptr ? row.grad_output + s * strides_.output : nullptr;
        T *const result = grads(entry), *const dh_row = dh_ + i * H_, *const h_row = h(entry);
        if (s > 0) {  // what the step before takes
            prefetch(gates - strides_.gates, p_.gates_size());
            prefetch(row.input + (s - 1) * strides_.input, I_);
            if (grad_output != nullptr) prefetch(grad_output - strides_.output, H_);
            if (s > 1) prefetch(before - strides_.output, H_);
        }
        const T score = row.attention != nullptr ? load_one(row.attention + s * strides_.attention) : T(1);
        const Vec<T> a(score), one(T(1));
        Vec<T> da_lanes;
        for_vectors<T>(H_, [&](int64_t j, int64_t lanes) {
            const Vec<T> r = load<T>(gates + j, lanes), z = load<T>(gates + H_ + j, lanes);
            const Vec<T> n = load<T>(gates + 2 * H_ + j, lanes), h = load_or_zero<T>(before, j, lanes);
            const Vec<T> dh = Vec<T>::load(dh_row + j, lanes) + load_or_zero<T>(grad_output, j, lanes);
            const Vec<T> k = keep_weight<kGate>(z, a);
            const KeepGradient<Vec<T>> keep = keep_gradient<kGate>(dh * (h - n), z, a);
            const Vec<T> dn = dh * (one - k) * (one - n * n);
            da_lanes += keep.da;
            h.store(h_row + j, lanes);
            (dh * k).store(dh_row + j, lanes);
            dn.store(result + j, lanes);
            (keep.dz * z * (one - z)).store(result + 2 * H_ + j, lanes);
            if (!p_.reset_after) return;
            (dn * load<T>(gates + 3 * H_ + j, lanes) * r * (one - r)).store(result + H_ + j, lanes);
            (dn * r).store(result + 3 * H_ + j, lanes);
        });
        if (kGate != Gate::none && kGate != Gate::input) {
            store_one(sum(da_lanes), row.grad_attention + s * strides_.attention);
        }
        const T input_scale = kGate == Gate::input ? score : T(1);
        const int64_t input = s * strides_.input;
        entries_[entry] = {row.input + input, row.grad_input + input,
                           kGate == Gate::input ? row.grad_attention + s * strides_.attention : nullptr, input_scale};
        for_vectors<T>(I_, [&](int64_t j, int64_t lanes) {
            (Vec<T>(input_scale) * load<T>(row.input + input + j, lanes)).store(x(entry) + j, lanes);
        });
    }

    // The reset before the product: d(r h) is known now.
    void through_reset(int64_t s, int64_t i, int64_t entry) {
        const S* const gates = rows_[i].gates + s * strides_.gates;
        const T *const h_row = h(entry), *const d_reset = d_reset_states_ + i * H_;
        T *const dh_row = dh_ + i * H_, *const reset_row = reset_h(entry), *const dr = grads(entry) + H_;
        const Vec<T> one(T(1));
        for_vectors<T>(H_, [&](int64_t j, int64_t lanes) {
            const Vec<T> r = load<T>(gates + j, lanes), h = Vec<T>::load(h_row + j, lanes);
            const Vec<T> d_rh = Vec<T>::load(d_reset + j, lanes);
            (r * h).store(reset_row + j, lanes);
            (d_rh * h * r * (one - r)).store(dr + j, lanes);
            (Vec<T>::load(dh_row + j, lanes) + d_rh * r).store(dh_row + j, lanes);
        });
    }

    // Empties the chunk into grad_input and the sums.
    void flush() {
        if (count_ == 0) return;
        const int64_t width = 3 * H_;
        if (p_.grad_projected == nullptr) {
            multiply<T>(grads_, grads_stride_, packed_.w, nullptr, false, grad_inputs_, I_, count_, I_, width);
            for (int64_t k = 0; k < count_; ++k) {
                const Entry<S>& entry = entries_[k];
                const T* const dx = grad_inputs_ + k * I_;
                for_vectors<T>(I_, [&](int64_t j, int64_t lanes) {
                    store(Vec<T>(entry.a) * Vec<T>::load(dx + j, lanes), entry.grad_input + j, lanes);
                });
                if (entry.grad_attention != nullptr) store_one(dot(dx, entry.input, I_), entry.grad_attention);
            }
            accumulate_outer<T>(inputs_, inputs_stride_, grads_, grads_stride_, sums_.w, width, I_, width, count_);
        }
        if (p_.reset_after) {
            accumulate_outer<T>(h(0), inputs_stride_, grads_ + H_, grads_stride_, sums_.u, width, H_, width, count_);
        } else {
            accumulate_outer<T>(h(0), inputs_stride_, grads_ + H_, grads_stride_, sums_.u, width, H_, 2 * H_, count_);
            accumulate_outer<T>(reset_h(0), inputs_stride_, grads_, grads_stride_, sums_.u + 2 * H_, width, H_, H_, count_);
        }
        add_column_sums<T>(grads_, grads_stride_, count_, p_.gates_size(), sums_.bias);
        count_ = 0;
    }

    const GruBackward<S>& p_;
    const int64_t group_, H_, I_;  // I is 0 where the input's gradient is not this sweep's
    const Packed<T> packed_;
    const Sums<T> sums_;
    const int64_t grads_stride_, inputs_stride_, capacity_;
    Strides strides_;
    int64_t count_ = 0;  // entries in the chunk
    const Scratch<Row<S>> rows_;
    const Scratch<Entry<S>> entries_;
    const Scratch<T> grads_, inputs_, grad_inputs_;  // the chunk: gradients; x, h and, reset before, r h; dx
    const Scratch<T> dh_, d_reset_states_;           // [tile_rows, H]
};

// The rows of W are packed in the order of an entry's gradients: n, r, z. The same for the way back.
int64_t gate_row(int64_t k, int64_t H) { return k < H ? 2 * H + k : k - H; }

// grad_input of the sequence at this position, and its share of the gradient of W.
template <typename S>
void input_gradient(const GruBackward<S>& p, int64_t position, Compute<S>* total, Compute<S>* x, Compute<S>* dx,
                    Compute<S>* sums_w) {
    using T = Compute<S>;
    const int64_t I = p.input_size, width = 3 * p.hidden_size;
    const int64_t b = p.targets > 0 ? p.order[position * p.targets] / p.targets : position;
    const int64_t length = p.lengths[b];
    fill_zeros(total, length * width);
    for (int64_t group = 0; group < p.groups; ++group) {
        const Range rows = rows_of(p, group);
        const bool shares = std::max(rows.begin, position * p.targets) < std::min(rows.end, (position + 1) * p.targets);
        if (!shares) continue;
        add(projected_part(p, group, position), T(1), length * width, total);
    }
    multiply<T>(total, width, packed_parts(p).w, nullptr, false, dx, I, length, I, width);
    for (int64_t t = 0; t < p.steps; ++t) {
        const int64_t offset = b * p.input_stride_b + t * p.input_stride_t;
        copy_or_zero(t < length ? dx + t * I : nullptr, I, p.grad_input + offset);
        if (t < length) copy_or_zero(p.input + offset, I, x + t * I);
    }
    accumulate_outer<T>(x, I, total, width, sums_w, width, I, width, length);
}

}  // namespace

template <Capability kTarget, typename S>
int64_t gru_backward_packed_size(const GruBackward<S>& p) {
    using T = Compute<S>;
    const int64_t I = p.input_size, H = p.hidden_size;
    const int64_t u = p.reset_after ? packed_size<T>(3 * H, H) : packed_size<T>(2 * H, H) + packed_size<T>(H, H);
    return u + packed_size<T>(3 * H, I);
}

template <Capability kTarget, typename S>
int64_t gru_backward_sums_size(const GruBackward<S>& p) {
    return sums_size(p);
}

template <Capability kTarget, typename S>
void gru_backward_pack(const GruBackward<S>& p) {
    const int64_t I = p.input_size, H = p.hidden_size;
    const Packed<Compute<S>> packed = packed_parts(p);
    pack(p.weight_hh, H, 1, (p.reset_after ? 3 : 2) * H, H, packed.u);
    if (!p.reset_after) pack(p.weight_hh + 2 * H * H, H, 1, H, H, packed.u_n);
    pack([&](int64_t k, int64_t n) { return load_one(p.weight_ih + gate_row(k, H) * I + n); }, 3 * H, I, packed.w);
}

template <Capability kTarget, typename S>
void gru_backward_sweep(const GruBackward<S>& p, int64_t group_begin, int64_t group_end) {
    for (int64_t group = group_begin; group < group_end; ++group) GroupSweep<S>(p, group).run();
}

template <Capability kTarget, typename S>
void gru_backward_input(const GruBackward<S>& p, int64_t group_begin, int64_t group_end) {
    const int64_t I = p.input_size;
    const Scratch<Compute<S>> total(p.steps * 3 * p.hidden_size), x(p.steps * I), dx(p.steps * I);
    for (int64_t group = group_begin; group < group_end; ++group) {
        const int64_t end = (group + 1) * p.batch / p.groups;
        for (int64_t position = group * p.batch / p.groups; position < end; ++position) {
            input_gradient<S>(p, position, total, x, dx, sums_of(p, group).w);
        }
    }
}

template <Capability kTarget, typename S>
void gru_backward_weights(const GruBackward<S>& p, int64_t begin, int64_t end) {
    using T = Compute<S>;
    constexpr int64_t kBlock = 16;  // columns of the gradients that are written side by side
    const int64_t I = p.input_size, H = p.hidden_size, width = 3 * H;
    const Scratch<T> total(std::max(kBlock * width, p.gates_size()));
    const auto sum_groups = [&](int64_t offset, int64_t n) {
        fill_zeros<T>(total, n);
        for (int64_t group = 0; group < p.groups; ++group) add<T>(sums_of(p, group).w + offset, T(1), n, total);
    };
    for (int64_t k = begin; k < end; k += kBlock) {
        const int64_t count = std::min(kBlock, end - k);
        sum_groups(k * width, count * width);
        for (int64_t column = 0; column < width; ++column) {
            for (int64_t j = 0; j < count; ++j) {
                S* const place =
                    k + j < I ? p.grad_weight_ih + gate_row(column, H) * I + k + j : p.grad_weight_hh + column * H + k + j - I;
                store_one(total[j * width + column], place);
            }
        }
    }
    if (begin > 0) return;
    sum_groups((I + H) * width, p.gates_size());
    // What is added to W x + U h is added to both biases; the reset, where it comes after the product, tells those of n apart.
    copy_or_zero<T>(total + H, 2 * H, p.grad_bias_ih);
    copy_or_zero<T>(total, H, p.grad_bias_ih + 2 * H);
    copy_or_zero<T>(total + H, 2 * H, p.grad_bias_hh);
    copy_or_zero<T>(p.reset_after ? total + 3 * H : total, H, p.grad_bias_hh + 2 * H);
}

#define DIEN_OPS_INSTANTIATE(S)                                                                \
    template int64_t gru_backward_packed_size<kCapability, S>(const GruBackward<S>&);          \
    template int64_t gru_backward_sums_size<kCapability, S>(const GruBackward<S>&);            \
    template void gru_backward_pack<kCapability, S>(const GruBackward<S>&);                    \
    template void gru_backward_sweep<kCapability, S>(const GruBackward<S>&, int64_t, int64_t); \
    template void gru_backward_input<kCapability, S>(const GruBackward<S>&, int64_t, int64_t); \
    template void gru_backward_weights<kCapability, S>(const GruBackward<S>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
