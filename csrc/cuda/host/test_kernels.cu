// SPDX-License-Identifier: Apache-2.0
// The recurrent kernel has the shape of the package's own: a block takes 16 rows through all steps; the state stays in shared
// memory, in two buffers that take turns; x of the next step is on its way while this one computes; warp w owns columns
// 8w..8w+7 of the state and writes them out in vectors, by way of 16 x 8 numbers of its own. One barrier a step parts the
// writes of a state, and the reads of the buffers that are written next, from what follows.
#include "cuda/host/test_kernels.h"

#include "cuda/launch.cuh"

namespace dien_ops::cuda::test {
namespace {

constexpr int kRows = 16, kColumns = 8;  // of a block, of a warp
constexpr int kLargestState = 64;

struct RecurrentBuffers {
    int64_t B, T;
    int H;
    gmem<const float> x, u, h0;
    gmem<float> y, h_n;
};

DIEN_OPS_KERNEL(kLargestState / kColumns * kWarp) void recurrent_kernel(RecurrentBuffers p, Bug bug) {
    const int H = p.H, state = kRows * H;
    Arena arena;
    const view<float> u = arena.take<float>(H * H, "u");
    const view<float> h = arena.take<float>(2 * state, "h");
    const view<float> x = arena.take<float>(2 * state, "x");
    const view<float> out = arena.take<float>(block_warps() * kRows * kColumns, "out");

    const int64_t first_row = block_index() * kRows;
    const int rows = static_cast<int>(p.B - first_row < kRows ? p.B - first_row : kRows);
    const int column = warp_index() * kColumns, g = lane_index() / 4, q = lane_index() % 4;
    if (bug == Bug::exited_thread && warp_index() >= rows) return;

    const auto prefetch = [&](int64_t t) {
        if (t < p.T) {
            for (int i = 4 * thread_index(); i < rows * H; i += 4 * block_threads()) {
                copy_async16(x, static_cast<int>(t % 2) * state + i, p.x, (t * p.B + first_row) * H + i);
            }
        }
        copy_async_commit();
    };

    for (int i = thread_index(); i < H * H; i += block_threads()) u.st(i, to_tf32(p.u.ld(i)));
    for (int i = thread_index(); i < state; i += block_threads()) {
        const bool in_batch = i / H < rows;
        if (bug != Bug::unwritten_shared || i / H < kRows / 2) {
            h.st(i, (p.h0 || bug == Bug::absent_buffer) && in_batch ? p.h0.ld(first_row * H + i) : 0.0f);
        }
        if (!in_batch) {  // no copy writes these
            x.st(i, 0.0f);
            x.st(state + i, 0.0f);
        }
    }
    prefetch(0);
    for (int64_t t = 0; t < p.T; ++t) {
        if (bug == Bug::prefetch_before_barrier) {
            prefetch(t + 1);
            copy_async_wait<1>();
        } else if (bug != Bug::wait_after_barrier && bug != Bug::missing_wait) {
            copy_async_wait<0>();
        }
        if (bug == Bug::divergent_barrier && warp_index() == 0) {
            sync_block();
        } else if (bug != Bug::missing_step_barrier || t == 0) {
            sync_block();
        }
        if (bug == Bug::wait_after_barrier) copy_async_wait<0>();
        if (bug != Bug::prefetch_before_barrier) prefetch(t + 1);

        const int now = static_cast<int>(t % 2) * state;
        const int old = bug == Bug::single_buffered_state ? 0 : now;
        const int next = bug == Bug::single_buffered_state ? 0 : state - now;
        const int past_the_end = bug == Bug::out_of_range_shared ? 2 * state - 1 : 0;
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = x.ld(now + (g + i / 2 * 8) * H + column + 2 * q + i % 2);
        for (int k = 0; k < H; k += 8) {
            float a[4], b[2];
            for (int i = 0; i < 4; ++i) {
                const float value = h.ld(old + (g + i % 2 * 8) * H + k + q + i / 2 * 4 + past_the_end);
                a[i] = bug == Bug::unrounded_operands ? value : to_tf32(value);
            }
            for (int i = 0; i < 2; ++i) b[i] = u.ld((column + g) * H + k + q + i * 4);
            mma_m16n8k8_tf32(d, a, b);
        }
        const view<float> mine = out.sub(warp_index() * kRows * kColumns, kRows * kColumns);
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, offset = 2 * q + i % 2;
            const float value = tanh_exact(d[i]);
            h.st(next + row * H + column + offset, value);
            mine.st(row * kColumns + offset, value);
        }
        if (bug != Bug::missing_syncwarp) sync_warp();
        const int row = lane_index() / 2, half = lane_index() % 2 * 4;
        const int from = row * kColumns + half + (bug == Bug::misaligned_vector ? -half / 4 : 0);
        const auto four = mine.ld_as<Pack<float, 4>>(from);
        if (row < rows || bug == Bug::out_of_range_global) {
            p.y.st_as((t * p.B + first_row + row) * H + column + half, four);
        }
        if (t == p.T - 1 && row < rows) {
            const int64_t to = (bug == Bug::race_between_blocks ? row : first_row + row) * H;
            p.h_n.st_as(to + (bug == Bug::race_over_global ? 0 : column) + half, four);
        }
    }
}

// Races on purpose: for runs without checks.
DIEN_OPS_KERNEL(1024) void turns_kernel(gmem<int64_t> count, gmem<int64_t> out) {
    sync_block();
    const int64_t turn = count.ld(0);
    count.st(0, turn + 1);
    out.st(turn, block_index() * block_threads() + thread_index());
}

DIEN_OPS_KERNEL(1024) void perform_kernel(gmem<const int64_t> steps, gmem<float> numbers, gmem<Half> halves) {
    Arena arena;
    const view<float> shared = arena.take<float>(static_cast<int>(numbers.n), "shared");
    for (int64_t i = 0; i < steps.n; i += 4) {
        const auto step = steps.ld_as<Pack<int64_t, 2>>(i), what = steps.ld_as<Pack<int64_t, 2>>(i + 2);
        const bool is_mine = step.v[1] == thread_index();
        const auto action = static_cast<Action>(what.v[0]);
        const int64_t number = what.v[1];
        if (step.v[0] != block_index()) continue;
        if (action == Action::sync_block) sync_block();
        if (action == Action::sync_warp && step.v[1] / kWarp == warp_index()) sync_warp();
        if (!is_mine) continue;
        if (action == Action::read_shared) shared.ld(static_cast<int>(number));
        if (action == Action::write_shared) shared.st(static_cast<int>(number), 1.0f);
        if (action == Action::read_global) numbers.ld(number);
        if (action == Action::write_global) numbers.st(number, 1.0f);
        if (action == Action::write_half) halves.st(number, Half{0});
        if (action == Action::copy || action == Action::copy_uncommitted) {
            copy_async16(shared, static_cast<int>(number), numbers, number);
        }
        if (action == Action::copy) copy_async_commit();
        if (action == Action::wait) copy_async_wait<0>();
        if (action == Action::wait_for_all_but_one) copy_async_wait<1>();
        if (action == Action::lone_sync_warp) sync_warp();
        if (action == Action::lone_sync_block) sync_block();
        if (action == Action::leave) return;
    }
}

DIEN_OPS_KERNEL(32) void take_kernel(int numbers) {
    Arena arena;
    const view<float> taken = arena.take<float>(numbers, "taken");
    taken.st(lane_index(), 1.0f);
}

}  // namespace

void recurrent(const Recurrent& p, Bug bug, Stream stream) {
    const RecurrentBuffers buffers = {p.B,
                                      p.T,
                                      static_cast<int>(p.H),
                                      {p.x, p.T * p.B * p.H, "x"},
                                      {p.u, p.H * p.H, "u"},
                                      {p.h0, p.B * p.H, "h0"},
                                      {p.y, p.T * p.B * p.H, "y"},
                                      {p.h_n, p.B * p.H, "h_n"}};
    const int64_t shared_bytes =
        arena_bytes<float>(p.H * p.H) + 2 * arena_bytes<float>(2 * kRows * p.H) + arena_bytes<float>(kRows * p.H);
    launch("recurrent", recurrent_kernel,
           {.x = (p.B + kRows - 1) / kRows, .threads = static_cast<int>(p.H) / kColumns * kWarp, .shared_bytes = shared_bytes},
           stream, buffers, bug);
}

void turns(int64_t blocks, int threads, int64_t* count, int64_t* out, Stream stream) {
    launch("turns", turns_kernel, {.x = blocks, .threads = threads}, stream, {count, 1, "count"},
           {out, blocks * threads, "out"});
}

void perform(const int64_t* steps, int64_t count, float* numbers, int64_t n, int64_t blocks, int threads, Stream stream) {
    launch("perform", perform_kernel, {.x = blocks, .threads = threads, .shared_bytes = arena_bytes<float>(n)}, stream,
           {steps, 4 * count, "steps"}, {numbers, n, "numbers"}, {reinterpret_cast<Half*>(numbers), 2 * n, "halves"});
}

void take(int numbers, int64_t shared_bytes, Stream stream) {
    launch("take", take_kernel, {.threads = kWarp, .shared_bytes = shared_bytes}, stream, numbers);
}

}  // namespace dien_ops::cuda::test
