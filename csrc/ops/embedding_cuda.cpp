// SPDX-License-Identifier: Apache-2.0
// The embedding column between torch and the CUDA kernels: allocation, the order of launches. Nothing here waits for the device
// or reads its memory, so a call can be captured in a CUDA graph; memory is torch's. What is wrong with the values of a tensor
// is a device-side assertion, before anything of the caller's is written.
#include "cuda/embedding.h"

#include <cmath>

#include "ops/cuda_device.h"
#include "ops/embedding_arguments.h"

namespace dien_ops::ops {
namespace {

using cuda::CountType;
using cuda::EmbeddingCall;
using cuda::EmbeddingTable;

// The states of the tables, as cuda/embedding.h names them: lists with one tensor of each table, or none.
struct States {
    Tensors of_numbers[2], of_rows;
};

CountType count_type(ScalarType dtype) {
    if (dtype == ScalarType::Int) return CountType::int32;
    if (dtype == ScalarType::Long) return CountType::int64;
    return dtype == ScalarType::Float ? CountType::float32 : CountType::float64;
}

std::vector<EmbeddingTable> tables_of(const EmbeddingArguments& a, const States& states) {
    std::vector<EmbeddingTable> tables;
    tables.reserve(a.tables.size());
    for (size_t i = 0; i < a.tables.size(); ++i) {
        const TableArguments& from = a.tables[i];
        const auto data = [&](const Tensors& list) { return list.empty() ? nullptr : list[i].mutable_data_ptr(); };
        EmbeddingTable t = {};
        t.rows = from.num_embeddings, t.dim = from.dim, t.batch = from.batch();
        t.padding = from.padding;
        t.ids = from.ids.const_data_ptr();
        t.int32_ids = from.ids.scalar_type() == ScalarType::Int;
        if (from.counts.has_value()) {
            t.counts = from.counts->const_data_ptr();
            t.count_type = count_type(from.counts->scalar_type());
        }
        t.grad = from.grad.const_data_ptr();
        t.weight = from.weight.mutable_data_ptr();
        t.states[0] = data(states.of_numbers[0]), t.states[1] = data(states.of_numbers[1]);
        t.row_state = data(states.of_rows);
        t.seed = static_cast<uint64_t>(from.seed);
        t.log_decay = from.log_decay;
        tables.push_back(t);
    }
    return tables;
}

// Checks the values of all tables, then calls update(a value of the weights' type, stream, call).
template <typename Update>
void run(const EmbeddingArguments& a, const States& states, const Update& update) {
    if (a.tables.empty()) return;
    const std::vector<EmbeddingTable> tables = tables_of(a, states);
    const CudaDevice device(a.tables[0].weight);
    with_storage_type(a.dtype, "weight", [&](auto zero) {
        using S = decltype(zero);
        EmbeddingCall call = {};
        call.tables = tables.data();
        call.count = static_cast<int64_t>(tables.size());
        call.check_ids = a.check_ids;
        call.refuse_nonfinite = a.nonfinite == Nonfinite::error;
        call.skip_nonfinite = a.nonfinite == Nonfinite::skip;
        call.stochastic = a.stochastic;
        call.grad_scale = pointer<float>(a.grad_scale);
        call.found_inf = pointer<float>(a.found_inf);
        const cuda::EmbeddingSizes sizes = cuda::embedding_sizes<S>(call);
        const Tensor words = device.empty({2, sizes.words}, ScalarType::Long);
        const Tensor workspace = device.empty({sizes.sort_bytes}, ScalarType::Byte);
        const Tensor sums = device.empty({sizes.sums}, compute_dtype(a.dtype));
        const Tensor flags = device.empty({sizes.flags}, ScalarType::Int);
        call.words[0] = mutable_pointer<uint64_t>(words);
        call.words[1] = call.words[0] + sizes.words;
        call.workspace = workspace.mutable_data_ptr();
        call.workspace_bytes = sizes.sort_bytes;
        call.sums = sums.mutable_data_ptr();
        call.flags = mutable_pointer<int32_t>(flags);
        cuda::embedding_check<S>(device.stream(), call);
        update(zero, device.stream(), call);
    });
}

template <template <typename> typename Rule, typename... Numbers>
void run_rule(const EmbeddingArguments& a, const States& states, const DecayRule& decay, Numbers... numbers) {
    run(a, states, [&](auto zero, void* stream, const EmbeddingCall& call) {
        using S = decltype(zero);
        using T = Compute<S>;
        cuda::embedding_update<S>(stream, call, decay, Rule<T>{static_cast<T>(numbers)...});
    });
}

void mba_sgd_(const Tensors& weights, const Tensors& momentum_buffers, const Tensors& decayed, const Tensors& ids,
              const Tensors& grads, const Tensors& counts, const std::vector<int64_t>& padding_idx,
              const std::vector<int64_t>& seeds, const std::vector<double>& log_decays, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf, const std::string& decay, const std::string& nonfinite, bool check_ids,
              double lr, double l2, double momentum) {
    const EmbeddingArguments a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, log_decays,
                                                          grad_scale, found_inf, nonfinite, check_ids);
    const DecayRule rule = read_decay_rule(decay, lr, l2, a, decayed, log_decays);
    check_momentum_buffers(a, rule, momentum_buffers, momentum);
    run_rule<SgdRule>(a, {{momentum_buffers, {}}, decayed}, rule, lr, momentum);
}

void mba_adagrad_(const Tensors& weights, const Tensors& state_sums, const Tensors& ids, const Tensors& grads,
                  const Tensors& counts, const std::vector<int64_t>& padding_idx, const std::vector<int64_t>& seeds,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const std::string& decay,
                  const std::string& nonfinite, bool check_ids, double lr, double l2, double eps) {
    const EmbeddingArguments a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale,
                                                          found_inf, nonfinite, check_ids);
    const DecayRule rule = read_decay_rule(decay, lr, l2, a);
    a.check_state(state_sums, "state_sum", a.state_dtype());
    run_rule<AdagradRule>(a, {{state_sums, {}}, {}}, rule, lr, eps);
}

void mba_rowwise_adagrad_(const Tensors& weights, const Tensors& state_sums, const Tensors& ids, const Tensors& grads,
                          const Tensors& counts, const std::vector<int64_t>& padding_idx, const std::vector<int64_t>& seeds,
                          const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const std::string& decay,
                          const std::string& nonfinite, bool check_ids, double lr, double l2, double eps) {
    const EmbeddingArguments a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale,
                                                          found_inf, nonfinite, check_ids);
    const DecayRule rule = read_decay_rule(decay, lr, l2, a);
    a.check_state(state_sums, "state_sum", a.state_dtype(), true);
    run_rule<RowwiseAdagradRule>(a, {{{}, {}}, state_sums}, rule, lr, eps);
}

void mba_adam_(const Tensors& weights, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
               const Tensors& ids, const Tensors& grads, const Tensors& counts, const std::vector<int64_t>& padding_idx,
               const std::vector<int64_t>& seeds, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
               const std::string& decay, const std::string& nonfinite, bool check_ids, double lr, double l2, double beta1,
               double beta2, double eps) {
    const EmbeddingArguments a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale,
                                                          found_inf, nonfinite, check_ids);
    const DecayRule rule = read_decay_rule(decay, lr, l2, a);
    a.check_state(exp_avgs, "exp_avg", a.state_dtype());
    a.check_state(exp_avg_sqs, "exp_avg_sq", a.state_dtype());
    a.check_state(steps, "step", ScalarType::Long, true);
    run(a, {{exp_avgs, exp_avg_sqs}, steps}, [&](auto zero, void* stream, const EmbeddingCall& call) {
        using S = decltype(zero);
        cuda::embedding_update<S>(stream, call, rule, AdamRule{lr, beta1, beta2, eps, std::log(beta1), std::log(beta2)});
    });
}

void mba_check(const Tensors& weights, const Tensors& ids, const Tensors& grads, const Tensors& counts,
               const std::vector<int64_t>& padding_idx, const std::string& nonfinite, bool check_ids) {
    const EmbeddingArguments a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, {}, {}, std::nullopt,
                                                          std::nullopt, nonfinite, check_ids);
    run(a, {}, [](auto, void*, const EmbeddingCall&) {});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("mba_sgd_", TORCH_BOX(&mba_sgd_));
    m.impl("mba_adagrad_", TORCH_BOX(&mba_adagrad_));
    m.impl("mba_rowwise_adagrad_", TORCH_BOX(&mba_rowwise_adagrad_));
    m.impl("mba_adam_", TORCH_BOX(&mba_adam_));
    m.impl("mba_check", TORCH_BOX(&mba_check));
}

}  // namespace dien_ops::ops
