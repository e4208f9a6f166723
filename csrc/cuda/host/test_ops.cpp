// SPDX-License-Identifier: Apache-2.0
// torch.ops.dien_ops_test: what the tests of the host executor and of the primitives call. On CPU tensors, which the executor's
// kernels work on.
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <tuple>

#include "cuda/host/executor.h"
#include "cuda/host/test_kernels.h"
#include "ops/tensor.h"

namespace dien_ops::ops {
namespace {

namespace test = cuda::test;
using cuda::executor_options;
using test::Bug;
using test::Function;

template <typename Value>
Value named(const std::map<std::string, Value>& values, const char* argument, const std::string& name) {
    const auto found = values.find(name);
    check(found != values.end(), argument, " has no value ", name);
    return found->second;
}

void set_executor(const std::string& order, int64_t seed, bool check_memory, int64_t multiprocessors, int64_t shared_bytes) {
    using Order = cuda::ExecutorOptions::Order;
    const std::map<std::string, Order> orders = {
        {"in_order", Order::in_order}, {"reverse", Order::reverse}, {"shuffled", Order::shuffled}, {"skewed", Order::skewed}};
    executor_options() = {named(orders, "order", order), static_cast<uint64_t>(seed), check_memory,
                          static_cast<int>(multiprocessors), shared_bytes};
}

std::tuple<Tensor, Tensor> recurrent(const Tensor& x, const Tensor& u, const OptionalTensor& h0, const std::string& bug) {
    const std::map<std::string, Bug> bugs = {{"none", Bug::none},
                                             {"missing_step_barrier", Bug::missing_step_barrier},
                                             {"single_buffered_state", Bug::single_buffered_state},
                                             {"prefetch_before_barrier", Bug::prefetch_before_barrier},
                                             {"wait_after_barrier", Bug::wait_after_barrier},
                                             {"missing_wait", Bug::missing_wait},
                                             {"missing_syncwarp", Bug::missing_syncwarp},
                                             {"out_of_range_shared", Bug::out_of_range_shared},
                                             {"unwritten_shared", Bug::unwritten_shared},
                                             {"divergent_barrier", Bug::divergent_barrier},
                                             {"unrounded_operands", Bug::unrounded_operands},
                                             {"out_of_range_global", Bug::out_of_range_global},
                                             {"race_between_blocks", Bug::race_between_blocks},
                                             {"race_over_global", Bug::race_over_global},
                                             {"exited_thread", Bug::exited_thread},
                                             {"misaligned_vector", Bug::misaligned_vector},
                                             {"absent_buffer", Bug::absent_buffer}};
    const int64_t T = x.size(0), B = x.size(1), H = x.size(2);
    check(T > 0 && H % 8 == 0 && H <= 64, "x must be [T, B, H] with T > 0 and H a multiple of 8 and at most 64");
    const Tensor dense_x = checked(x, "x", {T, B, H}, ScalarType::Float);
    const Tensor dense_u = checked(u, "u", {H, H}, ScalarType::Float);
    const OptionalTensor dense_h0 = checked(h0, "h0", {B, H}, ScalarType::Float);
    const Tensor y = zeros({T, B, H}, ScalarType::Float), h_n = zeros({B, H}, ScalarType::Float);
    test::recurrent({B, T, H, pointer<float>(dense_x), pointer<float>(dense_u), pointer<float>(dense_h0),
                     mutable_pointer<float>(y), mutable_pointer<float>(h_n)},
                    named(bugs, "bug", bug), nullptr);
    return {y, h_n};
}

Tensor indices(int64_t x, int64_t y, int64_t z, int64_t threads) {
    const Tensor out = zeros({z, y, x, threads, 8}, ScalarType::Long);
    test::indices(x, y, z, static_cast<int>(threads), mutable_pointer<int64_t>(out), nullptr);
    return out;
}

void launch_nothing(int64_t x, int64_t y, int64_t z, int64_t threads, int64_t shared_bytes) {
    test::nothing(x, y, z, static_cast<int>(threads), shared_bytes, nullptr);
}

Tensor turns(int64_t blocks, int64_t threads) {
    const Tensor count = zeros({1}, ScalarType::Long), out = zeros({blocks * threads}, ScalarType::Long);
    test::turns(blocks, static_cast<int>(threads), mutable_pointer<int64_t>(count), mutable_pointer<int64_t>(out), nullptr);
    return out;
}

void perform(const Tensor& steps, const Tensor& numbers, int64_t blocks, int64_t threads) {
    const int64_t count = steps.size(0);
    const Tensor dense_steps = checked(steps, "steps", {count, 4}, ScalarType::Long);
    check_sizes(numbers, "numbers", {numbers.numel()});
    test::perform(pointer<int64_t>(dense_steps), count, mutable_pointer<float>(numbers), numbers.numel(), blocks,
                  static_cast<int>(threads), nullptr);
}

void take(int64_t numbers, int64_t shared_bytes) { test::take(static_cast<int>(numbers), shared_bytes, nullptr); }

template <typename T>
void move_numbers(const T* in, T* out, int64_t n, int64_t numbers) {
    check(n % numbers == 0, "in must hold a multiple of ", numbers, " numbers, got ", n);
    if (numbers == 1) return test::move<T, 1>(in, out, n, nullptr);
    if (numbers == 2) return test::move<T, 2>(in, out, n, nullptr);
    if constexpr (sizeof(T) <= 4) {
        if (numbers == 4) return test::move<T, 4>(in, out, n, nullptr);
    }
    if constexpr (sizeof(T) == 2) {
        if (numbers == 8) return test::move<T, 8>(in, out, n, nullptr);
    }
    check(false, "numbers must be a power of two of at most 16 bytes, got ", numbers);
}

Tensor move(const Tensor& in, int64_t numbers) {
    const Tensor out = zeros(sizes_of(in), in.scalar_type());
    with_storage_type(in.scalar_type(), "in", [&]<typename T>(T) {
        if constexpr (std::is_same_v<T, Half>) {
            check(false, "in must not be float16");
        } else {
            move_numbers(pointer<T>(in), mutable_pointer<T>(out), in.numel(), numbers);
        }
    });
    return out;
}

Tensor part(const OptionalTensor& in, int64_t in_n, int64_t offset, int64_t n, bool of_part) {
    const OptionalTensor dense = checked(in, "in", {in_n}, ScalarType::Float);
    const Tensor out = zeros({std::max<int64_t>(n, 0)}, ScalarType::Float);
    test::part(pointer<float>(dense), in_n, offset, n, of_part, mutable_pointer<float>(out), nullptr);
    return out;
}

Tensor copy_in_groups(const Tensor& in) {
    const Tensor out = zeros(sizes_of(in), in.scalar_type());
    with_floating_type(in.scalar_type(), "in", [&]<typename T>(T) {
        test::copy_in_groups(pointer<T>(in), mutable_pointer<T>(out), static_cast<int>(in.numel()), nullptr);
    });
    return out;
}

Tensor shuffle(const Tensor& in, int64_t lane_mask) {
    check_sizes(in, "in", {32});
    const Tensor out = zeros({32}, in.scalar_type());
    const auto run = [&]<typename T>(T) {
        test::shuffle(pointer<T>(in), mutable_pointer<T>(out), static_cast<int>(lane_mask), nullptr);
    };
    if (in.scalar_type() == ScalarType::Int) {
        run(int32_t{});
    } else if (in.scalar_type() == ScalarType::Long) {
        run(int64_t{});
    } else {
        with_floating_type(in.scalar_type(), "in", run);
    }
    return out;
}

Tensor mma(const Tensor& a, const Tensor& b, const Tensor& d) {
    const ScalarType dtype = a.scalar_type();
    const int64_t depth = dtype == ScalarType::Float ? 8 : 16;
    const Tensor dense_a = checked(a, "a", {16, depth}, dtype), dense_b = checked(b, "b", {depth, 8}, dtype);
    const Tensor sums = torch::stable::clone(checked(d, "d", {16, 8}, ScalarType::Float));
    with_storage_type(dtype, "a", [&]<typename T>(T) {
        if constexpr (std::is_same_v<T, double>) {
            check(false, "a must not be float64");
        } else {
            test::mma(pointer<T>(dense_a), pointer<T>(dense_b), mutable_pointer<float>(sums), nullptr);
        }
    });
    return sums;
}

Tensor apply(const std::string& function, const Tensor& in, const OptionalTensor& in2) {
    const std::map<std::string, Function> functions = {{"exp_approx", Function::exp_approx},
                                                       {"exp_exact", Function::exp_exact},
                                                       {"tanh_exact", Function::tanh_exact},
                                                       {"to_tf32", Function::to_tf32},
                                                       {"divide_approx", Function::divide_approx}};
    const Tensor out = zeros(sizes_of(in), in.scalar_type());
    with_floating_type(in.scalar_type(), "in", [&]<typename T>(T) {
        test::apply(named(functions, "function", function), pointer<T>(in), pointer<T>(in2), mutable_pointer<T>(out),
                    in.numel(), nullptr);
    });
    return out;
}

Tensor to_compute(const Tensor& in) {
    const Tensor out = zeros(sizes_of(in), ScalarType::Float);
    const auto run = [&]<typename S>(S) { test::to_compute(pointer<S>(in), mutable_pointer<float>(out), in.numel(), nullptr); };
    in.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
    return out;
}

Tensor to_storage(const Tensor& in, bool to_bfloat16) {
    const Tensor out = zeros(sizes_of(in), to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Half);
    const auto run = [&]<typename S>(S) { test::to_storage(pointer<float>(in), mutable_pointer<S>(out), in.numel(), nullptr); };
    to_bfloat16 ? run(BFloat16{}) : run(Half{});
    return out;
}

void require_not_negative(const Tensor& in) { test::require_not_negative(pointer<int64_t>(in), in.numel(), nullptr); }

}  // namespace

STABLE_TORCH_LIBRARY(dien_ops_test, m) {
    m.def("set_executor(str order, int seed, bool check_memory, int multiprocessors, int shared_bytes) -> ()");
    m.def("recurrent(Tensor x, Tensor u, Tensor? h0, str bug) -> (Tensor y, Tensor h_n)");
    m.def("indices(int x, int y, int z, int threads) -> Tensor");
    m.def("launch_nothing(int x, int y, int z, int threads, int shared_bytes) -> ()");
    m.def("turns(int blocks, int threads) -> Tensor");
    m.def("perform(Tensor steps, Tensor(a!) numbers, int blocks, int threads) -> ()");
    m.def("take(int numbers, int shared_bytes) -> ()");
    m.def("move(Tensor x, int numbers) -> Tensor");
    m.def("part(Tensor? x, int x_numbers, int offset, int numbers, bool of_part) -> Tensor");
    m.def("copy_in_groups(Tensor x) -> Tensor");
    m.def("shuffle(Tensor x, int lane_mask) -> Tensor");
    m.def("mma(Tensor a, Tensor b, Tensor d) -> Tensor");
    m.def("apply(str function, Tensor x, Tensor? x2) -> Tensor");
    m.def("to_compute(Tensor x) -> Tensor");
    m.def("to_storage(Tensor x, bool to_bfloat16) -> Tensor");
    m.def("require_not_negative(Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dien_ops_test, CompositeExplicitAutograd, m) {
    m.impl("set_executor", TORCH_BOX(&set_executor));
    m.impl("recurrent", TORCH_BOX(&recurrent));
    m.impl("indices", TORCH_BOX(&indices));
    m.impl("launch_nothing", TORCH_BOX(&launch_nothing));
    m.impl("turns", TORCH_BOX(&turns));
    m.impl("perform", TORCH_BOX(&perform));
    m.impl("take", TORCH_BOX(&take));
    m.impl("move", TORCH_BOX(&move));
    m.impl("part", TORCH_BOX(&part));
    m.impl("copy_in_groups", TORCH_BOX(&copy_in_groups));
    m.impl("shuffle", TORCH_BOX(&shuffle));
    m.impl("mma", TORCH_BOX(&mma));
    m.impl("apply", TORCH_BOX(&apply));
    m.impl("to_compute", TORCH_BOX(&to_compute));
    m.impl("to_storage", TORCH_BOX(&to_storage));
    m.impl("require_not_negative", TORCH_BOX(&require_not_negative));
}

}  // namespace dien_ops::ops
