// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) over a [B, T, C] tensor with padding, or an [N, C] matrix as its special case. Contracts: dice.h.
//
// The operator is bound by memory: per value it computes one sigmoid, and with batch statistics the input must be read twice,
// forward (statistics, then values) and backward (sums, then gradients). So each phase streams once over the rows, in blocks of
// consecutive rows that one thread takes as a whole; the gate p is computed anew in every phase rather than stored.
//
// Statistics are exact to the rounding of Compute<S> for any mean: each block sums distances from one of its own rows
// (dice_rows.h), and blocks are joined in double, in their order. The blocks depend on the shape alone, never on the threads,
// so the bits do not either.
//
// Rows are short (C = 80 is five vectors) and follow each other without a gap, so `fold` of them are taken as one row of fold *
// C columns, whose means, scales and alphas repeat: then all vectors are full for any C. Sums and moments over these columns
// are added up at the end of a block.
//
// The second phase goes through its blocks from the last to the first, because the first phase left the last ones in the cache.
//
// Padding: a block is a range of rows b * T + t of the whole tensor. It falls into runs of valid rows and runs of padding,
// found from the lengths; sums skip the latter, outputs set them to 0.
#include "cpu/dice.h"

#include "cpu/dice_rows.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// Calls f(row, rows, valid) for the runs of block `block`.
template <typename S, typename F>
void for_runs(const DiceProblem<S>& p, int64_t block, F&& f) {
    const int64_t total = p.batch * p.steps, start = block * p.rows_per_block;
    const int64_t end = total - start < p.rows_per_block ? total : start + p.rows_per_block;
    for (int64_t row = start; row < end;) {
        const int64_t b = row / p.steps, padding = b * p.steps + p.lengths[b], next = (b + 1) * p.steps;
        const bool valid = row < padding;
        const int64_t run_end = valid ? padding : next, stop = run_end < end ? run_end : end;
        f(row, stop - row, valid);
        row = stop;
    }
}

// Where every length is T a block is a single run.
template <typename S, typename F>
void for_valid_runs(const DiceProblem<S>& p, int64_t block, F&& f) {
    for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
        if (valid) f(row, rows);
    });
}

// Calls f(first, rows, columns) for a run's numbers from `first` on, as folded rows, then for those that are left, as one.
template <typename S, typename F>
void for_folded_rows(const DiceProblem<S>& p, int64_t row, int64_t rows, F&& f) {
    const int64_t left = rows % p.fold;
    if (rows > left) f(row * p.channels, rows / p.fold, p.width());
    if (left > 0) f((row + rows - left) * p.channels, 1, left * p.channels);
}

// Copies the first C of `fold` * C numbers to the others.
template <typename T>
void repeat_columns(T* numbers, int64_t C, int64_t width) {
    for (int64_t c = C; c < width; ++c) numbers[c] = numbers[c - C];
}

}  // namespace

template <Capability kTarget, typename S>
void dice_moments(const DiceForward<S>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels, W = p.width();
    const Scratch<double> scratch(1 + 2 * W);
    const Moments folded{scratch, W};
    for (int64_t block = block_begin; block < block_end; ++block) {
        const Moments moments{p.moments + block * (1 + 2 * C), C};
        fill_zeros<double>(scratch, 1 + 2 * W);
        for_valid_runs(p, block, [&](int64_t row, int64_t rows) {
            const int64_t left = rows % p.fold;
            add_moments(p.input + row * C, W, rows / p.fold, folded);
            add_moments(p.input + (row + rows - left) * C, C, left, moments);
        });
        for (int64_t c = 0; c < W; c += C) moments.merge(folded.count(), folded.mean() + c, folded.deviation() + c);
    }
}

template <Capability kTarget, typename S>
void dice_statistics(const DiceForward<S>& p) {
    const int64_t C = p.channels;
    const Moments total{p.moments, C};
    for (int64_t block = 1; block < p.blocks(); ++block) total.merge({p.moments + block * (1 + 2 * C), C});
    finish_moments(total, p.mean, p.var);
}

template <Capability kTarget, typename S>
void dice_prepare(const DiceProblem<S>& p, const Compute<S>* mean, const Compute<S>* var) {
    const int64_t C = p.channels, W = p.width();
    fill_dice_columns(mean, var, p.weight, p.bias, p.alpha, p.eps, C, W, p.columns);
    for (int64_t k = 0; k < 4; ++k) repeat_columns(p.columns + k * W, C, W);
}

template <Capability kTarget, typename S>
void dice_forward(const DiceForward<S>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels;
    const auto columns = dice_columns<Compute<S>>(p.columns, p.width());
    for (int64_t block = block_end - 1; block >= block_begin; --block) {
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (!valid) return fill_zeros(p.output + row * C, rows * C);
            for_folded_rows(p, row, rows, [&](int64_t first, int64_t n, int64_t width) {
                dice_rows(columns, p.input + first, width, p.output + first, width, n, width);
            });
        });
    }
}

template <Capability kTarget, typename S>
void dice_sums(const DiceBackward<S>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels, W = p.width();
    const auto columns = dice_columns<Compute<S>>(p.columns, W);
    const Scratch<double> folded(3 * W);
    for (int64_t block = block_begin; block < block_end; ++block) {
        double* const sums = p.sums + block * 3 * C;
        fill_zeros<double>(folded, 3 * W);
        for_valid_runs(p, block, [&](int64_t row, int64_t rows) {
            const int64_t left = rows % p.fold, rest = (row + rows - left) * C;
            add_dice_sums(columns, p.input + row * C, W, p.grad_output + row * C, W, rows / p.fold, W, folded);
            add_dice_sums(columns, p.input + rest, C, p.grad_output + rest, C, left, C, sums);
        });
        for (int64_t k = 0; k < 3; ++k) {
            for (int64_t i = 0; i < W; ++i) sums[k * C + i % C] += folded[k * W + i];
        }
    }
}

template <Capability kTarget, typename S>
void dice_reduce(const DiceBackward<S>& p) {
    const int64_t C = p.channels, W = p.width();
    for (int64_t block = 1; block < p.blocks(); ++block) {
        for (int64_t i = 0; i < 3 * C; ++i) p.sums[i] += p.sums[block * 3 * C + i];
    }
    for (int64_t c = 0; c < C; ++c) {
        p.grad_alpha[c] = Compute<S>(p.sums[c]);
        p.grad_bias[c] = Compute<S>(p.sums[C + c]);
        p.grad_weight[c] = Compute<S>(p.sums[2 * C + c] / p.eps.divisor(p.var[c]));
    }
    const auto columns = dice_columns<Compute<S>>(p.columns, W);
    fill_dice_feedback(p.sums, double(p.count), p.var, columns.scale, p.eps, C, W, p.feedback);
    for (int64_t k = 0; k < 2; ++k) repeat_columns(p.feedback + k * W, C, W);
}

template <Capability kTarget, typename S>
void dice_backward(const DiceBackward<S>& p, int64_t block_begin, int64_t block_end) {
    using T = Compute<S>;
    const int64_t C = p.channels;
    const auto columns = dice_columns<T>(p.columns, p.width());
    const DiceFeedback<T> feedback = p.batch_statistics ? dice_feedback<T>(p.feedback, p.width()) : DiceFeedback<T>{};
    for (int64_t block = block_end - 1; block >= block_begin; --block) {
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (!valid) return fill_zeros(p.grad_input + row * C, rows * C);
            for_folded_rows(p, row, rows, [&](int64_t first, int64_t n, int64_t width) {
                dice_gradient_rows(columns, feedback, p.input + first, width, p.grad_output + first, width,
                                   p.grad_input + first, width, n, width);
            });
        });
    }
}

#define DIEN_OPS_INSTANTIATE(S)                                                                              \
    template void dice_moments<kCapability, S>(const DiceForward<S>&, int64_t, int64_t);                     \
    template void dice_statistics<kCapability, S>(const DiceForward<S>&);                                    \
    template void dice_prepare<kCapability, S>(const DiceProblem<S>&, const Compute<S>*, const Compute<S>*); \
    template void dice_forward<kCapability, S>(const DiceForward<S>&, int64_t, int64_t);                     \
    template void dice_sums<kCapability, S>(const DiceBackward<S>&, int64_t, int64_t);                       \
    template void dice_reduce<kCapability, S>(const DiceBackward<S>&);                                       \
    template void dice_backward<kCapability, S>(const DiceBackward<S>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
