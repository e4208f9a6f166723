// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss as operators: the inner-product logits, and the loss of any scorer's logits.

#include "cpu/aux_loss.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/tensor.h"

namespace dien_ops::ops {
namespace {

// A thread's share is at least this many numbers read.
constexpr int64_t kNumbersPerThread = 1 << 15;

int64_t rows_per_thread(int64_t numbers_per_row) { return 1 + kNumbersPerThread / std::max<int64_t>(numbers_per_row, 1); }

int64_t pairs_of(int64_t steps) { return std::max<int64_t>(steps - 1, 0); }

// The inputs of the logits, checked and contiguous.
struct Sequences {
    Tensor states, positives, negatives;  // [B, T, H]
    std::vector<int64_t> lengths;
    int64_t batch, steps, width;
    ScalarType dtype;

    Sequences(const Tensor& states_, const Tensor& positives_, const Tensor& negatives_, const OptionalTensor& lengths_) {
        check(states_.dim() == 3, "states must be 3-D, got ", states_.dim(), "-D");
        const std::vector<int64_t> sizes = sizes_of(states_);
        batch = sizes[0], steps = sizes[1], width = sizes[2];
        dtype = states_.scalar_type();
        states = checked(states_, "states", sizes, dtype);
        positives = checked(positives_, "positives", sizes, dtype);
        negatives = checked(negatives_, "negatives", sizes, dtype);
        lengths = read_lengths(lengths_, batch, steps);
    }

    template <typename T>
    cpu::AuxiliaryLogits<T> inputs() const {
        return {pointer<T>(states), pointer<T>(positives), pointer<T>(negatives), lengths.data(), steps, width};
    }

    int64_t grain() const { return rows_per_thread(3 * steps * width); }
};

// For a caller who does something of his own with lengths before the loss sees them. The result is what he must go on with:
// a graph that was compiled drops a check that nothing depends on.
Tensor checked_lengths(const Tensor& lengths, int64_t steps) {
    check(lengths.dim() == 1, "lengths must be 1-D, got ", lengths.dim(), "-D");
    check(lengths.is_cpu(), "lengths must be on the CPU as the other arguments are");
    const std::vector<int64_t> values = read_lengths(lengths, lengths.size(0), steps);
    Tensor result = empty({lengths.size(0)}, ScalarType::Long);
    std::copy(values.begin(), values.end(), mutable_pointer<int64_t>(result));
    return result;
}

Tensor auxiliary_logits(const Tensor& states, const Tensor& positives, const Tensor& negatives, const OptionalTensor& lengths) {
    const Sequences sequences(states, positives, negatives, lengths);
    Tensor logits = empty({sequences.batch, 2, pairs_of(sequences.steps)}, sequences.dtype);
    with_floating_type(sequences.dtype, "states", [&](auto type) {
        using T = decltype(type);
        const auto inputs = sequences.inputs<T>();
        T* out = mutable_pointer<T>(logits);
        cpu::with_capability([&](auto capability) {
            const auto rows = [&](int64_t begin, int64_t end) { cpu::auxiliary_logits<capability()>(inputs, out, begin, end); };
            parallel_ranges(sequences.batch, rows, sequences.grain());
        });
    });
    return logits;
}

std::tuple<Tensor, Tensor, Tensor> auxiliary_logits_backward(const Tensor& grad_logits, const Tensor& states,
                                                             const Tensor& positives, const Tensor& negatives,
                                                             const OptionalTensor& lengths) {
    const Sequences sequences(states, positives, negatives, lengths);
    const std::vector<int64_t> sizes = sizes_of(states);
    const Tensor grad = checked(grad_logits, "grad_logits", {sequences.batch, 2, pairs_of(sequences.steps)}, sequences.dtype);
    Tensor grad_states = empty(sizes, sequences.dtype), grad_positives = empty(sizes, sequences.dtype),
           grad_negatives = empty(sizes, sequences.dtype);
    with_floating_type(sequences.dtype, "states", [&](auto type) {
        using T = decltype(type);
        const auto inputs = sequences.inputs<T>();
        T* out_states = mutable_pointer<T>(grad_states);
        T* out_positives = mutable_pointer<T>(grad_positives);
        T* out_negatives = mutable_pointer<T>(grad_negatives);
        cpu::with_capability([&](auto capability) {
            const auto rows = [&](int64_t begin, int64_t end) {
                cpu::auxiliary_logits_backward<capability()>(inputs, pointer<T>(grad), out_states, out_positives, out_negatives,
                                                             begin, end);
            };
            parallel_ranges(sequences.batch, rows, sequences.grain());
        });
    });
    return {grad_states, grad_positives, grad_negatives};
}

// The inputs of the loss, checked and contiguous.
struct Pairs {
    Tensor logits;  // [B, 2, P]
    std::vector<int64_t> lengths;
    int64_t batch, pairs;
    ScalarType dtype;

    Pairs(const Tensor& logits_, const OptionalTensor& lengths_, int64_t steps) {
        check(logits_.dim() == 3, "logits must be 3-D, got ", logits_.dim(), "-D");
        batch = logits_.size(0), pairs = pairs_of(steps);
        dtype = logits_.scalar_type();
        logits = checked(logits_, "logits", {batch, 2, pairs}, dtype);
        lengths = read_lengths(lengths_, batch, steps);
    }

    // What the sum over all valid pairs is divided by.
    double denominator(const std::string& reduction) const {
        if (reduction == "paper") return static_cast<double>(std::max<int64_t>(batch, 1));
        if (reduction == "authors") return static_cast<double>(std::max<int64_t>(batch * pairs, 1));
        check(reduction == "mean", "reduction must be one of paper, mean, authors, got ", reduction);
        int64_t valid = 0;
        for (const int64_t length : lengths) valid += pairs_of(length);
        return static_cast<double>(std::max<int64_t>(valid, 1));
    }

    int64_t grain() const { return rows_per_thread(16 * pairs); }  // a logit costs as much as many numbers read
};

Tensor auxiliary_loss(const Tensor& logits, const OptionalTensor& lengths, int64_t steps, std::string reduction) {
    const Pairs pairs(logits, lengths, steps);
    const double denominator = pairs.denominator(reduction);
    Tensor loss = empty({}, pairs.dtype);
    with_floating_type(pairs.dtype, "logits", [&](auto type) {
        using T = decltype(type);
        std::vector<double> row_losses(pairs.batch);
        cpu::with_capability([&](auto capability) {
            const auto rows = [&](int64_t begin, int64_t end) {
                cpu::auxiliary_loss<capability()>(pointer<T>(pairs.logits), pairs.lengths.data(), pairs.pairs,
                                                  row_losses.data(), begin, end);
            };
            parallel_ranges(pairs.batch, rows, pairs.grain());
        });
        double total = 0;
        for (const double row_loss : row_losses) total += row_loss;
        *mutable_pointer<T>(loss) = T(total / denominator);
    });
    return loss;
}

Tensor auxiliary_loss_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& lengths, int64_t steps,
                               std::string reduction) {
    const Pairs pairs(logits, lengths, steps);
    const double denominator = pairs.denominator(reduction);
    const Tensor grad = checked(grad_loss, "grad_loss", {}, pairs.dtype);
    Tensor grad_logits = empty({pairs.batch, 2, pairs.pairs}, pairs.dtype);
    with_floating_type(pairs.dtype, "logits", [&](auto type) {
        using T = decltype(type);
        const T scale = T(*pointer<T>(grad) / denominator);
        T* out = mutable_pointer<T>(grad_logits);
        cpu::with_capability([&](auto capability) {
            const auto rows = [&](int64_t begin, int64_t end) {
                cpu::auxiliary_loss_backward<capability()>(pointer<T>(pairs.logits), pairs.lengths.data(), pairs.pairs, scale,
                                                           out, begin, end);
            };
            parallel_ranges(pairs.batch, rows, pairs.grain());
        });
    });
    return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("checked_lengths", TORCH_BOX(&checked_lengths));
    m.impl("auxiliary_logits", TORCH_BOX(&auxiliary_logits));
    m.impl("auxiliary_logits_backward", TORCH_BOX(&auxiliary_logits_backward));
    m.impl("auxiliary_loss", TORCH_BOX(&auxiliary_loss));
    m.impl("auxiliary_loss_backward", TORCH_BOX(&auxiliary_loss_backward));
}

}  // namespace dien_ops::ops
