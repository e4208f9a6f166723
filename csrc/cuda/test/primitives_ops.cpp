// SPDX-License-Identifier: Apache-2.0
// torch.ops.dien_ops_test: what the tests of the primitives and of launch call, on CUDA tensors and, in the host executor, on
// those of the CPU. An operator without a tensor of its own takes one for the device that it stands on.
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "cuda/sort.h"
#include "cuda/test/primitives.h"
#include "ops/cuda_device.h"

namespace dien_ops::ops {
namespace {

namespace test = cuda::test;
using test::Function;

Tensor zeros(const CudaDevice& device, const std::vector<int64_t>& sizes, ScalarType dtype) {
    Tensor t = device.empty(sizes, dtype);
    torch::stable::zero_(t);
    return t;
}

Tensor dense(const Tensor& t, const char* argument) { return checked(t, argument, sizes_of(t), t.scalar_type(), t.device()); }

Tensor indices(const Tensor& like, int64_t x, int64_t y, int64_t z, int64_t threads) {
    const CudaDevice device(like);
    const Tensor out = zeros(device, {z, y, x, threads, 8}, ScalarType::Long);
    test::indices(x, y, z, static_cast<int>(threads), mutable_pointer<int64_t>(out), device.stream());
    return out;
}

void launch_nothing(const Tensor& like, int64_t x, int64_t y, int64_t z, int64_t threads, int64_t shared_bytes) {
    test::nothing(x, y, z, static_cast<int>(threads), shared_bytes, CudaDevice(like).stream());
}

template <typename T>
void move_numbers(const T* in, int64_t every, T* out, int64_t n, int64_t numbers, cuda::Stream stream) {
    check(n % numbers == 0, "x must hold a multiple of ", numbers, " numbers, got ", n);
    if (numbers == 1) return test::move<T, 1>(in, every, out, n, stream);
    if (numbers == 2) return test::move<T, 2>(in, every, out, n, stream);
    if constexpr (sizeof(T) <= 4) {
        if (numbers == 4) return test::move<T, 4>(in, every, out, n, stream);
    }
    if constexpr (sizeof(T) == 2) {
        if (numbers == 8) return test::move<T, 8>(in, every, out, n, stream);
    }
    check(false, "numbers must be a power of two of at most 16 bytes, got ", numbers);
}

Tensor move(const Tensor& x, int64_t numbers, int64_t every) {
    const CudaDevice device(x);
    const Tensor in = dense(x, "x"), out = zeros(device, sizes_of(x), x.scalar_type());
    with_storage_type(x.scalar_type(), "x", [&]<typename T>(T) {
        if constexpr (std::is_same_v<T, Half>) {
            check(false, "x must not be float16");
        } else {
            move_numbers(pointer<T>(in), every, mutable_pointer<T>(out), in.numel(), numbers, device.stream());
        }
    });
    return out;
}

Tensor part(const Tensor& like, const OptionalTensor& x, int64_t x_numbers, int64_t offset, int64_t numbers, bool of_part) {
    const CudaDevice device(like);
    const OptionalTensor in = checked(x, "x", {x_numbers}, ScalarType::Float, like.device());
    const Tensor out = zeros(device, {std::max<int64_t>(numbers, 0)}, ScalarType::Float);
    test::part(pointer<float>(in), x_numbers, offset, numbers, of_part, mutable_pointer<float>(out), device.stream());
    return out;
}

Tensor copy_in_groups(const Tensor& x) {
    const CudaDevice device(x);
    const Tensor in = dense(x, "x"), out = zeros(device, sizes_of(x), x.scalar_type());
    with_floating_type(x.scalar_type(), "x", [&]<typename T>(T) {
        test::copy_in_groups(pointer<T>(in), mutable_pointer<T>(out), static_cast<int>(in.numel()), device.stream());
    });
    return out;
}

Tensor reverse(const Tensor& x) {
    const int64_t blocks = x.size(0), threads = x.size(1) / 4;
    const CudaDevice device(x);
    const Tensor in = checked(x, "x", {blocks, 4 * threads}, ScalarType::Float, x.device());
    const Tensor out = zeros(device, sizes_of(x), ScalarType::Float);
    test::reverse(pointer<float>(in), mutable_pointer<float>(out), blocks, static_cast<int>(threads), device.stream());
    return out;
}

Tensor shuffle(const Tensor& x, int64_t lane_mask) {
    const CudaDevice device(x);
    const Tensor in = checked(x, "x", {32}, x.scalar_type(), x.device()), out = zeros(device, {32}, x.scalar_type());
    const auto run = [&]<typename T>(T) {
        test::shuffle(pointer<T>(in), mutable_pointer<T>(out), static_cast<int>(lane_mask), device.stream());
    };
    if (x.scalar_type() == ScalarType::Int) {
        run(int32_t{});
    } else if (x.scalar_type() == ScalarType::Long) {
        run(int64_t{});
    } else {
        with_floating_type(x.scalar_type(), "x", run);
    }
    return out;
}

Tensor mma(const Tensor& a, const Tensor& b, const Tensor& d) {
    const CudaDevice device(a);
    const ScalarType dtype = a.scalar_type();
    const int64_t depth = dtype == ScalarType::Float ? 8 : 16;
    const Tensor dense_a = checked(a, "a", {16, depth}, dtype, a.device()),
                 dense_b = checked(b, "b", {depth, 8}, dtype, a.device());
    const Tensor sums = torch::stable::clone(checked(d, "d", {16, 8}, ScalarType::Float, a.device()));
    with_storage_type(dtype, "a", [&]<typename T>(T) {
        if constexpr (std::is_same_v<T, double>) {
            check(false, "a must not be float64");
        } else {
            test::mma(pointer<T>(dense_a), pointer<T>(dense_b), mutable_pointer<float>(sums), device.stream());
        }
    });
    return sums;
}

Tensor apply(const std::string& function, const Tensor& x, const OptionalTensor& x2) {
    const std::map<std::string, Function> functions = {{"exp_approx", Function::exp_approx},
                                                       {"exp_exact", Function::exp_exact},
                                                       {"tanh_exact", Function::tanh_exact},
                                                       {"to_tf32", Function::to_tf32},
                                                       {"divide_approx", Function::divide_approx}};
    const auto found = functions.find(function);
    check(found != functions.end(), "there is no function ", function);
    const CudaDevice device(x);
    const Tensor in = dense(x, "x"), out = zeros(device, sizes_of(x), x.scalar_type());
    const OptionalTensor in2 = checked(x2, "x2", sizes_of(x), x.scalar_type(), x.device());
    with_floating_type(x.scalar_type(), "x", [&]<typename T>(T) {
        test::apply(found->second, pointer<T>(in), pointer<T>(in2), mutable_pointer<T>(out), in.numel(), device.stream());
    });
    return out;
}

// Calls f with a value of the 16-bit format that is asked for.
template <typename F>
void with_16_bits(bool bfloat16, const F& f) {
    bfloat16 ? f(BFloat16{}) : f(Half{});
}

Tensor to_compute(const Tensor& x) {
    const CudaDevice device(x);
    const Tensor in = dense(x, "x"), out = zeros(device, sizes_of(x), ScalarType::Float);
    with_16_bits(x.scalar_type() == ScalarType::BFloat16, [&]<typename S>(S) {
        test::to_compute(pointer<S>(in), mutable_pointer<float>(out), in.numel(), device.stream());
    });
    return out;
}

Tensor to_storage(const Tensor& x, bool to_bfloat16) {
    const CudaDevice device(x);
    const Tensor in = checked(x, "x", sizes_of(x), ScalarType::Float, x.device());
    const Tensor out = zeros(device, sizes_of(x), to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Half);
    with_16_bits(to_bfloat16, [&]<typename S>(S) {
        test::to_storage(pointer<float>(in), mutable_pointer<S>(out), in.numel(), device.stream());
    });
    return out;
}

void require_not_negative(const Tensor& x) {
    const Tensor in = checked(x, "x", sizes_of(x), ScalarType::Long, x.device());
    test::require_not_negative(pointer<int64_t>(in), in.numel(), CudaDevice(x).stream());
}

// x, int64 as uint64, sorted by some of its bits.
Tensor sort_words(const Tensor& x, int64_t begin_bit, int64_t end_bit) {
    const CudaDevice device(x);
    const Tensor in = checked(x, "x", sizes_of(x), ScalarType::Long, x.device());
    const Tensor words = torch::stable::clone(in), other = zeros(device, sizes_of(x), ScalarType::Long);
    const int begin = static_cast<int>(begin_bit), end = static_cast<int>(end_bit);
    const int64_t n = in.numel(), bytes = cuda::sort_workspace(n, begin, end);
    const Tensor workspace = device.empty({bytes}, ScalarType::Byte);
    const auto data = [](const Tensor& t) { return mutable_pointer<uint64_t>(t); };
    return cuda::sort_words(device.stream(), data(words), data(other), n, begin, end, workspace.mutable_data_ptr(), bytes) ==
                   data(words)
               ? words
               : other;
}

}  // namespace

STABLE_TORCH_LIBRARY(dien_ops_test, m) {
    m.def("indices(Tensor like, int x, int y, int z, int threads) -> Tensor");
    m.def("launch_nothing(Tensor like, int x, int y, int z, int threads, int shared_bytes) -> ()");
    m.def("move(Tensor x, int numbers, int every) -> Tensor");
    m.def("part(Tensor like, Tensor? x, int x_numbers, int offset, int numbers, bool of_part) -> Tensor");
    m.def("copy_in_groups(Tensor x) -> Tensor");
    m.def("reverse(Tensor x) -> Tensor");
    m.def("shuffle(Tensor x, int lane_mask) -> Tensor");
    m.def("mma(Tensor a, Tensor b, Tensor d) -> Tensor");
    m.def("apply(str function, Tensor x, Tensor? x2) -> Tensor");
    m.def("to_compute(Tensor x) -> Tensor");
    m.def("to_storage(Tensor x, bool to_bfloat16) -> Tensor");
    m.def("require_not_negative(Tensor x) -> ()");
    m.def("sort_words(Tensor x, int begin_bit, int end_bit) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dien_ops_test, DIEN_OPS_CUDA_KEY, m) {
    m.impl("indices", TORCH_BOX(&indices));
    m.impl("launch_nothing", TORCH_BOX(&launch_nothing));
    m.impl("move", TORCH_BOX(&move));
    m.impl("part", TORCH_BOX(&part));
    m.impl("copy_in_groups", TORCH_BOX(&copy_in_groups));
    m.impl("reverse", TORCH_BOX(&reverse));
    m.impl("shuffle", TORCH_BOX(&shuffle));
    m.impl("mma", TORCH_BOX(&mma));
    m.impl("apply", TORCH_BOX(&apply));
    m.impl("to_compute", TORCH_BOX(&to_compute));
    m.impl("to_storage", TORCH_BOX(&to_storage));
    m.impl("require_not_negative", TORCH_BOX(&require_not_negative));
    m.impl("sort_words", TORCH_BOX(&sort_words));
}

}  // namespace dien_ops::ops
