// SPDX-License-Identifier: Apache-2.0
// L_aux = -(1/N) sum_i sum_t [ log sigma(h_t, e_{t+1}) + log(1 - sigma(h_t, e^_{t+1})) ] (DIEN eq. 6)
//
// With x the logit of the item that was clicked and y that of the sampled one, a pair's loss is softplus(-x) + softplus(y):
// no sigmoid is formed, so none can saturate and log(0) cannot occur. Its derivatives are -sigma(-x) and sigma(y).
//
// Rows of the batch are independent and a thread takes a range of them. Time is spent reading the states and the items, H
// numbers for each of which one logit comes out: the two inner products of a pair share one pass over the state, and padding
// is not read. The loss itself works on logits, a vector of pairs at a time. A row's losses are added in double, in the order
// of time, and the caller adds the rows: the result does not depend on the number of threads.

#include "cpu/aux_loss.h"

#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

int64_t valid_pairs(int64_t length) { return length > 1 ? length - 1 : 0; }

// log(1 + u) for 0 <= u <= 1, to full relative precision: 2 artanh(s) with s = u / (2 + u) <= 1/3, whose series
// s + s^3/3 + s^5/5 + ... needs terms up to s^(2 kTerms - 1).
template <typename T>
Vec<T> log1p_of_fraction(Vec<T> u) {
    constexpr int kTerms = sizeof(T) == sizeof(float) ? 8 : 17;  // the rest is below (1/9)^kTerms: 2e-8, 6e-17
    const Vec<T> s = u / (Vec<T>(T(2)) + u);
    const Vec<T> square = s * s;
    Vec<T> series(T(1) / T(2 * kTerms - 1));
    for (int k = kTerms - 1; k >= 1; --k) series = Vec<T>(T(1) / T(2 * k - 1)) + series * square;
    return (s + s) * series;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <typename T>
Vec<T> softplus(Vec<T> x) {
    const Vec<T> minus_magnitude = where_positive(x, -x, x);
    return where_positive(x, x, Vec<T>()) + log1p_of_fraction(exp(minus_magnitude));
}

// <h, e> and <h, e_hat>
template <typename T>
void inner_products(const T* h, const T* e, const T* e_hat, int64_t width, T* clicked, T* sampled) {
    constexpr int64_t kSize = Vec<T>::kSize;
    Vec<T> clicked_sums, sampled_sums;
    int64_t d = 0;
    for (; d + kSize <= width; d += kSize) {
        const Vec<T> state = Vec<T>::load(h + d);
        clicked_sums += state * Vec<T>::load(e + d);
        sampled_sums += state * Vec<T>::load(e_hat + d);
    }
    T x = sum(clicked_sums), y = sum(sampled_sums);
    for (; d < width; ++d) {
        x += h[d] * e[d];
        y += h[d] * e_hat[d];
    }
    *clicked = x;
    *sampled = y;
}

template <typename T>
void set_zero(T* begin, int64_t count) {
    if (count > 0) std::memset(begin, 0, count * sizeof(T));  // an empty tensor has no address
}

}  // namespace

template <Capability C, typename T>
void auxiliary_logits(const AuxiliaryLogits<T>& inputs, T* logits, int64_t begin, int64_t end) {
    const int64_t width = inputs.width, pairs = valid_pairs(inputs.steps);
    for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b * inputs.steps * width, valid = valid_pairs(inputs.lengths[b]);
        T* clicked = logits + b * 2 * pairs;
        T* sampled = clicked + pairs;
        for (int64_t p = 0; p < valid; ++p) {
            const int64_t state = row + p * width, item = state + width;
            inner_products(inputs.states + state, inputs.positives + item, inputs.negatives + item, width, clicked + p,
                           sampled + p);
        }
        set_zero(clicked + valid, pairs - valid);
        set_zero(sampled + valid, pairs - valid);
    }
}

template <Capability C, typename T>
void auxiliary_logits_backward(const AuxiliaryLogits<T>& inputs, const T* grad_logits, T* grad_states, T* grad_positives,
                               T* grad_negatives, int64_t begin, int64_t end) {
    const int64_t width = inputs.width, pairs = valid_pairs(inputs.steps);
    for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b * inputs.steps * width, valid = valid_pairs(inputs.lengths[b]);
        const T* clicked = grad_logits + b * 2 * pairs;
        const T* sampled = clicked + pairs;
        if (inputs.steps > 0) {  // nothing precedes the first item
            set_zero(grad_positives + row, width);
            set_zero(grad_negatives + row, width);
        }
        for (int64_t p = 0; p < valid; ++p) {
            const int64_t state = row + p * width, item = state + width;
            const T* h = inputs.states + state;
            const T* e = inputs.positives + item;
            const T* e_hat = inputs.negatives + item;
            T* __restrict grad_h = grad_states + state;
            T* __restrict grad_e = grad_positives + item;
            T* __restrict grad_e_hat = grad_negatives + item;
            const T x = clicked[p], y = sampled[p];
            for (int64_t d = 0; d < width; ++d) {
                grad_h[d] = x * e[d] + y * e_hat[d];
                grad_e[d] = x * h[d];
                grad_e_hat[d] = y * h[d];
            }
        }
        // States 0 .. valid - 1 and items 1 .. valid are done.
        const int64_t left = inputs.steps - valid;
        if (left == 0) continue;
        set_zero(grad_states + row + valid * width, left * width);
        set_zero(grad_positives + row + (valid + 1) * width, (left - 1) * width);
        set_zero(grad_negatives + row + (valid + 1) * width, (left - 1) * width);
    }
}

template <Capability C, typename T>
void auxiliary_loss(const T* logits, const int64_t* lengths, int64_t pairs, double* row_losses, int64_t begin, int64_t end) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (int64_t b = begin; b < end; ++b) {
        const T* clicked = logits + b * 2 * pairs;
        const T* sampled = clicked + pairs;
        const int64_t valid = valid_pairs(lengths[b]);
        double total = 0;
        for (int64_t p = 0; p < valid; p += kSize) {
            const int64_t lanes = valid - p < kSize ? valid - p : kSize;
            const Vec<T> losses = softplus(-Vec<T>::load(clicked + p, lanes)) + softplus(Vec<T>::load(sampled + p, lanes));
            for (int64_t i = 0; i < lanes; ++i) total += losses.v[i];
        }
        row_losses[b] = total;
    }
}

template <Capability C, typename T>
void auxiliary_loss_backward(const T* logits, const int64_t* lengths, int64_t pairs, T scale, T* grad_logits, int64_t begin,
                             int64_t end) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (int64_t b = begin; b < end; ++b) {
        const int64_t clicked = b * 2 * pairs, sampled = clicked + pairs, valid = valid_pairs(lengths[b]);
        for (int64_t p = 0; p < valid; p += kSize) {
            const int64_t lanes = valid - p < kSize ? valid - p : kSize;
            const Vec<T> x = Vec<T>::load(logits + clicked + p, lanes), y = Vec<T>::load(logits + sampled + p, lanes);
            (Vec<T>(-scale) * sigmoid(-x)).store(grad_logits + clicked + p, lanes);
            (Vec<T>(scale) * sigmoid(y)).store(grad_logits + sampled + p, lanes);
        }
        set_zero(grad_logits + clicked + valid, pairs - valid);
        set_zero(grad_logits + sampled + valid, pairs - valid);
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                                              \
    template void auxiliary_logits<kCapability>(const AuxiliaryLogits<T>&, T*, int64_t, int64_t);                            \
    template void auxiliary_logits_backward<kCapability>(const AuxiliaryLogits<T>&, const T*, T*, T*, T*, int64_t, int64_t); \
    template void auxiliary_loss<kCapability>(const T*, const int64_t*, int64_t, double*, int64_t, int64_t);                 \
    template void auxiliary_loss_backward<kCapability>(const T*, const int64_t*, int64_t, T, T*, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
