// SPDX-License-Identifier: Apache-2.0
// The recurrent column between torch and the kernels: checks, allocation, threads.
#include "cpu/gru.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ops/tensor.h"

namespace dien_ops::ops {
namespace {

using cpu::GruBackward;
using cpu::GruForward;
using cpu::GruProblem;
using cpu::GruProjection;

Gate parse_gate(const std::string& name) {
    if (name == "none") return Gate::none;
    if (name == "input") return Gate::input;
    if (name == "replace") return Gate::replace;
    if (name == "paper") return Gate::paper;
    if (name == "authors") return Gate::authors;
    throw std::runtime_error("gate must be one of none, input, replace, paper, authors; got " + name);
}

// The tensors of a call, checked and contiguous, and the layout they are in. Owns what a GruProblem borrows.
struct Arguments {
    int64_t B, C, T, I, H;
    bool several;  // attention has a target axis
    Gate gate;
    bool reset_after, reverse, batch_first;
    ScalarType dtype;
    Tensor input, weight_ih, weight_hh;
    OptionalTensor attention, hx, bias_ih, bias_hh;
    std::vector<int64_t> lengths, order, entry;

    std::vector<int64_t> with_time(const std::vector<int64_t>& batch_axes, const std::vector<int64_t>& last) const {
        std::vector<int64_t> sizes = batch_axes;
        sizes.insert(batch_first ? sizes.end() : sizes.begin(), T);
        sizes.insert(sizes.end(), last.begin(), last.end());
        return sizes;
    }
    std::vector<int64_t> rows() const { return several ? std::vector{B, C} : std::vector{B}; }
    std::vector<int64_t> state_sizes() const {
        std::vector<int64_t> sizes = rows();
        sizes.push_back(H);
        return sizes;
    }
    std::vector<int64_t> output_sizes() const { return with_time(rows(), {H}); }
    std::vector<int64_t> attention_sizes() const { return with_time(rows(), {}); }
    std::vector<int64_t> gates_sizes() const { return {B, C, T, (reset_after ? 4 : 3) * H}; }
    ScalarType compute_dtype() const { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
};

Arguments read_arguments(const Tensor& input, const OptionalTensor& attention, const OptionalTensor& hx,
                         const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh, const OptionalTensor& lengths, const std::string& gate,
                         bool reset_after, bool batch_first, bool reverse) {
    Arguments a;
    a.gate = parse_gate(gate);
    a.reset_after = reset_after;
    a.reverse = reverse;
    a.batch_first = batch_first;
    a.dtype = input.scalar_type();
    check(input.dim() == 3, "input must be 3-D, got shape ", to_string(sizes_of(input)));
    check(weight_hh.dim() == 2, "weight_hh must be 2-D, got shape ", to_string(sizes_of(weight_hh)));
    check(attention.has_value() == (a.gate != Gate::none), "attention must be given for every gate but none");
    check(!reverse || a.gate == Gate::none, "reverse must be false for every gate but none");
    a.B = input.size(batch_first ? 0 : 1);
    a.T = input.size(batch_first ? 1 : 0);
    a.I = input.size(2);
    a.H = weight_hh.size(1);
    a.several = attention.has_value() && attention->dim() == 3;
    a.C = a.several ? attention->size(batch_first ? 1 : 2) : 1;
    a.input = checked(input, "input", sizes_of(input), a.dtype);
    a.attention = checked(attention, "attention", a.attention_sizes(), a.dtype);
    a.hx = checked(hx, "hx", a.state_sizes(), a.dtype);
    a.weight_ih = checked(weight_ih, "weight_ih", {3 * a.H, a.I}, a.dtype);
    a.weight_hh = checked(weight_hh, "weight_hh", {3 * a.H, a.H}, a.dtype);
    a.bias_ih = checked(bias_ih, "bias_ih", {3 * a.H}, a.dtype);
    a.bias_hh = checked(bias_hh, "bias_hh", {3 * a.H}, a.dtype);
    a.lengths = read_lengths(lengths, a.B, a.T);
    a.order.resize(a.B * a.C);
    std::iota(a.order.begin(), a.order.end(), 0);
    std::stable_sort(a.order.begin(), a.order.end(),
                     [&](int64_t x, int64_t y) { return a.lengths[x / a.C] > a.lengths[y / a.C]; });
    a.entry.resize(a.order.size());
    int64_t entries = 0;
    for (const int64_t row : a.order) {
        a.entry[row] = entries;
        entries += a.lengths[row / a.C];
    }
    return a;
}

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
    if (a.batch_first) {  // [B, T, I], [B, C, T], [B, C, T, H]
        p.input_stride_b = a.T * a.I, p.input_stride_t = a.I;
        p.attention_stride_b = a.C * a.T, p.attention_stride_c = a.T, p.attention_stride_t = 1;
        p.output_stride_b = a.C * a.T * a.H, p.output_stride_c = a.T * a.H, p.output_stride_t = a.H;
    } else {  // [T, B, I], [T, B, C], [T, B, C, H]
        p.input_stride_b = a.I, p.input_stride_t = a.B * a.I;
        p.attention_stride_b = a.C, p.attention_stride_c = 1, p.attention_stride_t = a.B * a.C;
        p.output_stride_b = a.C * a.H, p.output_stride_c = a.H, p.output_stride_t = a.B * a.C * a.H;
    }
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
                                       bool reset_after, bool batch_first, bool reverse, bool save_gates) {
    const Arguments a = read_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, gate, reset_after,
                                       batch_first, reverse);
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
    const std::string& gate, bool reset_after, bool batch_first, bool reverse) {
    const Arguments a = read_arguments(input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, gate, reset_after,
                                       batch_first, reverse);
    const OptionalTensor dense_grad_output = checked(grad_output, "grad_output", a.output_sizes(), a.dtype);
    const OptionalTensor dense_grad_h_n = checked(grad_h_n, "grad_h_n", a.state_sizes(), a.dtype);
    const Tensor dense_output = checked(output, "output", a.output_sizes(), a.dtype);
    const Tensor dense_gates = checked(gates, "gates", a.gates_sizes(), a.dtype);

    const std::vector<int64_t> none = {0};
    const Tensor grad_input = empty(sizes_of(a.input), a.dtype), grad_hx = empty(a.state_sizes(), a.dtype);
    const Tensor grad_attention = empty(attention.has_value() ? a.attention_sizes() : none, a.dtype);
    const Tensor grad_weight_ih = empty({3 * a.H, a.I}, a.dtype), grad_weight_hh = empty({3 * a.H, a.H}, a.dtype);
    const Tensor grad_bias_ih = empty({3 * a.H}, a.dtype), grad_bias_hh = empty({3 * a.H}, a.dtype);
    with_storage_type(a.dtype, "input", [&](auto zero) {
        using S = decltype(zero);
        using T = Compute<S>;
        GruBackward<S> p{problem<S>(a)};
        p.output = pointer<S>(dense_output);
        p.gates = pointer<S>(dense_gates);
        p.grad_output = pointer<S>(dense_grad_output);
        p.grad_h_n = pointer<S>(dense_grad_h_n);
        p.grad_input = mutable_pointer<S>(grad_input);
        p.grad_attention = attention.has_value() ? mutable_pointer<S>(grad_attention) : nullptr;
        p.grad_hx = mutable_pointer<S>(grad_hx);
        p.grad_weight_ih = mutable_pointer<S>(grad_weight_ih);
        p.grad_weight_hh = mutable_pointer<S>(grad_weight_hh);
        p.grad_bias_ih = mutable_pointer<S>(grad_bias_ih);
        p.grad_bias_hh = mutable_pointer<S>(grad_bias_hh);
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
    const Tensor absent = empty(none, a.dtype);
    return {grad_input,
            grad_attention,
            hx.has_value() ? grad_hx : absent,
            grad_weight_ih,
            grad_weight_hh,
            bias_ih.has_value() ? grad_bias_ih : absent,
            bias_hh.has_value() ? grad_bias_hh : absent};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_ops, CPU, m) {
    m.impl("gru", TORCH_BOX(&gru));
    m.impl("gru_backward", TORCH_BOX(&gru_backward));
}

}  // namespace dien_ops::ops
