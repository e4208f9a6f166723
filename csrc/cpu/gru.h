// SPDX-License-Identifier: Apache-2.0
// The recurrent column on the CPU: contracts. Design: gru_forward.cpp and gru_backward.cpp. Callers fill a struct, then run
// its phases in the order in which they are declared; each phase may be split over threads along its range.
//
// A row is one recurrence: row b * C + c is target c of sequence b. Rows are worked on in the order given by `order`, longest
// first, a sequence's targets together, in tiles of `tile_rows`.
//
// S is what tensors are stored in, Compute<S> what is computed in (common/number.h).
#pragma once

#include <cstdint>

#include "common/gates.h"
#include "common/number.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// What forward and backward share. All pointers are borrowed for the duration of the call.
template <typename S>
struct GruProblem {
    int64_t batch, targets, steps, input_size, hidden_size;  // B, C, T, I, H
    Gate gate;
    bool reset_after, reverse;

    const S* input;  // [B, T, I] with the strides below; the last axis is contiguous
    int64_t input_stride_b, input_stride_t;
    const S* attention;  // [B, C, T] with the strides below; null where gate is none
    int64_t attention_stride_b, attention_stride_c, attention_stride_t;
    const S* hx;         // [B, C, H] or null (zeros)
    const S* weight_ih;  // [3H, I], gates r, z, n
    const S* weight_hh;  // [3H, H]
    const S* bias_ih;    // [3H] or null
    const S* bias_hh;    // [3H] or null

    const int64_t* lengths;  // [B], each in 0..T
    const int64_t* order;    // [B * C], rows by falling length
    const int64_t* entry;    // [B * C], the valid steps of all rows that come before a row in `order`: where its gates begin
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
    int64_t attention_offset(int64_t row, int64_t t) const {
        return row / targets * attention_stride_b + row % targets * attention_stride_c + t * attention_stride_t;
    }
    // What the backward needs of a step: r, z, n and, where the reset comes after the product, U_n h + b_hn.
    int64_t gates_size() const { return (reset_after ? 4 : 3) * hidden_size; }
};

// W x for all steps of a sequence at once.
template <typename S>
struct GruProjection {
    bool panels;            // as the forward sweep's panels have it, or else, for the backward, the gates r, z, n side by side
    Compute<S>* packed;     // gru_projection_packed_size elements, written by gru_projection_pack
    Compute<S>* projected;  // [B, T, gru_projection_width], written by gru_projection; padding is left as it is
};

template <Capability kTarget, typename S>
int64_t gru_projection_width(const GruProblem<S>& p, bool panels);
template <Capability kTarget, typename S>
int64_t gru_projection_packed_size(const GruProblem<S>& p, bool panels);
template <Capability kTarget, typename S>
void gru_projection_pack(const GruProblem<S>& p, const GruProjection<S>& projection);
template <Capability kTarget, typename S>
void gru_projection(const GruProblem<S>& p, const GruProjection<S>& projection, int64_t batch_begin, int64_t batch_end);

template <typename S>
struct GruForward : GruProblem<S> {
    const Compute<S>* projected;  // from gru_projection, as panels, or null: each step computes its W x
    Compute<S>* packed;           // gru_forward_packed_size elements, written by gru_forward_pack
    S* output;                    // [B, C, T, H] with the output strides; 0 behind a row's length
    S* h_n;                       // [B, C, H]
    S* gates;                     // [B * C * T, gates_size] or null; see `entry`; behind the last valid step left as it is
};

// The number of rows that the forward sweep takes together; tile_rows is best a multiple of it.
template <Capability kTarget, typename S>
int64_t gru_forward_block_rows();
// What is packed depends on whether `projected` is there: set it first.
template <Capability kTarget, typename S>
int64_t gru_forward_packed_size(const GruForward<S>& p);
template <Capability kTarget, typename S>
void gru_forward_pack(const GruForward<S>& p);
template <Capability kTarget, typename S>
void gru_forward_sweep(const GruForward<S>& p, int64_t tile_begin, int64_t tile_end);

// The sweep is split into groups of tiles of about the same number of steps, which accumulate the sums over rows and time
// apart. They depend on the problem alone, and so does the order of every sum.
template <typename S>
struct GruBackward : GruProblem<S> {
    using T = Compute<S>;

    const S* output;       // [B, C, T, H], the forward's
    const S* gates;        // [B * C * T, gates_size], the forward's
    const S* grad_output;  // [B, C, T, H] with the output strides, or null (zeros)
    const S* grad_h_n;     // [B, C, H] or null (zeros)

    int64_t groups;
    const int64_t*
        group_begin;     // [groups + 1], positions in `order`: where each group's rows begin, whole tiles; the last ends
    T* packed;           // gru_backward_packed_size elements, written by gru_backward_pack
    T* sums;             // [groups, gru_backward_sums_size], set by the sweep; for several targets the input phase adds to W's
    const T* projected;  // [B, T, 3H], from gru_projection: needed where C != 1 and gate is input, else null
    T* grad_projected;   // [B + groups, T, 3H]: parts of the gradient of W x; needed where C != 1, else null

    S* grad_input;      // [B, T, I] with the input strides; 0 behind a row's length
    S* grad_attention;  // [B, C, T] with the attention strides, or null; 0 behind a row's length
    S* grad_hx;         // [B, C, H]
    S* grad_weight_ih;  // [3H, I]
    S* grad_weight_hh;  // [3H, H]
    S* grad_bias_ih;    // [3H]
    S* grad_bias_hh;    // [3H]
};

template <Capability kTarget, typename S>
int64_t gru_backward_packed_size(const GruBackward<S>& p);
template <Capability kTarget, typename S>
int64_t gru_backward_sums_size(const GruBackward<S>& p);
template <Capability kTarget, typename S>
void gru_backward_pack(const GruBackward<S>& p);
// grad_attention, grad_hx; for one target per sequence also grad_input
template <Capability kTarget, typename S>
void gru_backward_sweep(const GruBackward<S>& p, int64_t group_begin, int64_t group_end);
// grad_input of several targets
template <Capability kTarget, typename S>
void gru_backward_input(const GruBackward<S>& p, int64_t group_begin, int64_t group_end);
// The gradients of weights and biases, from columns [begin, end) of 0..I+H of the sums
template <Capability kTarget, typename S>
void gru_backward_weights(const GruBackward<S>& p, int64_t begin, int64_t end);

}  // namespace dien_ops::cpu
