// SPDX-License-Identifier: Apache-2.0
// The embedding column between torch and the CPU kernels: the order of checks and writes, threads. All checks come before the
// first write: an update that throws has changed nothing.
#include <algorithm>
#include <cmath>
#include <optional>

#include "ops/mini_batch.h"

namespace dien_ops::ops {
namespace {

void check_on_cpu(const EmbeddingArguments& a) { check(a.device.is_cpu(), "weights must be on the CPU"); }

std::vector<Table> read_tables(const EmbeddingArguments& a, const Tensors& decayed = {}) {
    std::vector<Table> tables;
    tables.reserve(a.tables.size());
    for (size_t i = 0; i < a.tables.size(); ++i) {
        tables.emplace_back(a.tables[i], decayed.empty() ? nullptr : pointer<double>(decayed[i]));
    }
    return tables;
}

// Which tables are left as they are for their gradient. Throws where that is an error.
template <typename S>
std::vector<bool> skipped_tables(const std::vector<Table>& tables, Nonfinite nonfinite) {
    std::vector<bool> skipped(tables.size(), false);
    if (nonfinite == Nonfinite::propagate) return skipped;
    for (size_t t = 0; t < tables.size(); ++t) {
        const int64_t position = first_nonfinite<S>(tables[t]);
        skipped[t] = position >= 0;
        if (nonfinite == Nonfinite::skip || !skipped[t]) continue;
        const TableArguments& table = tables[t].arguments;
        const S* const row = pointer<S>(table.grad) + position * table.dim;
        cpu::with_capability([&](auto target) {
            int64_t d = 0;
            while (cpu::all_finite<target()>(row + d, 1)) ++d;
            Compute<S> value[cpu::padded(1)];
            constexpr int64_t kFirst = 0;
            cpu::sum_rows<target()>(row + d, &kFirst, 1, 1, 1, value);  // as a float, whatever it is stored as
            check(false, table.name, "grad must be finite, got ", value[0], " at position ", position, " (id ",
                  tables[t].id(position), "), column ", d);
        });
    }
    return skipped;
}

// make_rule(zero, i) is the rule for table i, where zero is of the type that is computed in.
template <typename MakeRule>
void update_tables(const EmbeddingArguments& a, const DecayRule& decay, const Tensors& decayed, MakeRule&& make_rule) {
    if (a.tables.empty()) return;
    check_on_cpu(a);
    with_storage_type(a.dtype, "weight", [&](auto stored) {
        using S = decltype(stored);
        using T = Compute<S>;
        const std::vector<Table> tables = read_tables(a, decayed);
        const Numbering numbering(a.tables);
        const MiniBatch<T> batch = group_by_id<T>(tables, numbering, make_keys(tables, numbering, a.check_ids), decay);
        if (a.found_inf.has_value() && *pointer<float>(a.found_inf) != 0) return;  // the caller knows what the gradients hold
        const std::vector<bool> skipped = skipped_tables<S>(tables, a.nonfinite);

        for (size_t i = 0; i < tables.size(); ++i) {
            if (skipped[i]) continue;
            const TableArguments& table = a.tables[i];
            const int64_t first = batch.first[i], last = batch.first[i + 1];
            const auto place = [&](int64_t s) { return std::lower_bound(batch.long_ones.begin(), batch.long_ones.end(), s); };
            const LongSums<S> long_sums(batch, {place(first), place(last)}, pointer<S>(table.grad), table.dim);
            cpu::TableUpdate<S> update{};
            update.segments = batch.segments.data();
            update.positions = batch.positions.data();
            update.grads = pointer<S>(table.grad);
            update.grad_scale = a.grad_scale.has_value() ? *pointer<float>(a.grad_scale) : 1;
            update.summed = long_sums.segments.data();
            update.sums = long_sums.sums.data();
            update.num_summed = long_sums.segments.size();
            update.weight = mutable_pointer<S>(table.weight);
            update.dim = table.dim;
            update.decayed = decayed.empty() ? nullptr : mutable_pointer<double>(decayed[i]);
            update.log_decay = table.log_decay;
            update.stochastic = a.stochastic;
            update.seed = table.seed;

            const auto rule = make_rule(T{}, i);
            // Threads share the gradient rows evenly, not the segments: a popular id's segment is as much work as many others.
            const int64_t begin = batch.segments[first].first, end = batch.segments[last].first;
            const auto segment_at = [&](int64_t position) {
                const auto before = [&](const cpu::Segment<T>& segment) { return segment.first < begin + position; };
                return std::partition_point(batch.segments.data() + first, batch.segments.data() + last, before) -
                       batch.segments.data();
            };
            const int64_t rows_per_thread = 1 + (1 << 14) / std::max<int64_t>(table.dim, 1);
            cpu::with_capability([&](auto target) {
                const auto update_range = [&](int64_t from, int64_t to) {
                    cpu::update_rows<target()>(update, rule, segment_at(from), segment_at(to));
                };
                parallel_ranges(end - begin, update_range, rows_per_thread);
            });
        }
    });
}

void mba_sgd_(const Tensors& weights, const Tensors& momentum_buffers, const Tensors& decayed, const Tensors& ids,
              const Tensors& grads, const Tensors& counts, const std::vector<int64_t>& padding_idx,
              const std::vector<int64_t>& seeds, const std::vector<double>& log_decays, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf, const std::string& decay, const std::string& nonfinite, bool check_ids,
              double lr, double l2, double momentum) {
    const auto a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, log_decays, grad_scale, found_inf,
                                            nonfinite, check_ids);
    const DecayRule decay_rule = read_decay_rule(decay, lr, l2, a, decayed, log_decays);
    check_momentum_buffers(a, decay_rule, momentum_buffers, momentum);
    update_tables(a, decay_rule, decayed, [&](auto zero, size_t i) {
        using T = decltype(zero);
        return cpu::Sgd<T>{{T(lr), T(momentum)}, momentum_buffers.empty() ? nullptr : mutable_pointer<T>(momentum_buffers[i])};
    });
}

void mba_adagrad_(const Tensors& weights, const Tensors& state_sums, const Tensors& ids, const Tensors& grads,
                  const Tensors& counts, const std::vector<int64_t>& padding_idx, const std::vector<int64_t>& seeds,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const std::string& decay,
                  const std::string& nonfinite, bool check_ids, double lr, double l2, double eps) {
    const auto a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale, found_inf,
                                            nonfinite, check_ids);
    a.check_state(state_sums, "state_sum", a.state_dtype());
    update_tables(a, read_decay_rule(decay, lr, l2, a), {}, [&](auto zero, size_t i) {
        using T = decltype(zero);
        return cpu::Adagrad<T>{{T(lr), T(eps)}, mutable_pointer<T>(state_sums[i])};
    });
}

void mba_rowwise_adagrad_(const Tensors& weights, const Tensors& state_sums, const Tensors& ids, const Tensors& grads,
                          const Tensors& counts, const std::vector<int64_t>& padding_idx, const std::vector<int64_t>& seeds,
                          const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const std::string& decay,
                          const std::string& nonfinite, bool check_ids, double lr, double l2, double eps) {
    const auto a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale, found_inf,
                                            nonfinite, check_ids);
    a.check_state(state_sums, "state_sum", a.state_dtype(), true);
    update_tables(a, read_decay_rule(decay, lr, l2, a), {}, [&](auto zero, size_t i) {
        using T = decltype(zero);
        return cpu::RowwiseAdagrad<T>{{T(lr), T(eps)}, mutable_pointer<T>(state_sums[i])};
    });
}

void mba_adam_(const Tensors& weights, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
               const Tensors& ids, const Tensors& grads, const Tensors& counts, const std::vector<int64_t>& padding_idx,
               const std::vector<int64_t>& seeds, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
               const std::string& decay, const std::string& nonfinite, bool check_ids, double lr, double l2, double beta1,
               double beta2, double eps) {
    const auto a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, seeds, {}, grad_scale, found_inf,
                                            nonfinite, check_ids);
    a.check_state(exp_avgs, "exp_avg", a.state_dtype());
    a.check_state(exp_avg_sqs, "exp_avg_sq", a.state_dtype());
    a.check_state(steps, "step", ScalarType::Long, true);
    update_tables(a, read_decay_rule(decay, lr, l2, a), {}, [&](auto zero, size_t i) {
        using T = decltype(zero);
        return cpu::Adam<T>{{lr, beta1, beta2, eps, std::log(beta1), std::log(beta2)},
                            mutable_pointer<T>(exp_avgs[i]),
                            mutable_pointer<T>(exp_avg_sqs[i]),
                            mutable_pointer<int64_t>(steps[i])};
    });
}

// The checks of the updates alone, all but those of the rule's own tensors: for a caller who updates several groups of tables,
// or creates their state, and wants all or nothing.
void mba_check(const Tensors& weights, const Tensors& ids, const Tensors& grads, const Tensors& counts,
               const std::vector<int64_t>& padding_idx, const std::string& nonfinite, bool check_ids) {
    const auto a = read_embedding_arguments(weights, ids, grads, counts, padding_idx, {}, {}, std::nullopt, std::nullopt,
                                            nonfinite, check_ids);
    if (a.tables.empty()) return;
    check_on_cpu(a);
    const std::vector<Table> tables = read_tables(a);
    const Numbering numbering(a.tables);
    make_keys(tables, numbering, a.check_ids);
    check_counts(tables, numbering);
    with_storage_type(a.dtype, "weight", [&](auto stored) { skipped_tables<decltype(stored)>(tables, a.nonfinite); });
}

void advise_table(const Tensor& table) {
    check(table.is_contiguous(), "table must be contiguous");
    advise_huge_pages(table.mutable_data_ptr(), table.numel() * table.element_size());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("mba_sgd_", TORCH_BOX(&mba_sgd_));
    m.impl("mba_adagrad_", TORCH_BOX(&mba_adagrad_));
    m.impl("mba_rowwise_adagrad_", TORCH_BOX(&mba_rowwise_adagrad_));
    m.impl("mba_adam_", TORCH_BOX(&mba_adam_));
    m.impl("mba_check", TORCH_BOX(&mba_check));
    m.impl("advise_huge_pages", TORCH_BOX(&advise_table));
}

}  // namespace dien_ops::ops
