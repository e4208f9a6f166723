// SPDX-License-Identifier: Apache-2.0
// L_aux = -(1/N) sum_i sum_t [ log sigma(h_t, e_{t+1}) + log(1 - sigma(h_t, e^_{t+1})) ] (DIEN eq. 6)
//
// With x the logit of the item that was clicked and y that of the sampled one, a pair's loss is softplus(-x) + softplus(y):
// no sigmoid is formed, so none can saturate and log(0) cannot occur. Its derivatives are -sigma(-x) and sigma(y).
//
// Rows of the batch are independent and a thread takes a range of them. Time is spent on the states and the items: the two
// inner products of a pair share one pass over the state, and padding is not read. A row's logits are still in the first cache
// when its loss is made of them, a vector of pairs at a time; the backward makes their gradients likewise, into memory of its
// own, and goes through states and items once more. A row's losses are added in double, in the order of time, and the caller
// adds the rows: the result does not depend on the number of threads.

#include "cpu/aux_loss.h"

#include "common/softplus.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace dien_ops::cpu {
namespace {

int64_t valid_pairs(int64_t length) { return length > 1 ? length - 1 : 0; }

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <typename T>
Vec<T> softplus(Vec<T> x) {
    const Vec<T> minus_magnitude = where_positive(x, -x, x);
    return where_positive(x, x, Vec<T>()) + log1p_of_fraction<T>(exp(minus_magnitude));
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

// Of the valid pairs' logits x and y.
template <typename T>
double loss_of(const T* clicked, const T* sampled, int64_t valid) {
    constexpr int64_t kSize = Vec<T>::kSize;
    double total = 0;
    for (int64_t p = 0; p < valid; p += kSize) {
        const int64_t lanes = valid - p < kSize ? valid - p : kSize;
        const Vec<T> losses = softplus(-Vec<T>::load(clicked + p, lanes)) + softplus(Vec<T>::load(sampled + p, lanes));
        for (int64_t i = 0; i < lanes; ++i) total += losses.v[i];
    }
    return total;
}

// scale times the derivatives of loss_of.
template <typename T>
void gradient_of(const T* clicked, const T* sampled, int64_t valid, T scale, T* grad_clicked, T* grad_sampled) {
    constexpr int64_t kSize = Vec<T>::kSize;
    for (int64_t p = 0; p < valid; p += kSize) {
        const int64_t lanes = valid - p < kSize ? valid - p : kSize;
        (Vec<T>(-scale) * sigmoid(-Vec<T>::load(clicked + p, lanes))).store(grad_clicked + p, lanes);
        (Vec<T>(scale) * sigmoid(Vec<T>::load(sampled + p, lanes))).store(grad_sampled + p, lanes);
    }
}

}  // namespace

template <Capability C, typename T>
void auxiliary_inner_loss(const AuxiliarySequences<T>& inputs, T* logits, double* row_losses, int64_t begin, int64_t end) {
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
        row_losses[b] = loss_of(clicked, sampled, valid);
        fill_zeros(clicked + valid, pairs - valid);
        fill_zeros(sampled + valid, pairs - valid);
    }
}

template <Capability C, typename T>
void auxiliary_inner_loss_backward(const AuxiliarySequences<T>& inputs, const T* logits, T scale, T* grad_states,
                                   T* grad_positives, T* grad_negatives, int64_t begin, int64_t end) {
    const int64_t width = inputs.width, pairs = valid_pairs(inputs.steps);
    const Scratch<T> grad_clicked(pairs), grad_sampled(pairs);
    for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b * inputs.steps * width, valid = valid_pairs(inputs.lengths[b]);
        const T* clicked = logits + b * 2 * pairs;
        gradient_of<T>(clicked, clicked + pairs, valid, scale, grad_clicked, grad_sampled);
        if (inputs.steps > 0) {  // nothing precedes the first item
            fill_zeros(grad_positives + row, width);
            fill_zeros(grad_negatives + row, width);
        }
        for (int64_t p = 0; p < valid; ++p) {
            const int64_t state = row + p * width, item = state + width;
            const T* h = inputs.states + state;
            const T* e = inputs.positives + item;
            const T* e_hat = inputs.negatives + item;
            T* __restrict grad_h = grad_states + state;
            T* __restrict grad_e = grad_positives + item;
            T* __restrict grad_e_hat = grad_negatives + item;
            const T x = grad_clicked[p], y = grad_sampled[p];
            for (int64_t d = 0; d < width; ++d) {
                grad_h[d] = x * e[d] + y * e_hat[d];
                grad_e[d] = x * h[d];
                grad_e_hat[d] = y * h[d];
            }
        }
        // States 0 .. valid - 1 and items 1 .. valid are done.
        const int64_t left = inputs.steps - valid;
        if (left == 0) continue;
        fill_zeros(grad_states + row + valid * width, left * width);
        fill_zeros(grad_positives + row + (valid + 1) * width, (left - 1) * width);
        fill_zeros(grad_negatives + row + (valid + 1) * width, (left - 1) * width);
    }
}

template <Capability C, typename T>
void auxiliary_loss_of_logits(const T* logits, const int64_t* lengths, int64_t pairs, double* row_losses, int64_t begin,
                              int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        const T* clicked = logits + b * 2 * pairs;
        row_losses[b] = loss_of(clicked, clicked + pairs, valid_pairs(lengths[b]));
    }
}

template <Capability C, typename T>
void auxiliary_loss_of_logits_backward(const T* logits, const int64_t* lengths, int64_t pairs, T scale, T* grad_logits,
                                       int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
        const int64_t clicked = b * 2 * pairs, sampled = clicked + pairs, valid = valid_pairs(lengths[b]);
        gradient_of(logits + clicked, logits + sampled, valid, scale, grad_logits + clicked, grad_logits + sampled);
        fill_zeros(grad_logits + clicked + valid, pairs - valid);
        fill_zeros(grad_logits + sampled + valid, pairs - valid);
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                                              \
    template void auxiliary_inner_loss<kCapability>(const AuxiliarySequences<T>&, T*, double*, int64_t, int64_t);            \
    template void auxiliary_inner_loss_backward<kCapability>(const AuxiliarySequences<T>&, const T*, T, T*, T*, T*, int64_t, \
                                                             int64_t);                                                       \
    template void auxiliary_loss_of_logits<kCapability>(const T*, const int64_t*, int64_t, double*, int64_t, int64_t);       \
    template void auxiliary_loss_of_logits_backward<kCapability>(const T*, const int64_t*, int64_t, T, T*, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
