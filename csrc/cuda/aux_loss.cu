// SPDX-License-Identifier: Apache-2.0
// L_aux = -(1/N) sum_i sum_t [ log sigma(h_t, e_{t+1}) + log(1 - sigma(h_t, e^_{t+1})) ] (DIEN eq. 6)
//
// With x the logit of the item that was clicked and y that of the sampled one, a pair's loss is softplus(-x) + softplus(y), as
// on the CPU: no sigmoid can saturate. The floor is memory: the forward reads three [B, T, H] tensors once, the backward reads
// and writes three; for B1024 T100 H128 in float32 157 MB, 47 us of an H100's 3.35 TB/s, and twice that.
//
// The pairs of the batch stand one behind the other, and a block takes some of them, whichever sequences they are of. The lanes
// of a row (rows.cuh) take a pair: they load state and items once, and their two inner products, which one shuffle tree sums,
// stay in registers until they are logits and losses. Four pairs per lane are on their way at a time. Padding is not read.
//
// A block adds its losses in double and leaves the sum in memory of its own; one block more adds these, in order, and divides.
// The number of pairs for the reduction "mean" is counted by that block from the lengths: nobody waits for the device. The same
// inputs give the same bits.
#include "cuda/aux_loss.h"

#include "common/softplus.h"
#include "cuda/rows.cuh"

namespace dien_ops::cuda {
namespace {

constexpr int kPairsPerLane = 4;  // at a time

// AuxiliaryPairs on the device.
struct Pairs {
    gmem<const int64_t> lengths;
    int64_t batch, steps, pairs;
    double denominator;

    explicit Pairs(const AuxiliaryPairs& p)
        : lengths(p.lengths, p.batch, "lengths"),
          batch(p.batch),
          steps(p.steps),
          pairs(p.pairs()),
          denominator(p.denominator) {}
    DIEN_OPS_DEVICE bool valid(int64_t b, int64_t pair) const { return pair + 1 < (lengths ? lengths.ld(b) : steps); }
    // Where the logits of a pair's two items lie.
    DIEN_OPS_DEVICE int64_t clicked(int64_t b, int64_t pair) const { return 2 * b * pairs + pair; }
    DIEN_OPS_DEVICE int64_t sampled(int64_t b, int64_t pair) const { return clicked(b, pair) + pairs; }
};

template <typename T>
DIEN_OPS_DEVICE T softplus(T x) {
    const bool positive = x > T(0);
    return (positive ? x : T(0)) + log1p_of_fraction<T>(exp_exact(positive ? -x : x));
}

template <typename T>
DIEN_OPS_DEVICE T sigmoid(T x) {
    return T(1) / (T(1) + exp_exact(-x));
}

// The sum over the block's threads, in an order of its own; each of them has it. sums: one number of each warp.
template <typename T>
DIEN_OPS_DEVICE T block_sum(T x, const view<T>& sums) {
    x = warp_sum(x);
    if (lane_index() == 0) sums.st(warp_index(), x);
    sync_block();
    T total = 0;
    for (int warp = 0; warp < block_warps(); ++warp) total += sums.ld(warp);
    return total;
}

template <typename T>
constexpr int64_t block_sum_bytes() {
    return arena_bytes<T>(kElementThreads / kWarp);
}

// What the sum over the pairs is divided by, for every thread of the block. counts: one number of each warp.
DIEN_OPS_DEVICE double denominator(const Pairs& p, const view<int64_t>& counts) {
    if (p.denominator > 0) return p.denominator;  // the whole block
    int64_t count = 0;
    for (int64_t b = thread_index(); b < p.batch; b += kElementThreads) {
        const int64_t length = p.lengths ? p.lengths.ld(b) : p.steps;
        count += length > 1 ? length - 1 : 0;
    }
    count = block_sum(count, counts);
    return count > 1 ? static_cast<double>(count) : 1.0;
}

// One block: loss = the sum of parts, divided.
template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void divide_loss(Pairs p, gmem<const double> parts, gmem<T> loss) {
    Arena arena;
    const auto sums = arena.take<double>(kElementThreads / kWarp, "warps' sums");
    const auto counts = arena.take<int64_t>(kElementThreads / kWarp, "warps' counts");
    double sum = 0;
#pragma unroll 4
    for (int64_t i = thread_index(); i < parts.n; i += kElementThreads) sum += parts.ld(i);
    const double total = block_sum(sum, sums), divisor = denominator(p, counts);
    if (thread_index() == 0) loss.st(0, static_cast<T>(total / divisor));
}

// One block: scale = grad_loss, divided.
template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void divide_gradient(Pairs p, gmem<const T> grad_loss, gmem<T> scale) {
    Arena arena;
    const auto counts = arena.take<int64_t>(kElementThreads / kWarp, "warps' counts");
    const double divisor = denominator(p, counts);
    if (thread_index() == 0) scale.st(0, static_cast<T>(grad_loss.ld(0) / divisor));
}

// ---------------------------------------------------------------------------------------------------- inner products

template <typename S>
struct Sequences {
    gmem<const S> states, positives, negatives;

    explicit Sequences(const AuxiliarySequences<S>& p)
        : states(p.states, p.batch * p.steps * p.width, "states"),
          positives(p.positives, states.n, "positives"),
          negatives(p.negatives, states.n, "negatives") {}
};

template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void inner_loss(Pairs p, Sequences<S> s, RowLanes rows, gmem<Compute<S>> logits, gmem<double> parts) {
    using T = Compute<S>;
    Arena arena;
    const auto sums = arena.take<double>(kElementThreads / kWarp, "warps' sums");
    int64_t state[kPairsPerLane];  // the first number of the pair's state, or -1: no valid pair
    T clicked[kPairsPerLane] = {}, sampled[kPairsPerLane] = {};
    const int64_t first = block_index() * kPairsPerLane * rows.groups() + rows.group();
#pragma unroll
    for (int r = 0; r < kPairsPerLane; ++r) {
        const int64_t i = first + r * rows.groups(), b = i / p.pairs, pair = i % p.pairs;
        state[r] = b < p.batch && p.valid(b, pair) ? (b * p.steps + pair) * rows.width : -1;
    }
    for (int pass = 0; pass < rows.passes; ++pass) {
        const int column = rows.column<S>(pass), count = rows.count<S>(column);
        Chunk<S> h[kPairsPerLane], e[kPairsPerLane], e_hat[kPairsPerLane];
#pragma unroll
        for (int r = 0; r < kPairsPerLane; ++r) {
            const int64_t from = state[r] + column, item = from + rows.width;
            const int present = state[r] >= 0 ? count : 0;
            h[r] = load_chunk(s.states, from, present, rows.whole);
            e[r] = load_chunk(s.positives, item, present, rows.whole);
            e_hat[r] = load_chunk(s.negatives, item, present, rows.whole);
        }
#pragma unroll
        for (int r = 0; r < kPairsPerLane; ++r) {
#pragma unroll
            for (int k = 0; k < kChunk<S>; ++k) {
                clicked[r] += to_compute(h[r].v[k]) * to_compute(e[r].v[k]);
                sampled[r] += to_compute(h[r].v[k]) * to_compute(e_hat[r].v[k]);
            }
        }
    }

    // Of a row's lanes, the first has the clicked item's logit and loss, the second the sampled one's.
    const bool of_clicked = rows.lane() == 0;
    double loss = 0;
#pragma unroll
    for (int r = 0; r < kPairsPerLane; ++r) {
        const T x = row_sum(clicked[r], rows.lanes), y = row_sum(sampled[r], rows.lanes);
        const int64_t i = first + r * rows.groups(), b = i / p.pairs, pair = i % p.pairs;
        if (b < p.batch && rows.lane() < 2) {
            logits.st(of_clicked ? p.clicked(b, pair) : p.sampled(b, pair), of_clicked ? x : y);
            if (state[r] >= 0) loss += softplus(of_clicked ? -x : y);
        }
    }
    const double total = block_sum(loss, sums);
    if (thread_index() == 0) parts.st(block_index(), total);
}

// A row of lanes takes state t and item t + 1 of a sequence, with the last state its first item: neither is of a pair.
template <typename S>
DIEN_OPS_KERNEL(kElementThreads)
void inner_loss_backward(Pairs p, Sequences<S> s, RowLanes rows, gmem<const Compute<S>> logits, gmem<const Compute<S>> scale,
                         gmem<S> grad_states, gmem<S> grad_positives, gmem<S> grad_negatives) {
    using T = Compute<S>;
    int64_t state[kPairsPerLane], item[kPairsPerLane];  // their first numbers; -1: there is none
    T grad_x[kPairsPerLane] = {}, grad_y[kPairsPerLane] = {};
    bool valid[kPairsPerLane];
    const int64_t first = block_index() * kPairsPerLane * rows.groups() + rows.group();
    const T factor = scale.ld(0);
#pragma unroll
    for (int r = 0; r < kPairsPerLane; ++r) {
        const int64_t i = first + r * rows.groups(), b = i / p.steps, t = i % p.steps;
        const bool present = b < p.batch;
        state[r] = present ? i * rows.width : -1;
        item[r] = (t + 1 < p.steps ? i + 1 : i - t) * rows.width;
        valid[r] = present && p.valid(b, t);
        if (valid[r]) {
            grad_x[r] = -factor * sigmoid(-logits.ld(p.clicked(b, t)));
            grad_y[r] = factor * sigmoid(logits.ld(p.sampled(b, t)));
        }
    }
    for (int pass = 0; pass < rows.passes; ++pass) {
        const int column = rows.column<S>(pass), count = rows.count<S>(column);
        Chunk<S> h[kPairsPerLane], e[kPairsPerLane], e_hat[kPairsPerLane];
#pragma unroll
        for (int r = 0; r < kPairsPerLane; ++r) {
            const int present = valid[r] ? count : 0;
            h[r] = load_chunk(s.states, state[r] + column, present, rows.whole);
            e[r] = load_chunk(s.positives, item[r] + column, present, rows.whole);
            e_hat[r] = load_chunk(s.negatives, item[r] + column, present, rows.whole);
        }
#pragma unroll
        for (int r = 0; r < kPairsPerLane; ++r) {
            T grad_h[kChunk<S>], grad_e[kChunk<S>], grad_e_hat[kChunk<S>];
#pragma unroll
            for (int k = 0; k < kChunk<S>; ++k) {
                grad_h[k] = grad_x[r] * to_compute(e[r].v[k]) + grad_y[r] * to_compute(e_hat[r].v[k]);
                grad_e[k] = grad_x[r] * to_compute(h[r].v[k]);
                grad_e_hat[k] = grad_y[r] * to_compute(h[r].v[k]);
            }
            const int present = state[r] >= 0 ? count : 0;
            store_chunk(grad_states, state[r] + column, present, rows.whole, grad_h);
            store_chunk(grad_positives, item[r] + column, present, rows.whole, grad_e);
            store_chunk(grad_negatives, item[r] + column, present, rows.whole, grad_e_hat);
        }
    }
}

// --------------------------------------------------------------------------------------------------- any scorer's logits

template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void loss_of_logits(Pairs p, gmem<const T> logits, gmem<double> parts) {
    Arena arena;
    const auto sums = arena.take<double>(kElementThreads / kWarp, "warps' sums");
    const int64_t b = element_index() / p.pairs, pair = element_index() % p.pairs;
    double loss = 0;
    if (b < p.batch && p.valid(b, pair)) {
        loss += softplus(-logits.ld(p.clicked(b, pair)));
        loss += softplus(logits.ld(p.sampled(b, pair)));
    }
    const double total = block_sum(loss, sums);
    if (thread_index() == 0) parts.st(block_index(), total);
}

template <typename T>
DIEN_OPS_KERNEL(kElementThreads)
void loss_of_logits_backward(Pairs p, gmem<const T> logits, gmem<const T> scale, gmem<T> grad_logits) {
    const int64_t b = element_index() / p.pairs, pair = element_index() % p.pairs;
    if (b >= p.batch) return;
    const bool valid = p.valid(b, pair);
    const int64_t clicked = p.clicked(b, pair), sampled = p.sampled(b, pair);
    grad_logits.st(clicked, valid ? -scale.ld(0) * sigmoid(-logits.ld(clicked)) : T(0));
    grad_logits.st(sampled, valid ? scale.ld(0) * sigmoid(logits.ld(sampled)) : T(0));
}

// ------------------------------------------------------------------------------------------------------------- launches

// Of `count` rows of lanes.
Grid row_grid(const RowLanes& rows, int64_t count) {
    return {divide_up<int64_t>(count, kElementThreads / rows.lanes * kPairsPerLane), 1, 1, kElementThreads};
}

template <typename S>
Grid inner_grid(const AuxiliarySequences<S>& p) {
    Grid grid = row_grid(row_lanes<S>(p.width, {p.states, p.positives, p.negatives}), p.batch * p.pairs());
    grid.shared_bytes = block_sum_bytes<double>();
    return grid;
}

Grid logits_grid(const AuxiliaryPairs& p) {
    Grid grid = element_grid(p.batch * p.pairs());
    grid.shared_bytes = block_sum_bytes<double>();
    return grid;
}

template <typename T>
gmem<T> logits_of(const AuxiliaryPairs& p, T* logits, const char* name = "logits") {
    return {logits, 2 * p.batch * p.pairs(), name};
}

template <typename T>
void finish_loss(Stream stream, const AuxiliaryPairs& p, const double* parts, int64_t n, T* loss) {
    launch("auxiliary_loss_sum", divide_loss<T>,
           Grid{1, 1, 1, kElementThreads, block_sum_bytes<double>() + block_sum_bytes<int64_t>()}, stream, Pairs(p),
           gmem<const double>{parts, n, "parts"}, gmem<T>{loss, 1, "loss"});
}

template <typename T>
gmem<const T> start_backward(Stream stream, const AuxiliaryPairs& p, const T* grad_loss, T* scale) {
    launch("auxiliary_loss_scale", divide_gradient<T>, Grid{1, 1, 1, kElementThreads, block_sum_bytes<int64_t>()}, stream,
           Pairs(p), gmem<const T>{grad_loss, 1, "grad_loss"}, gmem<T>{scale, 1, "scale"});
    return {scale, 1, "scale"};
}

}  // namespace

template <typename S>
int64_t auxiliary_inner_loss_parts(const AuxiliarySequences<S>& p) {
    return inner_grid(p).x;
}

template <typename S>
void auxiliary_inner_loss(Stream stream, const AuxiliarySequences<S>& p, double* parts, Compute<S>* logits, Compute<S>* loss) {
    const Grid grid = inner_grid(p);
    launch("auxiliary_inner_loss", inner_loss<S>, grid, stream, Pairs(p), Sequences<S>(p),
           row_lanes<S>(p.width, {p.states, p.positives, p.negatives}), logits_of(p, logits),
           gmem<double>{parts, grid.x, "parts"});
    finish_loss(stream, p, parts, grid.x, loss);
}

template <typename S>
void auxiliary_inner_loss_backward(Stream stream, const AuxiliarySequences<S>& p, const Compute<S>* grad_loss,
                                   const Compute<S>* logits, Compute<S>* scale, S* grad_states, S* grad_positives,
                                   S* grad_negatives) {
    const int64_t n = p.batch * p.steps * p.width;
    const RowLanes rows =
        row_lanes<S>(p.width, {p.states, p.positives, p.negatives, grad_states, grad_positives, grad_negatives});
    const auto factor = start_backward(stream, p, grad_loss, scale);
    launch("auxiliary_inner_loss_backward", inner_loss_backward<S>, row_grid(rows, p.batch * p.steps), stream, Pairs(p),
           Sequences<S>(p), rows, logits_of(p, logits), factor, gmem<S>{grad_states, n, "grad_states"},
           gmem<S>{grad_positives, n, "grad_positives"}, gmem<S>{grad_negatives, n, "grad_negatives"});
}

int64_t auxiliary_loss_of_logits_parts(const AuxiliaryPairs& p) { return logits_grid(p).x; }

template <typename T>
void auxiliary_loss_of_logits(Stream stream, const AuxiliaryPairs& p, const T* logits, double* parts, T* loss) {
    const Grid grid = logits_grid(p);
    launch("auxiliary_loss_of_logits", loss_of_logits<T>, grid, stream, Pairs(p), logits_of(p, logits),
           gmem<double>{parts, grid.x, "parts"});
    finish_loss(stream, p, parts, grid.x, loss);
}

template <typename T>
void auxiliary_loss_of_logits_backward(Stream stream, const AuxiliaryPairs& p, const T* grad_loss, const T* logits, T* scale,
                                       T* grad_logits) {
    const auto factor = start_backward(stream, p, grad_loss, scale);
    launch("auxiliary_loss_of_logits_backward", loss_of_logits_backward<T>, element_grid(p.batch * p.pairs()), stream, Pairs(p),
           logits_of(p, logits), factor, logits_of(p, grad_logits, "grad_logits"));
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                                \
    template int64_t auxiliary_inner_loss_parts<S>(const AuxiliarySequences<S>&);                                              \
    template void auxiliary_inner_loss<S>(Stream, const AuxiliarySequences<S>&, double*, Compute<S>*, Compute<S>*);            \
    template void auxiliary_inner_loss_backward<S>(Stream, const AuxiliarySequences<S>&, const Compute<S>*, const Compute<S>*, \
                                                   Compute<S>*, S*, S*, S*);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

#define DIEN_OPS_INSTANTIATE(T)                                                                      \
    template void auxiliary_loss_of_logits<T>(Stream, const AuxiliaryPairs&, const T*, double*, T*); \
    template void auxiliary_loss_of_logits_backward<T>(Stream, const AuxiliaryPairs&, const T*, const T*, T*, T*);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
