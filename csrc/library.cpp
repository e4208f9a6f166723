// SPDX-License-Identifier: Apache-2.0
// Every operator of the package. Shapes: B batch, C targets, T time, I input, H hidden, A target embedding, D embedding
// dimension, N rows. Implementations: csrc/ops/<column>.cpp. Gradients, fake rules and documentation: dien_ops/<column>.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dien_ops, m) {
    // gru: one layer, one direction. gate: none | input | replace | paper | authors
    m.def(
        "gru(Tensor input, Tensor? attention, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
        "Tensor? bias_hh, Tensor? lengths, str gate, bool reset_after, bool batch_first, bool reverse, bool save_gates) "
        "-> (Tensor output, Tensor h_n, Tensor gates)");
    m.def(
        "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? attention, Tensor? hx, Tensor weight_ih, "
        "Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor output, Tensor gates, str gate, "
        "bool reset_after, bool batch_first, bool reverse) "
        "-> (Tensor grad_input, Tensor grad_attention, Tensor grad_hx, Tensor grad_weight_ih, Tensor grad_weight_hh, "
        "Tensor grad_bias_ih, Tensor grad_bias_hh)");

    // attention: softmax_t(h_t W e_a). projected: W e_a, for the backward
    m.def("bilinear_attention(Tensor states, Tensor target, Tensor weight, Tensor? lengths) -> (Tensor scores, Tensor projected)");
    m.def(
        "bilinear_attention_backward(Tensor grad_scores, Tensor states, Tensor target, Tensor weight, Tensor projected, "
        "Tensor scores, Tensor? lengths) -> (Tensor grad_states, Tensor grad_target, Tensor grad_weight)");

    // dice: with mean and var where they are given, else with those of the input; used_mean and used_var: either of them
    m.def(
        "dice(Tensor input, Tensor alpha, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? lengths, float eps) "
        "-> (Tensor output, Tensor used_mean, Tensor used_var)");
    m.def(
        "dice_backward(Tensor grad_output, Tensor input, Tensor alpha, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
        "Tensor? lengths, bool batch_statistics, float eps) "
        "-> (Tensor grad_input, Tensor grad_alpha, Tensor grad_weight, Tensor grad_bias)");
}
