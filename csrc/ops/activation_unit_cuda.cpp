// SPDX-License-Identifier: Apache-2.0
// The local activation unit between torch and the CUDA kernels: checks, allocation, the order of launches. Nothing here waits
// for the device or reads its memory, so a call can be captured in a CUDA graph; memory is torch's.
#include <tuple>

#include "cuda/activation_unit.h"
#include "ops/activation_unit_arguments.h"
#include "ops/cuda_device.h"

namespace dien_ops::ops {
namespace {

using cuda::UnitBackward;
using cuda::UnitForward;
using cuda::UnitProblem;

template <typename T>
std::vector<const T*> pointers(const Tensors& tensors) {
    std::vector<const T*> result;
    for (const Tensor& t : tensors) result.push_back(pointer<T>(t));
    return result;
}

template <typename T>
std::vector<T*> mutable_pointers(const Tensors& tensors) {
    std::vector<T*> result;
    for (const Tensor& t : tensors) result.push_back(mutable_pointer<T>(t));
    return result;
}

template <typename S>
UnitProblem<S> problem(const UnitArguments& a, const NumberedSteps& steps, bool allow_tf32) {
    using T = Compute<S>;
    check(a.hidden_layers() <= cuda::kMostUnitLayers, "weights must have at most ", cuda::kMostUnitLayers + 1,
          " tensors on CUDA, got ", a.weights.size());
    UnitProblem<S> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.embedding_dim = a.D;
    p.sizes = a.sizes;
    p.activation = a.activation, p.batch_statistics = a.batch_statistics, p.softmax = a.softmax;
    p.tf32 = allow_tf32;
    p.eps = a.eps;
    p.numbers = steps.pointers();
    p.query = pointer<S>(a.query), p.keys = pointer<S>(a.keys);
    p.weights = pointers<T>(a.weights), p.biases = pointers<T>(a.biases), p.alphas = pointers<T>(a.alphas);
    return p;
}

// The memory of a call that forward and backward both need.
template <typename S>
struct Workspace {
    Tensor packed, columns, bytes;

    Workspace(const CudaDevice& device, const UnitArguments& a, UnitProblem<S>& p, int64_t workspace)
        : packed(device.empty({cuda::unit_packed_size(p)}, a.dtype)),
          columns(device.empty({cuda::unit_columns_size(p)}, a.compute_dtype())),
          bytes(device.empty({workspace}, ScalarType::Byte)) {
        p.packed = mutable_pointer<S>(packed), p.columns = mutable_pointer<Compute<S>>(columns);
        p.workspace = mutable_pointer<unsigned char>(bytes);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> local_activation_unit(const Tensor& query, const Tensor& keys,
                                                                 const Tensors& weights, const Tensors& biases,
                                                                 const Tensors& alphas, const Tensors& running_means,
                                                                 const Tensors& running_vars, const OptionalTensor& lengths,
                                                                 const std::string& activation, double eps, double variance_eps,
                                                                 bool softmax, bool allow_tf32) {
    const UnitArguments a = read_unit_arguments(query, keys, weights, biases, alphas, activation, running_means.empty(), eps,
                                                variance_eps, softmax);
    const auto [means, vars] = read_running_statistics(a, running_means, running_vars);
    const CudaDevice device(keys);
    const NumberedSteps steps(device, lengths, a.B, a.T);
    const Tensor pooled = device.empty(a.pooled_sizes(), a.dtype), scores = device.empty(a.score_sizes(), a.dtype);
    const Tensor statistics = device.empty(a.statistics_sizes(), a.compute_dtype());
    const Tensor hidden = device.empty(a.hidden_sizes(), a.compute_dtype());
    with_storage_type(a.dtype, "keys", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        UnitForward<S> p{problem<S>(a, steps, allow_tf32)};
        const Workspace<S> workspace(device, a, p, cuda::unit_forward_workspace(p));
        const Tensor logits = device.empty(a.score_sizes(), a.compute_dtype());
        const Tensor moments = device.empty({cuda::unit_moments_size(p)}, ScalarType::Double);
        p.means = pointers<T>(means), p.vars = pointers<T>(vars);
        p.logits = mutable_pointer<T>(logits), p.moments = mutable_pointer<double>(moments);
        p.scores = mutable_pointer<S>(scores), p.pooled = mutable_pointer<S>(pooled);
        p.statistics = mutable_pointer<T>(statistics), p.hidden = mutable_pointer<T>(hidden);
        cuda::unit_forward(device.stream(), p);
    });
    return {pooled, scores, statistics, hidden};
}

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors> local_activation_unit_backward(
    const OptionalTensor& grad_pooled, const OptionalTensor& grad_scores, const Tensor& query, const Tensor& keys,
    const Tensors& weights, const Tensors& biases, const Tensors& alphas, const Tensor& statistics, const Tensor& hidden,
    const Tensor& scores, const OptionalTensor& lengths, const std::string& activation, bool batch_statistics, double eps,
    double variance_eps, bool softmax, bool allow_tf32) {
    const UnitArguments a =
        read_unit_arguments(query, keys, weights, biases, alphas, activation, batch_statistics, eps, variance_eps, softmax);
    const UnitBackwardArguments given(a, grad_pooled, grad_scores, statistics, hidden, scores);
    const CudaDevice device(keys);
    const NumberedSteps steps(device, lengths, a.B, a.T);
    const auto empty = [&](const std::vector<int64_t>& sizes, ScalarType dtype) { return device.empty(sizes, dtype); };
    const UnitGradients grads(a, empty);
    with_storage_type(a.dtype, "keys", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        UnitBackward<S> p{problem<S>(a, steps, allow_tf32)};
        const Workspace<S> workspace(device, a, p, cuda::unit_backward_workspace(p));
        const Tensor grad_logits = empty(a.score_sizes(), a.compute_dtype());
        const Tensor hidden_gradient = empty(a.hidden_sizes(), a.compute_dtype());
        const Tensor partial = empty({cuda::unit_backward_partial(p)}, a.compute_dtype());
        p.statistics = pointer<T>(given.statistics), p.hidden = pointer<T>(given.hidden);
        p.scores = pointer<S>(given.scores);
        p.grad_pooled = pointer<S>(given.grad_pooled), p.grad_scores = pointer<S>(given.grad_scores);
        p.grad_logits = mutable_pointer<T>(grad_logits), p.hidden_gradient = mutable_pointer<T>(hidden_gradient);
        p.partial = mutable_pointer<T>(partial);
        p.grad_query = mutable_pointer<S>(grads.query), p.grad_keys = mutable_pointer<S>(grads.keys);
        p.grad_weights = mutable_pointers<T>(grads.weights), p.grad_biases = mutable_pointers<T>(grads.biases);
        p.grad_alphas = mutable_pointers<T>(grads.alphas);
        cuda::unit_backward(device.stream(), p);
    });
    return grads.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("local_activation_unit", TORCH_BOX(&local_activation_unit));
    m.impl("local_activation_unit_backward", TORCH_BOX(&local_activation_unit_backward));
}

}  // namespace dien_ops::ops
