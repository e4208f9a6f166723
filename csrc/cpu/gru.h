// SPDX-License-Identifier: Apache-2.0
// The recurrent column on the CPU: contracts. Design: gru_forward.cpp and gru_backward.cpp. Callers fill a struct, then run
// its phases in the order in which they are declared; each phase may be split over threads along its range.
//
// A row is one recurrence: row b * C + c is target c of sequence b. Rows are worked on in the order given by `order`, longest
// first, in tiles of `tile_rows`.
#pragma once

#include <cstdint>

#include "common/gates.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// What forward and backward share. All pointers are borrowed for the duration of the call.
template <typename T>
struct GruProblem {
    int64_t batch, targets, steps, input_size, hidden_size;  // B, C, T, I, H
    Gate gate;
    bool reset_after, reverse;

    const T* input;  // [B, T, I] with the strides below; the last axis is contiguous
    int64_t input_stride_b, input_stride_t;
    const T* attention;  // [B, C, T] with the strides below; null where gate is none
    int64_t attention_stride_b, attention_stride_c, attention_stride_t;
    const T* hx;         // [B, C, H] or null (zeros)
    const T* weight_ih;  // [3H, I], gates r, z, n
    const T* weight_hh;  // [3H, H]
    const T* bias_ih;    // [3H] or null
    const T* bias_hh;    // [3H] or null

    const int64_t* lengths;  // [B], each in 0..T
    const int64_t* order;    // [B * C], rows by falling length
    int64_t tile_rows;       // rows per tile of a sweep

    int64_t output_stride_b, output_stride_c, output_stride_t;  // of output and grad_output; the last axis is contiguous

    int64_t rows() const { return batch * targets; }
    int64_t tiles() const { return (rows() + tile_rows - 1) / tile_rows; }
    int64_t length(int64_t row) const { return lengths[row / targets]; }
    // The time index of a row's s-th step.
    int64_t time(int64_t row, int64_t s) const { return reverse ? length(row) - 1 - s : s; }
    int64_t output_offset(int64_t row, int64_t t) const {
        return row / targets * output_stride_b + row % targets * output_stride_c + t * output_stride_t;
    }
    T score(int64_t row, int64_t t) const {
        if (attention == nullptr) return T(0);
        return attention[row / targets * attention_stride_b + row % targets * attention_stride_c + t * attention_stride_t];
    }
    // What the backward needs of a step: r, z, n and, where the reset comes after the product, U_n h + b_hn.
    int64_t gates_size() const { return (reset_after ? 4 : 3) * hidden_size; }
};

template <typename T>
struct GruForward : GruProblem<T> {
    T* packed;     // gru_forward_packed_size elements, written by gru_forward_pack
    T* projected;  // [B, T, 3H]: W_ih x, written by gru_project_input; padding is left as it is
    T* output;     // [B, C, T, H] with the output strides; 0 behind a row's length
    T* h_n;        // [B, C, H]
    T* gates;      // [B, C, T, gates_size] or null; 0 behind a row's length
};

template <Capability kTarget, typename T>
int64_t gru_forward_packed_size(int64_t input_size, int64_t hidden_size);
template <Capability kTarget, typename T>
void gru_forward_pack(const GruForward<T>& p);
template <Capability kTarget, typename T>
void gru_project_input(const GruForward<T>& p, int64_t batch_begin, int64_t batch_end);
template <Capability kTarget, typename T>
void gru_forward_sweep(const GruForward<T>& p, int64_t tile_begin, int64_t tile_end);

template <typename T>
struct GruBackward : GruProblem<T> {
    const T* output;       // [B, C, T, H], the forward's
    const T* gates;        // [B, C, T, gates_size], the forward's
    const T* grad_output;  // [B, C, T, H] with the output strides, or null (zeros)
    const T* grad_h_n;     // [B, C, H] or null (zeros)

    T* packed;           // gru_backward_packed_size elements, written by gru_backward_pack
    const T* projected;  // [B, T, 3H]: W_ih x, needed where gate is input, else null
    T* grad_gates;       // [B, C, T, gates_size]: gradients of the pre-activations of r, z, n and of U_n h + b_hn
    T* grad_projected;   // [B, T, 3H]: gradient of W_ih x; may be null where C = 1 and gate is not input: then it is grad_gates

    T* grad_input;      // [B, T, I] with the input strides; 0 behind a row's length
    T* grad_attention;  // [B, C, T] with the attention strides, or null; 0 behind a row's length
    T* grad_hx;         // [B, C, H]
    T* grad_weight_ih;  // [3H, I], zeroed by the caller
    T* grad_weight_hh;  // [3H, H], zeroed by the caller
    T* grad_bias_ih;    // [3H], zeroed by the caller
    T* grad_bias_hh;    // [3H], zeroed by the caller
};

template <Capability kTarget, typename T>
int64_t gru_backward_packed_size(int64_t input_size, int64_t hidden_size);
template <Capability kTarget, typename T>
void gru_backward_pack(const GruBackward<T>& p);
// grad_gates, grad_attention, grad_hx
template <Capability kTarget, typename T>
void gru_backward_sweep(const GruBackward<T>& p, int64_t tile_begin, int64_t tile_end);
// grad_projected (where it is not null) and grad_input
template <Capability kTarget, typename T>
void gru_backward_input(const GruBackward<T>& p, int64_t batch_begin, int64_t batch_end);
// Rows [begin, end) of 0..3H of the weights' and biases' gradients: sums over batch, targets and time in a fixed order.
template <Capability kTarget, typename T>
void gru_backward_weights(const GruBackward<T>& p, int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
