// SPDX-License-Identifier: Apache-2.0
// The recurrent column between torch and the CUDA kernels: checks, allocation, the order of launches. Nothing here waits for
// the device or reads its memory, so a call can be captured in a CUDA graph; memory is torch's.
#include <array>
#include <tuple>

#include "cuda/gru.h"
#include "ops/cuda_device.h"
#include "ops/gru_arguments.h"

namespace dien_ops::ops {
namespace {

using cuda::GruBackward;
using cuda::GruForward;
using cuda::GruPlan;
using cuda::GruProblem;
using cuda::GruWeightGradients;

// Where the values are, sorted stably to fall.
Tensor falling_order(const Tensor& values) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack = {from(values), from(std::optional<bool>(true)), from(int64_t{0}), from(true)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the sorted values: takes them over, and lets them go
    return torch::stable::detail::to<Tensor>(stack[1]);
}

// Owns what a GruPlan borrows.
struct Plan {
    NumberedSteps steps;
    OptionalTensor order;

    Plan(const CudaDevice& device, const OptionalTensor& lengths, int64_t batch, int64_t T) : steps(device, lengths, batch, T) {
        if (steps.lengths.has_value()) order = falling_order(*steps.lengths);
    }
    GruPlan pointers() const { return {steps.pointers(), pointer<int64_t>(order)}; }
};

template <typename S>
GruProblem<S> problem(const GruArguments& a, const Plan& plan, bool allow_tf32) {
    GruProblem<S> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.input_size = a.I, p.hidden_size = a.H;
    p.gate = a.gate, p.reset_after = a.reset_after, p.reverse = a.reverse;
    p.tf32 = allow_tf32;
    p.plan = plan.pointers();
    const auto strides = [](const GruArguments::Strides& s) { return cuda::Strides{s.b, s.c, s.t}; };
    p.input = pointer<S>(a.input), p.input_strides = strides(a.strides(1, a.I));
    p.attention = pointer<S>(a.attention), p.attention_strides = strides(a.attention_strides());
    p.hx = pointer<S>(a.hx);
    p.weight_ih = pointer<S>(a.weight_ih), p.weight_hh = pointer<S>(a.weight_hh);
    p.bias_ih = pointer<S>(a.bias_ih), p.bias_hh = pointer<S>(a.bias_hh);
    p.output_strides = strides(a.strides(a.C, a.H));
    return p;
}

// W x of every valid step.
template <typename S>
Tensor project_input(const CudaDevice& device, const GruProblem<S>& p, const Tensor& packed, ScalarType dtype) {
    const Tensor projected = device.empty({p.batch, p.steps, cuda::gru_projection_width(p.hidden_size)}, dtype);
    cuda::gru_projection(device.stream(), p, mutable_pointer<S>(packed), mutable_pointer<Compute<S>>(projected));
    return projected;
}

std::tuple<Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& attention, const OptionalTensor& hx,
                                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, const OptionalTensor& lengths, const std::string& gate,
                                       bool reset_after, bool batch_first, bool reverse, bool allow_tf32, bool save_gates) {
    const GruArguments a = read_gru_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, gate, reset_after,
                                              batch_first, reverse);
    const CudaDevice device(input);
    const Plan plan(device, lengths, a.B, a.T);
    const Tensor output = device.empty(a.output_sizes(), a.dtype), h_n = device.empty(a.state_sizes(), a.dtype);
    const Tensor gates = device.empty(save_gates ? a.gates_sizes() : std::vector<int64_t>{0}, a.dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        GruForward<S> p{problem<S>(a, plan, allow_tf32)};
        const Tensor packed = device.empty({cuda::gru_packed_size<S>(p)}, a.dtype);
        const Tensor workspace = device.empty({cuda::gru_forward_workspace<S>(p)}, ScalarType::Byte);
        const Tensor projected = project_input<S>(device, p, packed, a.compute_dtype());
        p.projected = pointer<Compute<S>>(projected);
        p.packed = mutable_pointer<S>(packed);
        p.workspace = mutable_pointer<unsigned char>(workspace);
        p.states = mutable_pointer<S>(output);
        p.h_n = mutable_pointer<S>(h_n);
        p.gates = save_gates ? mutable_pointer<S>(gates) : nullptr;
        cuda::gru_forward(device.stream(), p);
        cuda::gru_clear_padding(device.stream(), p.plan, a.B, a.C, a.T, p.states, p.output_strides, a.H);
    });
    return {output, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& attention,
    const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const OptionalTensor& lengths, const Tensor& output, const Tensor& gates,
    const std::string& gate, bool reset_after, bool batch_first, bool reverse, bool allow_tf32) {
    const GruArguments a = read_gru_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, gate, reset_after,
                                              batch_first, reverse);
    const OptionalTensor dense_grad_output = checked(grad_output, "grad_output", a.output_sizes(), a.dtype, input.device());
    const OptionalTensor dense_grad_h_n = checked(grad_h_n, "grad_h_n", a.state_sizes(), a.dtype, input.device());
    const Tensor dense_output = checked(output, "output", a.output_sizes(), a.dtype, input.device());
    const Tensor dense_gates = checked(gates, "gates", a.gates_sizes(), a.dtype, input.device());

    const CudaDevice device(input);
    const Plan plan(device, lengths, a.B, a.T);
    const auto empty = [&](const std::vector<int64_t>& sizes) { return device.empty(sizes, a.dtype); };
    const GruGradients grads(a, empty);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        GruBackward<S> p{problem<S>(a, plan, allow_tf32)};
        p.output = pointer<S>(dense_output);
        p.gates = pointer<S>(dense_gates);
        p.grad_output = pointer<S>(dense_grad_output);
        p.grad_h_n = pointer<S>(dense_grad_h_n);
        p.grad_attention = attention.has_value() ? mutable_pointer<S>(grads.attention) : nullptr;
        p.grad_hx = mutable_pointer<S>(grads.hx);

        const Tensor packed = empty({cuda::gru_packed_size<S>(p)});
        const Tensor workspace = device.empty({cuda::gru_backward_workspace<S>(p)}, ScalarType::Byte);
        const Tensor grad_gates = empty(a.gates_sizes());
        p.packed = mutable_pointer<S>(packed);
        p.workspace = mutable_pointer<unsigned char>(workspace);
        p.grad_gates = mutable_pointer<S>(grad_gates);
        Tensor projected, sums;
        if (a.gate == Gate::input) {
            projected = project_input<S>(device, p, packed, a.compute_dtype());
            p.projected = pointer<T>(projected);
        }
        cuda::gru_backward(device.stream(), p);

        GruWeightGradients<S> g{};
        if (a.gate == Gate::input || a.C != 1) {
            sums = empty({a.B, a.T, 3 * a.H});
            cuda::gru_target_sums(device.stream(), p, p.grad_gates, mutable_pointer<S>(sums));
            g.of_projection = pointer<S>(sums);
        }
        cuda::gru_input_gradient(device.stream(), p, p.grad_gates, g.of_projection, p.packed, mutable_pointer<S>(grads.input));
        const Tensor partial = device.empty({cuda::gru_weight_gradients_partial<S>(p)}, a.compute_dtype());
        g.gates = p.gates;
        g.grad_gates = p.grad_gates;
        g.partial = mutable_pointer<T>(partial);
        g.grad_weight_ih = mutable_pointer<S>(grads.weight_ih);
        g.grad_weight_hh = mutable_pointer<S>(grads.weight_hh);
        g.grad_bias_ih = mutable_pointer<S>(grads.bias_ih);
        g.grad_bias_hh = mutable_pointer<S>(grads.bias_hh);
        cuda::gru_weight_gradients(device.stream(), p, g);
        cuda::gru_clear_padding(device.stream(), p.plan, a.B, 1, a.T, mutable_pointer<S>(grads.input), p.input_strides, a.I);
        if (p.grad_attention) {
            cuda::gru_clear_padding(device.stream(), p.plan, a.B, a.C, a.T, p.grad_attention, p.attention_strides, 1);
        }
    });
    return grads.of(a);
}

std::tuple<double, bool, double, bool> gru_residence(const Tensor& like, int64_t hidden_size, bool reset_after,
                                                     bool allow_tf32) {
    const CudaDevice device(like);
    cuda::GruResidence forward, backward;
    with_storage_type(like.scalar_type(), "like", [&](auto zero) {
        using S = decltype(zero);
        forward = cuda::gru_forward_residence<S>(hidden_size, reset_after, allow_tf32);
        backward = cuda::gru_backward_residence<S>(hidden_size, allow_tf32);
    });
    return {forward.weights, forward.state, backward.weights, backward.state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, DIEN_OPS_CUDA_KEY, m) {
    m.impl("gru", TORCH_BOX(&gru));
    m.impl("gru_backward", TORCH_BOX(&gru_backward));
    m.impl("gru_residence", TORCH_BOX(&gru_residence));
}

}  // namespace dien_ops::ops
