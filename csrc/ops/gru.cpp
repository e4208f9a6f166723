// SPDX-License-Identifier: Apache-2.0
// The recurrent column between torch and the kernels: checks, allocation, threads.
#include "cpu/gru.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ops/gru_arguments.h"

namespace dien_ops::ops {
namespace {

using cpu::GruBackward;
using cpu::GruForward;
using cpu::GruProblem;
using cpu::GruProjection;

// The call, and who runs when: see GruProblem.
struct Arguments : GruArguments {
    std::vector<int64_t> lengths, order, entry;

    Arguments(const GruArguments& arguments, const OptionalTensor& given_lengths) : GruArguments(arguments) {
        lengths = read_lengths(given_lengths, B, T);
        order.resize(B * C);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return lengths[x / C] > lengths[y / C]; });
        entry.resize(order.size());
        int64_t entries = 0;
        for (const int64_t row : order) {
            entry[row] = entries;
            entries += lengths[row / C];
        }
    }
};

template <typename S>
GruProblem<S> problem(const Arguments& a) {
    GruProblem<S> p{};
    p.batch = a.B, p.targets = a.C, p.steps = a.T, p.input_size = a.I, p.hidden_size = a.H;
    p.gate = a.gate, p.reset_after = a.reset_after, p.reverse = a.reverse;
    p.input = pointer<S>(a.input);
    p.attention = pointer<S>(a.attention);
    p.hx = pointer<S>(a.hx);
    p.weight_ih = pointer<S>(a.weight_ih);
    p.weight_hh = pointer<S>(a.weight_hh);
    p.bias_ih = pointer<S>(a.bias_ih);
    p.bias_hh = pointer<S>(a.bias_hh);
    p.lengths = a.lengths.data();
    p.order = a.order.data();
    p.entry = a.entry.data();
    const auto of_input = a.strides(1, a.I), of_attention = a.attention_strides(), of_output = a.strides(a.C, a.H);
    p.input_stride_b = of_input.b, p.input_stride_t = of_input.t;
    p.attention_stride_b = of_attention.b, p.attention_stride_c = of_attention.c, p.attention_stride_t = of_attention.t;
    p.output_stride_b = of_output.b, p.output_stride_c = of_output.c, p.output_stride_t = of_output.t;
    return p;
}

// W x for every valid step, [B, T, gru_projection_width].
template <cpu::Capability kTarget, typename S>
Tensor project_input(const GruProblem<S>& p, bool panels, ScalarType dtype) {
    using T = Compute<S>;
    const Tensor packed = empty({cpu::gru_projection_packed_size<kTarget>(p, panels)}, dtype);
    const Tensor projected = empty({p.batch, p.steps, cpu::gru_projection_width<kTarget>(p, panels)}, dtype);
    const GruProjection<S> projection = {panels, mutable_pointer<T>(packed), mutable_pointer<T>(projected)};
    cpu::gru_projection_pack<kTarget>(p, projection);
    parallel_tasks(p.batch, [&](int64_t b) { cpu::gru_projection<kTarget>(p, projection, b, b + 1); });
    return projected;
}

// Rows per tile of the forward sweep: every thread has as many tiles, whose states stay in the first caches, and the blocks
// that the kernel works on are full where that costs no tile. No bit of the result depends on it.
int64_t forward_tile_rows(int64_t rows, int64_t block) {
    constexpr int64_t kLargest = 48;
    const int64_t share = std::max<int64_t>(1, divide_up(rows, torch::stable::get_num_threads()));
    const int64_t tile = divide_up(share, divide_up(share, kLargest)), full = divide_up(tile, block) * block;
    return divide_up(rows, full) == divide_up(rows, tile) ? full : tile;
}

// Rows per tile and groups of tiles of the backward sweep, which set the order of its sums: from the problem alone. A group is
// what a thread takes, and has sums of its own: as many as large machines have use for, within 64 MiB, but at least 8.
int64_t backward_tile_rows(int64_t rows) { return rows <= 64 ? 8 : rows <= 256 ? 16 : 32; }
int64_t backward_groups(int64_t tiles, int64_t bytes_of_sums) {
    const int64_t most = std::clamp<int64_t>((64 << 20) / std::max<int64_t>(bytes_of_sums, 1), 8, 64);
    return std::clamp<int64_t>(tiles, 1, most);
}

// Cuts the tiles into groups of about as many valid steps: each but the first begins with the tile in which its share begins.
template <typename S>
std::vector<int64_t> group_begins(const GruProblem<S>& p, int64_t groups) {
    std::vector<int64_t> begins(groups + 1, p.rows());
    int64_t steps = 0, group = 0;
    for (int64_t row = 0; row < p.rows(); ++row) steps += p.length(row);
    for (int64_t first = 0; first < p.rows(); first += p.tile_rows) {
        for (; group < groups && p.entry[p.order[first]] * groups >= group * steps; ++group) begins[group] = first;
    }
    return begins;
}

std::tuple<Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& attention, const OptionalTensor& hx,
                                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, const OptionalTensor& lengths, const std::string& gate,
                                       bool reset_after, bool batch_first, bool reverse, [[maybe_unused]] bool allow_tf32,
                                       bool save_gates) {
    const Arguments a(read_gru_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, gate, reset_after,
                                         batch_first, reverse),
                      lengths);
    const Tensor output = empty(a.output_sizes(), a.dtype), h_n = empty(a.state_sizes(), a.dtype);
    const Tensor gates = empty(save_gates ? a.gates_sizes() : std::vector<int64_t>{0}, a.dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        GruForward<S> p{problem<S>(a)};
        p.output = mutable_pointer<S>(output);
        p.h_n = mutable_pointer<S>(h_n);
        p.gates = save_gates ? mutable_pointer<S>(gates) : nullptr;
        cpu::with_capability([&](auto target) {
            const int64_t block = cpu::gru_forward_block_rows<target(), S>();
            p.tile_rows = forward_tile_rows(p.rows(), block);
            Tensor projected;
            if (p.rows() > 0 && (a.C != 1 || p.rows() < block)) {
                projected = project_input<target()>(p, /*panels=*/true, a.compute_dtype());
                p.projected = pointer<Compute<S>>(projected);
            }
            const Tensor packed = empty({cpu::gru_forward_packed_size<target()>(p)}, a.compute_dtype());
            p.packed = mutable_pointer<Compute<S>>(packed);
            cpu::gru_forward_pack<target()>(p);
            parallel_tasks(p.tiles(), [&](int64_t tile) { cpu::gru_forward_sweep<target()>(p, tile, tile + 1); });
        });
    });
    return {output, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& attention,
    const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const OptionalTensor& lengths, const Tensor& output, const Tensor& gates,
    const std::string& gate, bool reset_after, bool batch_first, bool reverse, [[maybe_unused]] bool allow_tf32) {
    const Arguments a(read_gru_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, gate, reset_after,
                                         batch_first, reverse),
                      lengths);
    const OptionalTensor dense_grad_output = checked(grad_output, "grad_output", a.output_sizes(), a.dtype);
    const OptionalTensor dense_grad_h_n = checked(grad_h_n, "grad_h_n", a.state_sizes(), a.dtype);
    const Tensor dense_output = checked(output, "output", a.output_sizes(), a.dtype);
    const Tensor dense_gates = checked(gates, "gates", a.gates_sizes(), a.dtype);

    const GruGradients grads(a, [&](const std::vector<int64_t>& sizes) { return empty(sizes, a.dtype); });
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        GruBackward<S> p{problem<S>(a)};
        p.output = pointer<S>(dense_output);
        p.gates = pointer<S>(dense_gates);
        p.grad_output = pointer<S>(dense_grad_output);
        p.grad_h_n = pointer<S>(dense_grad_h_n);
        p.grad_input = mutable_pointer<S>(grads.input);
        p.grad_attention = attention.has_value() ? mutable_pointer<S>(grads.attention) : nullptr;
        p.grad_hx = mutable_pointer<S>(grads.hx);
        p.grad_weight_ih = mutable_pointer<S>(grads.weight_ih);
        p.grad_weight_hh = mutable_pointer<S>(grads.weight_hh);
        p.grad_bias_ih = mutable_pointer<S>(grads.bias_ih);
        p.grad_bias_hh = mutable_pointer<S>(grads.bias_hh);
        p.tile_rows = backward_tile_rows(p.rows());
        cpu::with_capability([&](auto target) {
            const int64_t sums_size = cpu::gru_backward_sums_size<target()>(p);
            p.groups = backward_groups(p.tiles(), sums_size * sizeof(T));
            const std::vector<int64_t> begins = group_begins(p, p.groups);
            p.group_begin = begins.data();
            const bool several = a.C != 1;
            Tensor grad_projected, projected;
            if (several) {
                grad_projected = empty({a.B + p.groups, a.T, 3 * a.H}, a.compute_dtype());
                p.grad_projected = mutable_pointer<T>(grad_projected);
            }
            if (several && a.gate == Gate::input) {
                projected = project_input<target()>(p, /*panels=*/false, a.compute_dtype());
                p.projected = pointer<T>(projected);
            }
            const Tensor sums = empty({p.groups, sums_size}, a.compute_dtype());
            const Tensor packed = empty({cpu::gru_backward_packed_size<target()>(p)}, a.compute_dtype());
            p.sums = mutable_pointer<T>(sums);
            p.packed = mutable_pointer<T>(packed);
            cpu::gru_backward_pack<target()>(p);
            parallel_tasks(p.groups, [&](int64_t group) { cpu::gru_backward_sweep<target()>(p, group, group + 1); });
            if (several) {
                parallel_tasks(p.groups, [&](int64_t group) { cpu::gru_backward_input<target()>(p, group, group + 1); });
            }
            parallel_ranges(a.I + a.H, [&](int64_t begin, int64_t end) { cpu::gru_backward_weights<target()>(p, begin, end); });
        });
    });
    return grads.of(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("gru", TORCH_BOX(&gru));
    m.impl("gru_backward", TORCH_BOX(&gru_backward));
}

}  // namespace dien_ops::ops
