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
}
