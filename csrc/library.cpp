// SPDX-License-Identifier: Apache-2.0
// Every operator of the package. Shapes: B batch, C targets, T time, I input, H hidden, A target embedding, D embedding
// dimension, N rows. Implementations: csrc/ops/<column>.cpp. Gradients, fake rules and documentation: dien_ops/<column>.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dien_ops, m) {
    // gru: one layer, one direction. gate: none | input | replace | paper | authors. gates: what the backward needs of each
    // valid step, where save_gates asks for it, in an order of its own; what is left of it holds anything. allow_tf32: products
    // of float32 may round their operands to tf32, where the device has such products
    m.def(
        "gru(Tensor input, Tensor? attention, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
        "Tensor? bias_hh, Tensor? lengths, str gate, bool reset_after, bool batch_first, bool reverse, bool allow_tf32, "
        "bool save_gates) -> (Tensor output, Tensor h_n, Tensor gates)");
    m.def(
        "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? attention, Tensor? hx, Tensor weight_ih, "
        "Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor output, Tensor gates, str gate, "
        "bool reset_after, bool batch_first, bool reverse, bool allow_tf32) "
        "-> (Tensor grad_input, Tensor grad_attention, Tensor grad_hx, Tensor grad_weight_ih, Tensor grad_weight_hh, "
        "Tensor grad_bias_ih, Tensor grad_bias_hh)");
    // On CUDA only: how the kernels run with such sizes on the device of `like`, and in its dtype. For the forward and for the
    // backward: the share of the recurrent weights that stays on the chip for all steps, and whether the state does.
    m.def(
        "gru_residence(Tensor like, int hidden_size, bool reset_after, bool allow_tf32) "
        "-> (float forward_weights, bool forward_state, float backward_weights, bool backward_state)");

    // attention: softmax_t(h_t W e_a). projected: W e_a, for the backward; weight and projected are float32 where states are
    // 16-bit. states may lie [T, B, H] in memory, and then so does their gradient
    m.def(
        "bilinear_attention(Tensor states, Tensor target, Tensor weight, Tensor? lengths, bool allow_tf32) "
        "-> (Tensor scores, Tensor projected)");
    m.def(
        "bilinear_attention_backward(Tensor grad_scores, Tensor states, Tensor target, Tensor weight, Tensor projected, "
        "Tensor scores, Tensor? lengths, bool allow_tf32) -> (Tensor grad_states, Tensor grad_target, Tensor grad_weight)");

    // activation_unit: DIN's network over [q, k, q - k, q * k]. activation: sigmoid | prelu | dice. weights: one of each layer,
    // the output layer last; alphas: one of each hidden layer, none for the sigmoid. running_means and running_vars: one of
    // each hidden layer, or none for Dice with the batch's statistics. statistics [2, sum of hidden sizes]: the means and
    // variances used. hidden: what the backward needs with batch statistics
    m.def(
        "local_activation_unit(Tensor query, Tensor keys, Tensor[] weights, Tensor[] biases, Tensor[] alphas, "
        "Tensor[] running_means, Tensor[] running_vars, Tensor? lengths, str activation, float eps, float variance_eps, "
        "bool softmax, bool allow_tf32) "
        "-> (Tensor pooled, Tensor scores, Tensor statistics, Tensor hidden)");
    m.def(
        "local_activation_unit_backward(Tensor? grad_pooled, Tensor? grad_scores, Tensor query, Tensor keys, Tensor[] weights, "
        "Tensor[] biases, Tensor[] alphas, Tensor statistics, Tensor hidden, Tensor scores, Tensor? lengths, str activation, "
        "bool batch_statistics, float eps, float variance_eps, bool softmax, bool allow_tf32) "
        "-> (Tensor grad_query, Tensor grad_keys, Tensor[] grad_weights, Tensor[] grad_biases, Tensor[] grad_alphas)");

    // dice: with mean and var where they are given, else with those of the input; used_mean and used_var: either of them.
    // Parameters and statistics are of the dtype that is computed in: float32 for 16-bit input
    m.def(
        "dice(Tensor input, Tensor alpha, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? lengths, float eps, "
        "float variance_eps) "
        "-> (Tensor output, Tensor used_mean, Tensor used_var)");
    m.def(
        "dice_backward(Tensor grad_output, Tensor input, Tensor alpha, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
        "Tensor? lengths, bool batch_statistics, float eps, float variance_eps) "
        "-> (Tensor grad_input, Tensor grad_alpha, Tensor grad_weight, Tensor grad_bias)");

    // embedding: one update of several tables, by the mini-batch of each: rows ids [N] of the table, each once, by the sum of
    // its gradient rows grads [N, D]. Every list has one entry of each table; counts, seeds, momentum_buffers, decayed and
    // log_decays may be empty. State is float32 where weights are 16-bit. padding_idx: -1 for none. seeds: 16-bit weights are
    // rounded stochastically. decay: mini_batch_aware | decoupled | lazy, which alone takes decayed and log_decays. nonfinite:
    // propagate | skip | error. grad_scale [1] divides the gradients; nothing changes where found_inf [1] is not 0
    m.def(
        "mba_sgd_(Tensor(a!)[] weights, Tensor(b!)[] momentum_buffers, Tensor(c!)[] decayed, Tensor[] ids, Tensor[] grads, "
        "Tensor[] counts, int[] padding_idx, SymInt[] seeds, float[] log_decays, Tensor? grad_scale, Tensor? found_inf, "
        "str decay, str nonfinite, bool check_ids, float lr, float l2, float momentum) -> ()");
    m.def(
        "mba_adagrad_(Tensor(a!)[] weights, Tensor(b!)[] state_sums, Tensor[] ids, Tensor[] grads, Tensor[] counts, "
        "int[] padding_idx, SymInt[] seeds, Tensor? grad_scale, Tensor? found_inf, str decay, str nonfinite, bool check_ids, "
        "float lr, float l2, float eps) -> ()");
    m.def(
        "mba_rowwise_adagrad_(Tensor(a!)[] weights, Tensor(b!)[] state_sums, Tensor[] ids, Tensor[] grads, Tensor[] counts, "
        "int[] padding_idx, SymInt[] seeds, Tensor? grad_scale, Tensor? found_inf, str decay, str nonfinite, bool check_ids, "
        "float lr, float l2, float eps) -> ()");
    m.def(
        "mba_adam_(Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor[] ids, "
        "Tensor[] grads, Tensor[] counts, int[] padding_idx, SymInt[] seeds, Tensor? grad_scale, Tensor? found_inf, str decay, "
        "str nonfinite, bool check_ids, float lr, float l2, float beta1, float beta2, float eps) -> ()");
    m.def(
        "mba_check(Tensor[] weights, Tensor[] ids, Tensor[] grads, Tensor[] counts, int[] padding_idx, str nonfinite, "
        "bool check_ids) -> ()");
    // Asks the system for large pages where the CPU memory of a table has none yet
    m.def("advise_huge_pages(Tensor(a!) table) -> ()");

    // aux_loss: over pairs of a state and the next step's items. reduction: paper | mean | authors. logits [B, 2, max(T - 1,
    // 0)] of the clicked and the sampled items; inner: they are the inner products, kept for the backward
    m.def(
        "auxiliary_inner_loss(Tensor states, Tensor positives, Tensor negatives, Tensor? lengths, str reduction) "
        "-> (Tensor loss, Tensor logits)");
    m.def(
        "auxiliary_inner_loss_backward(Tensor grad_loss, Tensor logits, Tensor states, Tensor positives, Tensor negatives, "
        "Tensor? lengths, str reduction) -> (Tensor grad_states, Tensor grad_positives, Tensor grad_negatives)");
    m.def("auxiliary_loss_of_logits(Tensor logits, Tensor? lengths, SymInt steps, str reduction) -> Tensor");
    m.def(
        "auxiliary_loss_of_logits_backward(Tensor grad_loss, Tensor logits, Tensor? lengths, SymInt steps, str reduction) "
        "-> Tensor");
    m.def("checked_lengths(Tensor lengths, SymInt steps) -> Tensor");  // an int64 copy
}
