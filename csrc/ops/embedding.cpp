// SPDX-License-Identifier: Apache-2.0
// The sparse updates with mini-batch aware L2 as operators. All checks come before the first write: an update that throws
// has changed nothing.

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/mini_batch.h"

namespace dien_ops::ops {
namespace {

// The arguments that every rule shares.
struct Arguments {
    const Tensor& weight;          // [num_embeddings, D]
    const Tensor& ids;             // [N]
    const Tensor& grad;            // [N, D], one row per id
    const OptionalTensor& counts;  // [num_embeddings]
    std::optional<int64_t> padding_idx;
    double l2;
};

// The bytes from the first to the last element of t, whatever its strides.
struct Bytes {
    const char *begin, *end;

    explicit Bytes(const Tensor& t) : begin(static_cast<const char*>(t.const_data_ptr())), end(begin) {
        if (t.numel() == 0) return;
        int64_t elements = 1;
        for (int64_t i = 0; i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
        end += elements * t.element_size();
    }
};

// Rows of the gradient are still read when rows of t are already written.
void check_apart(const Tensor& grad, const Tensor& t, const char* argument) {
    const Bytes read(grad), written(t);
    check(read.end <= written.begin || written.end <= read.begin, "grad must not share memory with ", argument);
}

// A tensor that is written in place cannot be copied into another layout first.
template <typename T>
T* state_pointer(const Tensor& t, const char* argument, const std::vector<int64_t>& expected, ScalarType dtype,
                 const Tensor& grad) {
    check_sizes(t, argument, expected);
    check(t.is_cpu(), argument, " must be on the CPU as the other arguments are");
    check(t.scalar_type() == dtype, argument, " has the wrong dtype");
    check(t.is_contiguous(), argument, " must be contiguous: it is updated in place");
    check_apart(grad, t, argument);
    return mutable_pointer<T>(t);
}

void check_ranks(const Tensor& weight, const Tensor& ids) {
    check(weight.dim() == 2, "weight must be 2-D, got ", weight.dim(), "-D");
    check(ids.dim() == 1, "ids must be 1-D, got ", ids.dim(), "-D");
}

// make_rule(T, dtype) checks the rule's own tensors and gives the rule for weights of type T.
template <typename MakeRule>
void update_table(const Arguments& arguments, MakeRule&& make_rule) {
    const Tensor &weight = arguments.weight, &ids = arguments.ids;
    check_ranks(weight, ids);
    const int64_t num_embeddings = weight.size(0), dim = weight.size(1), n = ids.size(0);
    const ScalarType dtype = weight.scalar_type();
    with_floating_type(dtype, "weight", [&](auto type) {
        using T = decltype(type);
        cpu::TableUpdate<T> update;
        update.weight = state_pointer<T>(weight, "weight", {num_embeddings, dim}, dtype, arguments.grad);
        update.dim = dim;
        const auto rule = make_rule(type, dtype);
        const Tensor dense_grad = checked(arguments.grad, "grad", {n, dim}, dtype);
        const MiniBatch<T> batch = group_by_id(ids, pointer<T>(dense_grad), num_embeddings, dim,
                                               Counts(arguments.counts, num_embeddings), arguments.l2, arguments.padding_idx);
        update.segments = batch.segments.data();
        update.gradient_rows = batch.gradient_rows.data();

        // Threads share the gradient rows evenly, not the segments: a popular id's segment is as much work as many others.
        const auto segment_at = [&](int64_t gradient_row) {
            return std::lower_bound(batch.segments.begin(), batch.segments.end(), gradient_row,
                                    [](const auto& segment, int64_t row) { return segment.first < row; }) -
                   batch.segments.begin();
        };
        const int64_t rows_per_thread = 1 + (1 << 14) / std::max<int64_t>(dim, 1);
        cpu::with_capability([&](auto capability) {
            const auto update_range = [&](int64_t begin, int64_t end) {
                cpu::update_rows<capability()>(update, rule, segment_at(begin), segment_at(end));
            };
            parallel_ranges(static_cast<int64_t>(batch.gradient_rows.size()), update_range, rows_per_thread);
        });
    });
}

void mba_sgd_(const Tensor& weight, const OptionalTensor& momentum_buffer, const Tensor& ids, const Tensor& grad,
              const OptionalTensor& counts, std::optional<int64_t> padding_idx, double lr, double l2, double momentum) {
    check(momentum == 0 || momentum_buffer.has_value(),
          "momentum_buffer must be given where momentum is not 0, got momentum=", momentum);
    update_table({weight, ids, grad, counts, padding_idx, l2}, [&](auto type, ScalarType dtype) {
        using T = decltype(type);
        T* buffer = momentum_buffer.has_value()
                        ? state_pointer<T>(*momentum_buffer, "momentum_buffer", sizes_of(weight), dtype, grad)
                        : nullptr;
        return cpu::Sgd<T>{buffer, T(lr), T(momentum)};
    });
}

void mba_adagrad_(const Tensor& weight, const Tensor& state_sum, const Tensor& ids, const Tensor& grad,
                  const OptionalTensor& counts, std::optional<int64_t> padding_idx, double lr, double l2, double eps) {
    update_table({weight, ids, grad, counts, padding_idx, l2}, [&](auto type, ScalarType dtype) {
        using T = decltype(type);
        return cpu::Adagrad<T>{state_pointer<T>(state_sum, "state_sum", sizes_of(weight), dtype, grad), T(lr), T(eps)};
    });
}

void mba_rowwise_adagrad_(const Tensor& weight, const Tensor& state_sum, const Tensor& ids, const Tensor& grad,
                          const OptionalTensor& counts, std::optional<int64_t> padding_idx, double lr, double l2, double eps) {
    update_table({weight, ids, grad, counts, padding_idx, l2}, [&](auto type, ScalarType dtype) {
        using T = decltype(type);
        return cpu::RowwiseAdagrad<T>{state_pointer<T>(state_sum, "state_sum", {weight.size(0)}, dtype, grad), T(lr), T(eps)};
    });
}

void mba_adam_(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step, const Tensor& ids,
               const Tensor& grad, const OptionalTensor& counts, std::optional<int64_t> padding_idx, double lr, double l2,
               double beta1, double beta2, double eps) {
    update_table({weight, ids, grad, counts, padding_idx, l2}, [&](auto type, ScalarType dtype) {
        using T = decltype(type);
        return cpu::Adam<T>{state_pointer<T>(exp_avg, "exp_avg", sizes_of(weight), dtype, grad),
                            state_pointer<T>(exp_avg_sq, "exp_avg_sq", sizes_of(weight), dtype, grad),
                            state_pointer<int64_t>(step, "step", {weight.size(0)}, ScalarType::Long, grad),
                            lr,
                            beta1,
                            beta2,
                            eps,
                            std::log(beta1),
                            std::log(beta2)};
    });
}

// The checks of the updates alone, all but those of the rule's own tensors: for a caller who updates several tables, or
// creates their state, and wants all or nothing.
void mba_check(const Tensor& weight, const Tensor& ids, const Tensor& grad, const OptionalTensor& counts,
               std::optional<int64_t> padding_idx) {
    check_ranks(weight, ids);
    check_sizes(grad, "grad", {ids.size(0), weight.size(1)});
    check(grad.scalar_type() == weight.scalar_type(), "grad must have the dtype of the other arguments");
    check(weight.is_cpu() && grad.is_cpu(), "weight and grad must be on the CPU");
    check_apart(grad, weight, "weight");
    const int64_t num_embeddings = weight.size(0);
    const Counts n(counts, num_embeddings);
    for_each_id(ids, num_embeddings, padding_idx, [&](int64_t, int64_t id) { n.check_positive(id); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("mba_sgd_", TORCH_BOX(&mba_sgd_));
    m.impl("mba_adagrad_", TORCH_BOX(&mba_adagrad_));
    m.impl("mba_rowwise_adagrad_", TORCH_BOX(&mba_rowwise_adagrad_));
    m.impl("mba_adam_", TORCH_BOX(&mba_adam_));
    m.impl("mba_check", TORCH_BOX(&mba_check));
}

}  // namespace dien_ops::ops
