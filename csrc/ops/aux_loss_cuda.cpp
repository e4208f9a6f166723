// SPDX-License-Identifier: Apache-2.0
// The auxiliary loss between torch and the CUDA kernels: checks, allocation, the order of launches. Nothing here waits for the
// device or reads its memory, so a call can be captured in a CUDA graph.
#include <tuple>

#include "cuda/aux_loss.h"
#include "ops/aux_loss_arguments.h"
#include "ops/cuda_device.h"

namespace dien_ops::ops {
namespace {

using cuda::AuxiliaryPairs;
using cuda::AuxiliarySequences;

// A call's pairs, with their lengths on the device.
struct Pairs {
    OptionalTensor lengths;
    AuxiliaryPairs pointers;

    Pairs(const CudaDevice& device, const std::string& reduction, const OptionalTensor& given, int64_t batch, int64_t steps)
        : lengths(device.lengths(given, batch, steps)),
          pointers{batch, steps, pointer<int64_t>(lengths), denominator_of(reduction, batch, steps)} {}
};

template <typename S>
AuxiliarySequences<S> sequences(const AuxiliaryInputs& a, const Pairs& pairs) {
    return {pairs.pointers, a.width, pointer<S>(a.states), pointer<S>(a.positives), pointer<S>(a.negatives)};
}

std::tuple<Tensor, Tensor> auxiliary_inner_loss(const Tensor& states, const Tensor& positives, const Tensor& negatives,
                                                const OptionalTensor& lengths, std::string reduction) {
    const AuxiliaryInputs a(states, positives, negatives);
    const CudaDevice device(states);
    const Pairs pairs(device, reduction, lengths, a.batch, a.steps);
    const Tensor loss = device.empty({}, a.compute_dtype);
    const Tensor logits = device.empty({a.batch, 2, pairs_of(a.steps)}, a.compute_dtype);
    with_storage_type(a.dtype, "states", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        const auto p = sequences<S>(a, pairs);
        const Tensor parts = device.empty({cuda::auxiliary_inner_loss_parts(p)}, ScalarType::Double);
        cuda::auxiliary_inner_loss(device.stream(), p, mutable_pointer<double>(parts), mutable_pointer<T>(logits),
                                   mutable_pointer<T>(loss));
    });
    return {loss, logits};
}

std::tuple<Tensor, Tensor, Tensor> auxiliary_inner_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                                                 const Tensor& states, const Tensor& positives,
                                                                 const Tensor& negatives, const OptionalTensor& lengths,
                                                                 std::string reduction) {
    const AuxiliaryInputs a(states, positives, negatives);
    const Tensor grad = checked(grad_loss, "grad_loss", {}, a.compute_dtype, states.device());
    const Tensor dense_logits = checked(logits, "logits", {a.batch, 2, pairs_of(a.steps)}, a.compute_dtype, states.device());
    const CudaDevice device(states);
    const Pairs pairs(device, reduction, lengths, a.batch, a.steps);
    const Tensor grad_states = device.empty(a.sizes(), a.dtype), grad_positives = device.empty(a.sizes(), a.dtype),
                 grad_negatives = device.empty(a.sizes(), a.dtype), scale = device.empty({1}, a.compute_dtype);
    with_storage_type(a.dtype, "states", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        cuda::auxiliary_inner_loss_backward(device.stream(), sequences<S>(a, pairs), pointer<T>(grad), pointer<T>(dense_logits),
                                            mutable_pointer<T>(scale), mutable_pointer<S>(grad_states),
                                            mutable_pointer<S>(grad_positives), mutable_pointer<S>(grad_negatives));
    });
    return {grad_states, grad_positives, grad_negatives};
}

Tensor auxiliary_loss_of_logits(const Tensor& logits, const OptionalTensor& lengths, int64_t steps, std::string reduction) {
    const AuxiliaryLogits a(logits, steps);
    const CudaDevice device(logits);
    const Pairs pairs(device, reduction, lengths, a.batch, steps);
    const Tensor loss = device.empty({}, a.dtype);
    const Tensor parts = device.empty({cuda::auxiliary_loss_of_logits_parts(pairs.pointers)}, ScalarType::Double);
    with_floating_type(a.dtype, "logits", [&](auto zero) {
        using T = decltype(zero);
        cuda::auxiliary_loss_of_logits(device.stream(), pairs.pointers, pointer<T>(a.logits), mutable_pointer<double>(parts),
                                       mutable_pointer<T>(loss));
    });
    return loss;
}

Tensor auxiliary_loss_of_logits_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& lengths,
                                         int64_t steps, std::string reduction) {
    const AuxiliaryLogits a(logits, steps);
    const Tensor grad = checked(grad_loss, "grad_loss", {}, a.dtype, logits.device());
    const CudaDevice device(logits);
    const Pairs pairs(device, reduction, lengths, a.batch, steps);
    const Tensor grad_logits = device.empty(a.sizes(), a.dtype), scale = device.empty({1}, a.dtype);
    with_floating_type(a.dtype, "logits", [&](auto zero) {
        using T = decltype(zero);
        cuda::auxiliary_loss_of_logits_backward(device.stream(), pairs.pointers, pointer<T>(grad), pointer<T>(a.logits),
                                                mutable_pointer<T>(scale), mutable_pointer<T>(grad_logits));
    });
    return grad_logits;
}

Tensor checked_lengths(const Tensor& lengths, int64_t steps) {
    check(lengths.dim() == 1, "lengths must be 1-D, got ", lengths.dim(), "-D");
    return CudaDevice(lengths).lengths(lengths, lengths.size(0), steps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("auxiliary_inner_loss", TORCH_BOX(&auxiliary_inner_loss));
    m.impl("auxiliary_inner_loss_backward", TORCH_BOX(&auxiliary_inner_loss_backward));
    m.impl("auxiliary_loss_of_logits", TORCH_BOX(&auxiliary_loss_of_logits));
    m.impl("auxiliary_loss_of_logits_backward", TORCH_BOX(&auxiliary_loss_of_logits_backward));
    m.impl("checked_lengths", TORCH_BOX(&checked_lengths));
}

}  // namespace dien_ops::ops
