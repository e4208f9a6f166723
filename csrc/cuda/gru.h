// SPDX-License-Identifier: Apache-2.0
// The recurrent column on CUDA: contracts. Every function queues work on a stream and returns; nothing waits for the device, so
// all of it can be captured in a graph. Pointers are device memory, borrowed until the work is done; tensors may begin at any
// number, what is written and what is passed from function to function at multiples of 16 bytes, as torch allocates. Sizes and
// pointers come from the layer above; what a launch needs of the device is asked for here.
//
//   gru_projection         W x of every valid step                                              gru_products.cu
//   gru_forward            all steps of a tile of rows, the state never leaving the block       gru_forward.cu
//   gru_backward           the same in reverse: gradients of the gates, attention and hx        gru_backward.cu
//   gru_target_sums        sums the gates' gradients over the targets of a sequence
//   gru_input_gradient     times W: the gradient of the input
//   gru_weight_gradients   gradients of weights and biases, summed in an order fixed by sizes and lengths
//   gru_clear_padding      zeros behind a row's length
//
// Three numberings. A *row* is one recurrence: b * C + c is target c of sequence b. A *step* is a sequence's valid step, by its
// number (lengths.h); what depends on the input alone is kept by step. An *entry* is a row's valid step:
// C * first[b] + c * lengths[b] + t; the gates and their gradients are kept by entry, so that padding neither takes memory nor
// time. (For one target, entries are steps.)
//
// S is what tensors are stored in, Compute<S> what is computed in (common/number.h).
#pragma once

#include <cstdint>

#include "common/gates.h"
#include "common/number.h"
#include "cuda/lengths.h"

namespace dien_ops::cuda {

// Where a [.., T, ..] tensor's rows lie. The last axis is contiguous.
struct Strides {
    int64_t b, c, t;
};

// Which steps are valid, and in what order sequences are taken.
struct GruPlan : StepNumbers {
    const int64_t* order;  // [B], sequences by falling length; null where lengths are: 0..B-1
};

template <typename S>
struct GruProblem {
    int64_t batch, targets, steps, input_size, hidden_size;  // B, C, T, I, H
    Gate gate;
    bool reset_after, reverse;
    bool tf32;  // float products may round their operands to tf32
    GruPlan plan;

    const S* input;  // [B, T, I]
    Strides input_strides;
    const S* attention;  // [B, C, T]; null where gate is none
    Strides attention_strides;
    const S* hx;             // [B, C, H] or null (zeros)
    const S* weight_ih;      // [3H, I], gates r, z, n
    const S* weight_hh;      // [3H, H]
    const S* bias_ih;        // [3H] or null
    const S* bias_hh;        // [3H] or null
    const S* output;         // [B, C, T, H]: the forward's result, read by the backward
    Strides output_strides;  // of output and grad_output

    int64_t rows() const { return batch * targets; }
    // r, z, n and, where the reset comes after the product, U_n h + b_hn.
    int64_t gates_size() const { return (reset_after ? 4 : 3) * hidden_size; }
};

// Numbers per step of the projection: each gate padded to whole tiles.
int64_t gru_projection_width(int64_t hidden_size);
// Numbers of the buffer in which a weight is packed for a product, at most.
template <typename S>
int64_t gru_packed_size(const GruProblem<S>& p);

template <typename S>
void gru_projection(Stream stream, const GruProblem<S>& p, S* packed,  // gru_packed_size
                    Compute<S>* projected);                            // [E, gru_projection_width]

// What of a sweep's memory is on chip: the share of the recurrent weights that stays in shared memory for all steps (the rest
// is read again in every step), and whether the state does too.
struct GruResidence {
    double weights;
    bool state;
};
template <typename S>
GruResidence gru_forward_residence(int64_t hidden_size, bool reset_after, bool tf32);
template <typename S>
GruResidence gru_backward_residence(int64_t hidden_size, bool tf32);

// Bytes of global memory that a sweep wants where its state does not fit on the chip, else 0.
template <typename S>
int64_t gru_forward_workspace(const GruProblem<S>& p);
template <typename S>
int64_t gru_backward_workspace(const GruProblem<S>& p);

template <typename S>
struct GruForward : GruProblem<S> {
    const Compute<S>* projected;  // from gru_projection
    S* packed;                    // gru_packed_size
    unsigned char* workspace;     // gru_forward_workspace
    S* states;                    // [B, C, T, H] with output_strides; written where valid
    S* h_n;                       // [B, C, H]
    S* gates;                     // [entries, gates_size] or null
};
template <typename S>
void gru_forward(Stream stream, const GruForward<S>& p);

template <typename S>
struct GruBackward : GruProblem<S> {
    const S* gates;               // [entries, gates_size], the forward's
    const S* grad_output;         // [B, C, T, H] with output_strides, or null (zeros)
    const S* grad_h_n;            // [B, C, H] or null (zeros)
    const Compute<S>* projected;  // from gru_projection: needed where gate is input
    S* packed;                    // gru_packed_size
    unsigned char* workspace;     // gru_backward_workspace

    S* grad_gates;      // [entries, gates_size]: of r, z, n before their activation and, where the reset comes after the
                        // product, of U_n h + b_hn
    S* grad_attention;  // [B, C, T] with attention_strides; null where gate is none; written where valid
    S* grad_hx;         // [B, C, H]
};
template <typename S>
void gru_backward(Stream stream, const GruBackward<S>& p);

// [E, 3H]: the gradient of W x, for several targets, or where attention scales it.
template <typename S>
void gru_target_sums(Stream stream, const GruProblem<S>& p, const S* grad_gates, S* sums);

// of_projection: gru_target_sums' result, or null: then the r, z, n of grad_gates are.
template <typename S>
void gru_input_gradient(Stream stream, const GruProblem<S>& p, const S* grad_gates, const S* of_projection, S* packed,
                        S* grad_input);  // [B, T, I] with input_strides; written where valid

template <typename S>
struct GruWeightGradients {
    const S* gates;
    const S* grad_gates;
    const S* of_projection;  // as for gru_input_gradient
    Compute<S>* partial;     // gru_weight_gradients_partial numbers
    S* grad_weight_ih;       // [3H, I]
    S* grad_weight_hh;       // [3H, H]
    S* grad_bias_ih;         // [3H]
    S* grad_bias_hh;         // [3H]
};
template <typename S>
int64_t gru_weight_gradients_partial(const GruProblem<S>& p);
template <typename S>
void gru_weight_gradients(Stream stream, const GruProblem<S>& p, const GruWeightGradients<S>& g);

// tensor [B, C, T, width] gets zeros behind each sequence's length; does nothing where the plan is null.
template <typename S>
void gru_clear_padding(Stream stream, const GruPlan& plan, int64_t batch, int64_t targets, int64_t steps, S* tensor,
                       const Strides& strides, int64_t width);

}  // namespace dien_ops::cuda
