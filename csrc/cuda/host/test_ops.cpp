// SPDX-License-Identifier: Apache-2.0
// torch.ops.dien_ops_executor: what the tests of the host executor call, and its options.
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

template <typename Value>
Value named(const std::map<std::string, Value>& values, const char* argument, const std::string& name) {
    const auto found = values.find(name);
    check(found != values.end(), argument, " has no value ", name);
    return found->second;
}

void set_options(const std::string& order, int64_t seed, bool check_memory, int64_t multiprocessors, int64_t shared_bytes) {
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

}  // namespace

STABLE_TORCH_LIBRARY(dien_ops_executor, m) {
    m.def("set_options(str order, int seed, bool check_memory, int multiprocessors, int shared_bytes) -> ()");
    m.def("recurrent(Tensor x, Tensor u, Tensor? h0, str bug) -> (Tensor y, Tensor h_n)");
    m.def("turns(int blocks, int threads) -> Tensor");
    m.def("perform(Tensor steps, Tensor(a!) numbers, int blocks, int threads) -> ()");
    m.def("take(int numbers, int shared_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dien_ops_executor, CompositeExplicitAutograd, m) {
    m.impl("set_options", TORCH_BOX(&set_options));
    m.impl("recurrent", TORCH_BOX(&recurrent));
    m.impl("turns", TORCH_BOX(&turns));
    m.impl("perform", TORCH_BOX(&perform));
    m.impl("take", TORCH_BOX(&take));
}

}  // namespace dien_ops::ops
