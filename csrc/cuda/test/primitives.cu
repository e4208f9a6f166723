// SPDX-License-Identifier: Apache-2.0
// Each kernel is one primitive, or the few that only make sense together, between loads and stores of global memory.
#include "cuda/test/primitives.h"

#include "cuda/launch.cuh"

namespace dien_ops::cuda::test {
namespace {

constexpr int kElementThreads = 64;
constexpr int kBefore = 3;

DIEN_OPS_KERNEL(1024) void indices_kernel(gmem<int64_t> out, int64_t y_blocks) {
    const int64_t block = (block_index_z() * y_blocks + block_index_y()) * grid_blocks() + block_index();
    const int64_t values[] = {thread_index(), block_threads(), lane_index(),    warp_index(),
                              block_warps(),  block_index(),   block_index_y(), block_index_z()};
    for (int i = 0; i < 8; ++i) out.st((block * block_threads() + thread_index()) * 8 + i, values[i]);
}

DIEN_OPS_KERNEL(1024) void nothing_kernel() {}

template <typename T, int kNumbers>
DIEN_OPS_KERNEL(kElementThreads)
void move_kernel(gmem<const T> in, int64_t every, gmem<T> out) {
    using V = Pack<T, kNumbers>;
    Arena arena;
    const view<T> staged = arena.take<T>(kElementThreads * kNumbers, "staged");
    const int64_t i = (block_index() * block_threads() + thread_index()) * kNumbers;
    const int mine = thread_index() * kNumbers, other = (thread_index() ^ 1) * kNumbers;
    if (every == 1) {
        if (i < in.n) staged.template st_as<V>(mine, in.template ld_as<V>(i));
    } else {
        staged.template st_as<V>(mine, keep_whole(in.template ld_if<V>(i < in.n && i / kNumbers % every == 0, i)));
    }
    sync_warp();
    const int64_t j = i - mine + other;
    if (j < in.n) out.template st_as<V>(j, staged.template ld_as<V>(other));
}

DIEN_OPS_KERNEL(kWarp) void part_kernel(gmem<const float> in, gmem<float> out, int64_t offset, int64_t n) {
    const gmem<const float> part = in.sub(offset, n);
    if (!part) return;
    for (int64_t i = lane_index(); i < n; i += kWarp) out.st(i, part.ld(i));
}

template <typename T>
DIEN_OPS_KERNEL(kWarp)
void copy_in_groups_kernel(gmem<const T> in, gmem<T> out) {
    constexpr int kNumbers = 16 / sizeof(T);
    const int n = static_cast<int>(in.n), step = kWarp * kNumbers, first = lane_index() * kNumbers;
    Arena arena;
    const view<T> staged = arena.take<T>(n, "staged");
    for (int i = first; i - first < n; i += step) {
        if (i < n) copy_async16(staged, i, in, i);
        copy_async_commit();
    }
    const auto write = [&](int i) {
        if (i < n) out.template st_as<Pack<T, kNumbers>>(i, staged.template ld_as<Pack<T, kNumbers>>(i));
    };
    const int last = (n - 1) / step * step + first;
    copy_async_wait<1>();
    for (int i = first; i < last; i += step) write(i);
    copy_async_wait<0>();
    write(last);
}

DIEN_OPS_KERNEL(1024) void reverse_kernel(gmem<const float> in, gmem<float> out) {
    const int n = 4 * block_threads(), i = 4 * thread_index();
    const int64_t first = block_index() * n;
    Arena arena;
    arena.take<Half>(kBefore, "before");  // what comes after it begins on a boundary of its own
    const view<float> staged = arena.take<float>(4 + n, "staged").sub(4, n);
    copy_async16(staged, i, in, first + i);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    for (int j = thread_index(); j < n; j += block_threads()) out.st(first + j, staged.ld(n - 1 - j));
}

template <typename T>
DIEN_OPS_KERNEL(kWarp)
void shuffle_kernel(gmem<const T> in, gmem<T> out, int lane_mask) {
    out.st(lane_index(), shuffle_xor(in.ld(lane_index()), lane_mask));
}

template <typename T>
DIEN_OPS_KERNEL(kWarp)
void mma_kernel(gmem<const T> a, gmem<const T> b, gmem<float> d) {
    const int g = lane_index() / 4, q = lane_index() % 4;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = d.ld((g + i / 2 * 8) * 8 + 2 * q + i % 2);
    if constexpr (std::is_same_v<T, float>) {
        const float of_a[4] = {a.ld(g * 8 + q), a.ld((g + 8) * 8 + q), a.ld(g * 8 + q + 4), a.ld((g + 8) * 8 + q + 4)};
        const float of_b[2] = {b.ld(q * 8 + g), b.ld((q + 4) * 8 + g)};
        mma_m16n8k8_tf32(sums, of_a, of_b);
    } else {
        const auto pair = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
        const auto pair_of_a = [&](int row, int column) { return a.template ld_as<uint32_t>(row * 16 + column); };
        const auto pair_of_b = [&](int row, int column) { return pair(b.ld(row * 8 + column), b.ld((row + 1) * 8 + column)); };
        const uint32_t of_a[4] = {pair_of_a(g, 2 * q), pair_of_a(g + 8, 2 * q), pair_of_a(g, 2 * q + 8),
                                  pair_of_a(g + 8, 2 * q + 8)};
        const uint32_t of_b[2] = {pair_of_b(2 * q, g), pair_of_b(2 * q + 8, g)};
        mma_m16n8k16<T>(sums, of_a, of_b);
    }
    for (int i = 0; i < 4; ++i) d.st((g + i / 2 * 8) * 8 + 2 * q + i % 2, sums[i]);
}

template <typename F, typename In, typename Out>
DIEN_OPS_KERNEL(kElementThreads)
void elements_kernel(F f, gmem<const In> in, gmem<const In> in2, gmem<Out> out) {
    const int64_t i = block_index() * block_threads() + thread_index();
    if (i < in.n) out.st(i, f(in.ld(i), in2 ? in2.ld(i) : In{}));
}

template <typename F, typename In, typename Out>
void launch_elements(F f, const In* in, const In* in2, Out* out, int64_t n, Stream stream) {
    launch("elements", elements_kernel<F, In, Out>,
           {.x = (n + kElementThreads - 1) / kElementThreads, .threads = kElementThreads}, stream, f,
           gmem<const In>(in, n, "in"), gmem<const In>(in2, n, "in2"), gmem<Out>(out, n, "out"));
}

struct ExpApprox {
    DIEN_OPS_DEVICE float operator()(float x, float) const { return exp_approx(x); }
};
struct DivideApprox {
    DIEN_OPS_DEVICE float operator()(float a, float b) const { return divide_approx(a, b); }
};
struct ToTf32 {
    DIEN_OPS_DEVICE float operator()(float x, float) const { return to_tf32(x); }
};
template <typename T>
struct ExpExact {
    DIEN_OPS_DEVICE T operator()(T x, T) const { return exp_exact(x); }
};
template <typename T>
struct TanhExact {
    DIEN_OPS_DEVICE T operator()(T x, T) const { return tanh_exact(x); }
};
template <typename S>
struct ToCompute {
    DIEN_OPS_DEVICE float operator()(S x, S) const { return cuda::to_compute(x); }
};
template <typename S>
struct ToStorage {
    DIEN_OPS_DEVICE S operator()(float x, float) const { return cuda::to_storage<S>(x); }
};

// stack allowed: 24 bytes (the message of require)
DIEN_OPS_KERNEL(kElementThreads) void require_not_negative_kernel(gmem<const int64_t> in) {
    const int64_t i = block_index() * block_threads() + thread_index();
    if (i >= in.n) return;
    const int64_t x = in.ld(i);
    require(x >= 0, "numbers must not be negative: got %lld, half of it is %g, at row %lld", x, double(x) / 2, i);
}

}  // namespace

void indices(int64_t x, int64_t y, int64_t z, int threads, int64_t* out, Stream stream) {
    launch("indices", indices_kernel, {x, y, z, threads}, stream, {out, x * y * z * threads * 8, "out"}, y);
}

void nothing(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes, Stream stream) {
    launch("nothing", nothing_kernel, {x, y, z, threads, shared_bytes}, stream);
}

template <typename T, int kNumbers>
void move(const T* in, int64_t every, T* out, int64_t n, Stream stream) {
    const int64_t of_block = kElementThreads * kNumbers;
    launch("move", move_kernel<T, kNumbers>,
           {.x = (n + of_block - 1) / of_block, .threads = kElementThreads, .shared_bytes = arena_bytes<T>(of_block)}, stream,
           {in, n, "in"}, every, {out, n, "out"});
}

void part(const float* in, int64_t in_n, int64_t offset, int64_t n, bool of_part, float* out, Stream stream) {
    const gmem<const float> whole = {in, in_n, "in"};
    launch("part", part_kernel, {.threads = kWarp}, stream, of_part ? whole.sub(offset, n) : whole, {out, n, "out"},
           of_part ? 0 : offset, n);
}

template <typename T>
void copy_in_groups(const T* in, T* out, int n, Stream stream) {
    launch("copy_in_groups", copy_in_groups_kernel<T>, {.threads = kWarp, .shared_bytes = arena_bytes<T>(n)}, stream,
           {in, n, "in"}, {out, n, "out"});
}

void reverse(const float* in, float* out, int64_t blocks, int threads, Stream stream) {
    const int64_t n = 4 * threads, shared_bytes = arena_bytes<Half>(kBefore) + arena_bytes<float>(4 + n);
    launch("reverse", reverse_kernel, {.x = blocks, .threads = threads, .shared_bytes = shared_bytes}, stream,
           {in, blocks * n, "in"}, {out, blocks * n, "out"});
}

template <typename T>
void shuffle(const T* in, T* out, int lane_mask, Stream stream) {
    launch("shuffle", shuffle_kernel<T>, {.threads = kWarp}, stream, {in, kWarp, "in"}, {out, kWarp, "out"}, lane_mask);
}

template <typename T>
void mma(const T* a, const T* b, float* d, Stream stream) {
    constexpr int64_t kDepth = std::is_same_v<T, float> ? 8 : 16;
    launch("mma", mma_kernel<T>, {.threads = kWarp}, stream, {a, 16 * kDepth, "a"}, {b, kDepth * 8, "b"}, {d, 16 * 8, "d"});
}

template <typename T>
void apply(Function f, const T* in, const T* in2, T* out, int64_t n, Stream stream) {
    if (f == Function::exp_exact) return launch_elements(ExpExact<T>{}, in, in2, out, n, stream);
    if (f == Function::tanh_exact) return launch_elements(TanhExact<T>{}, in, in2, out, n, stream);
    if constexpr (std::is_same_v<T, float>) {
        if (f == Function::exp_approx) return launch_elements(ExpApprox{}, in, in2, out, n, stream);
        if (f == Function::divide_approx) return launch_elements(DivideApprox{}, in, in2, out, n, stream);
        if (f == Function::to_tf32) return launch_elements(ToTf32{}, in, in2, out, n, stream);
    }
    throw std::runtime_error("this function is for float32 only");
}

template <typename S>
void to_compute(const S* in, float* out, int64_t n, Stream stream) {
    launch_elements(ToCompute<S>{}, in, static_cast<const S*>(nullptr), out, n, stream);
}

template <typename S>
void to_storage(const float* in, S* out, int64_t n, Stream stream) {
    launch_elements(ToStorage<S>{}, in, static_cast<const float*>(nullptr), out, n, stream);
}

void require_not_negative(const int64_t* in, int64_t n, Stream stream) {
    launch("require_not_negative", require_not_negative_kernel,
           {.x = (n + kElementThreads - 1) / kElementThreads, .threads = kElementThreads}, stream, {in, n, "in"});
}

#define MOVES(T)                                                      \
    template void move<T, 1>(const T*, int64_t, T*, int64_t, Stream); \
    template void move<T, 2>(const T*, int64_t, T*, int64_t, Stream); \
    template void copy_in_groups<T>(const T*, T*, int, Stream)
MOVES(BFloat16);
MOVES(float);
MOVES(double);
template void move<BFloat16, 4>(const BFloat16*, int64_t, BFloat16*, int64_t, Stream);
template void move<BFloat16, 8>(const BFloat16*, int64_t, BFloat16*, int64_t, Stream);
template void move<float, 4>(const float*, int64_t, float*, int64_t, Stream);
template void shuffle<float>(const float*, float*, int, Stream);
template void shuffle<double>(const double*, double*, int, Stream);
template void shuffle<int>(const int*, int*, int, Stream);
template void shuffle<int64_t>(const int64_t*, int64_t*, int, Stream);
template void mma<float>(const float*, const float*, float*, Stream);
template void mma<BFloat16>(const BFloat16*, const BFloat16*, float*, Stream);
template void mma<Half>(const Half*, const Half*, float*, Stream);
template void apply<float>(Function, const float*, const float*, float*, int64_t, Stream);
template void apply<double>(Function, const double*, const double*, double*, int64_t, Stream);
template void to_compute<BFloat16>(const BFloat16*, float*, int64_t, Stream);
template void to_compute<Half>(const Half*, float*, int64_t, Stream);
template void to_storage<BFloat16>(const float*, BFloat16*, int64_t, Stream);
template void to_storage<Half>(const float*, Half*, int64_t, Stream);

}  // namespace dien_ops::cuda::test
