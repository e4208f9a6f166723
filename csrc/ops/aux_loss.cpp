// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss between torch and the kernels: checks, allocation, threads.
#include "cpu/aux_loss.h"

#include <tuple>
#include <vector>

#include "ops/aux_loss_arguments.h"

namespace dien_ops::ops {
namespace {

// Calls rows(begin, end) on ranges of the batch; a thread's share is at least so many numbers read.
template <typename F>
void for_rows(int64_t batch, int64_t numbers_per_row, const F& rows) {
    constexpr int64_t kNumbersPerThread = 1 << 15;
    parallel_ranges(batch, rows, 1 + kNumbersPerThread / std::max<int64_t>(numbers_per_row, 1));
}

// How many numbers read take as long as a pair's loss.
constexpr int64_t kNumbersPerPair = 16;

// What the rows' losses are added to and divided by.
struct Reduction {
    std::vector<int64_t> lengths;
    std::vector<double> row_losses;
    double denominator;

    Reduction(const std::string& name, const OptionalTensor& lengths_, int64_t batch, int64_t steps)
        : lengths(read_lengths(lengths_, batch, steps)), row_losses(batch), denominator(denominator_of(name, batch, steps)) {
        if (denominator > 0) return;
        int64_t valid = 0;
        for (const int64_t length : lengths) valid += pairs_of(length);
        denominator = static_cast<double>(std::max<int64_t>(valid, 1));
    }
    double loss() const {
        double total = 0;
        for (const double row_loss : row_losses) total += row_loss;
        return total / denominator;
    }
};

// The inner products' inputs as the kernels take them: what is stored in 16 bits is computed in float32, and converted before
// and after.
struct Inputs : AuxiliaryInputs {
    explicit Inputs(const AuxiliaryInputs& inputs) : AuxiliaryInputs(inputs) {
        for (Tensor* tensor : {&states, &positives, &negatives}) *tensor = converted(*tensor, compute_dtype);
    }
    template <typename T>
    cpu::AuxiliarySequences<T> sequences(const Reduction& reduction) const {
        return {pointer<T>(states), pointer<T>(positives), pointer<T>(negatives), reduction.lengths.data(), steps, width};
    }
    int64_t numbers_per_row() const { return steps * (3 * width + kNumbersPerPair); }
};

std::tuple<Tensor, Tensor> auxiliary_inner_loss(const Tensor& states, const Tensor& positives, const Tensor& negatives,
                                                const OptionalTensor& lengths, std::string reduction_name) {
    const Inputs inputs(AuxiliaryInputs(states, positives, negatives));
    Reduction reduction(reduction_name, lengths, inputs.batch, inputs.steps);
    const Tensor loss = empty({}, inputs.compute_dtype);
    const Tensor logits = empty({inputs.batch, 2, pairs_of(inputs.steps)}, inputs.compute_dtype);
    with_floating_type(inputs.compute_dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        const auto sequences = inputs.sequences<T>(reduction);
        cpu::with_capability([&](auto capability) {
            for_rows(inputs.batch, inputs.numbers_per_row(), [&](int64_t begin, int64_t end) {
                cpu::auxiliary_inner_loss<capability()>(sequences, mutable_pointer<T>(logits), reduction.row_losses.data(),
                                                        begin, end);
            });
        });
        *mutable_pointer<T>(loss) = T(reduction.loss());
    });
    return {loss, logits};
}

std::tuple<Tensor, Tensor, Tensor> auxiliary_inner_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                                                 const Tensor& states, const Tensor& positives,
                                                                 const Tensor& negatives, const OptionalTensor& lengths,
                                                                 std::string reduction_name) {
    const Inputs inputs(AuxiliaryInputs(states, positives, negatives));
    const Reduction reduction(reduction_name, lengths, inputs.batch, inputs.steps);
    const ScalarType dtype = inputs.compute_dtype;
    const Tensor grad = checked(grad_loss, "grad_loss", {}, dtype);
    const Tensor dense_logits = checked(logits, "logits", {inputs.batch, 2, pairs_of(inputs.steps)}, dtype);
    const Tensor grad_states = empty(inputs.sizes(), dtype), grad_positives = empty(inputs.sizes(), dtype),
                 grad_negatives = empty(inputs.sizes(), dtype);
    with_floating_type(dtype, "states", [&](auto zero) {
        using T = decltype(zero);
        const auto sequences = inputs.sequences<T>(reduction);
        const T scale = T(*pointer<T>(grad) / reduction.denominator);
        cpu::with_capability([&](auto capability) {
            for_rows(inputs.batch, inputs.numbers_per_row(), [&](int64_t begin, int64_t end) {
                cpu::auxiliary_inner_loss_backward<capability()>(
                    sequences, pointer<T>(dense_logits), scale, mutable_pointer<T>(grad_states),
                    mutable_pointer<T>(grad_positives), mutable_pointer<T>(grad_negatives), begin, end);
            });
        });
    });
    return {converted(grad_states, inputs.dtype), converted(grad_positives, inputs.dtype),
            converted(grad_negatives, inputs.dtype)};
}

Tensor auxiliary_loss_of_logits(const Tensor& logits, const OptionalTensor& lengths, int64_t steps,
                                std::string reduction_name) {
    const AuxiliaryLogits a(logits, steps);
    Reduction reduction(reduction_name, lengths, a.batch, steps);
    const Tensor loss = empty({}, a.dtype);
    with_floating_type(a.dtype, "logits", [&](auto zero) {
        using T = decltype(zero);
        cpu::with_capability([&](auto capability) {
            for_rows(a.batch, a.pairs * kNumbersPerPair, [&](int64_t begin, int64_t end) {
                cpu::auxiliary_loss_of_logits<capability()>(pointer<T>(a.logits), reduction.lengths.data(), a.pairs,
                                                            reduction.row_losses.data(), begin, end);
            });
        });
        *mutable_pointer<T>(loss) = T(reduction.loss());
    });
    return loss;
}

Tensor auxiliary_loss_of_logits_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& lengths,
                                         int64_t steps, std::string reduction_name) {
    const AuxiliaryLogits a(logits, steps);
    const Reduction reduction(reduction_name, lengths, a.batch, steps);
    const Tensor grad = checked(grad_loss, "grad_loss", {}, a.dtype), grad_logits = empty(a.sizes(), a.dtype);
    with_floating_type(a.dtype, "logits", [&](auto zero) {
        using T = decltype(zero);
        const T scale = T(*pointer<T>(grad) / reduction.denominator);
        cpu::with_capability([&](auto capability) {
            for_rows(a.batch, a.pairs * kNumbersPerPair, [&](int64_t begin, int64_t end) {
                cpu::auxiliary_loss_of_logits_backward<capability()>(pointer<T>(a.logits), reduction.lengths.data(), a.pairs,
                                                                     scale, mutable_pointer<T>(grad_logits), begin, end);
            });
        });
    });
    return grad_logits;
}

// For a caller who does something of his own with lengths before the loss sees them. The result is what he must go on with:
// a graph that was compiled drops a check that nothing depends on.
Tensor checked_lengths(const Tensor& lengths, int64_t steps) {
    check(lengths.dim() == 1, "lengths must be 1-D, got ", lengths.dim(), "-D");
    const std::vector<int64_t> values = read_lengths(lengths, lengths.size(0), steps);
    const Tensor result = empty({lengths.size(0)}, ScalarType::Long);
    std::copy(values.begin(), values.end(), mutable_pointer<int64_t>(result));
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("auxiliary_inner_loss", TORCH_BOX(&auxiliary_inner_loss));
    m.impl("auxiliary_inner_loss_backward", TORCH_BOX(&auxiliary_inner_loss_backward));
    m.impl("auxiliary_loss_of_logits", TORCH_BOX(&auxiliary_loss_of_logits));
    m.impl("auxiliary_loss_of_logits_backward", TORCH_BOX(&auxiliary_loss_of_logits_backward));
    m.impl("checked_lengths", TORCH_BOX(&checked_lengths));
}

}  // namespace dien_ops::ops
