// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) over a [B, T, C] tensor with padding, or an [N, C] matrix as its special case. Contracts: dice.h.
//
// The operator is bound by memory: per value it computes one sigmoid, and with batch statistics the input must be read twice,
// forward (statistics, then values) and backward (sums, then gradients). So each phase streams once over the rows, in blocks of
// consecutive rows that one thread takes as a whole; the gate p is computed anew in every phase rather than stored.
//
// Statistics are exact to the rounding of T for any mean: each block sums distances from one of its own rows (dice_rows.h), and
// blocks are joined in double, in their order. The blocks depend on the shape alone, never on the threads, so the bits do not
// either.
//
// Padding: a block is a range of rows b * T + t of the whole tensor. It falls into runs of valid rows and runs of padding,
// found from the lengths; sums skip the latter, outputs set them to 0.
#include "cpu/dice.h"

#include "cpu/dice_rows.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// Calls f(row, rows, valid) for the runs of block `block`.
template <typename T, typename F>
void for_runs(const DiceProblem<T>& p, int64_t block, F&& f) {
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

}  // namespace

template <Capability kTarget, typename T>
void dice_moments(const DiceForward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels;
    for (int64_t block = block_begin; block < block_end; ++block) {
        const Moments moments{p.moments + block * (1 + 2 * C), C};
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (valid) add_moments(p.input + row * C, C, rows, moments);
        });
    }
}

template <Capability kTarget, typename T>
void dice_statistics(const DiceForward<T>& p) {
    const int64_t C = p.channels;
    const Moments total{p.moments, C};
    for (int64_t block = 1; block < p.blocks(); ++block) total.merge({p.moments + block * (1 + 2 * C), C});
    finish_moments(total, p.mean, p.var);
}

template <Capability kTarget, typename T>
void dice_prepare(const DiceProblem<T>& p, const T* mean, const T* var) {
    fill_dice_columns(mean, var, p.weight, p.bias, p.alpha, p.eps, p.channels, p.columns);
}

template <Capability kTarget, typename T>
void dice_forward(const DiceForward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels;
    for (int64_t block = block_begin; block < block_end; ++block) {
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (valid) {
                dice_rows(dice_columns<T>(p.columns, C), p.input + row * C, C, p.output + row * C, C, rows, C);
            } else {
                fill_zeros(p.output + row * C, rows * C);
            }
        });
    }
}

template <Capability kTarget, typename T>
void dice_sums(const DiceBackward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels;
    for (int64_t block = block_begin; block < block_end; ++block) {
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (!valid) return;
            add_dice_sums(dice_columns<T>(p.columns, C), p.input + row * C, C, p.grad_output + row * C, C, rows, C,
                          p.sums + block * 3 * C);
        });
    }
}

template <Capability kTarget, typename T>
void dice_reduce(const DiceBackward<T>& p) {
    const int64_t C = p.channels;
    for (int64_t block = 1; block < p.blocks(); ++block) {
        for (int64_t i = 0; i < 3 * C; ++i) p.sums[i] += p.sums[block * 3 * C + i];
    }
    for (int64_t c = 0; c < C; ++c) {
        p.grad_alpha[c] = T(p.sums[c]);
        p.grad_bias[c] = T(p.sums[C + c]);
        p.grad_weight[c] = T(p.sums[2 * C + c] / p.eps.divisor(p.var[c]));
    }
    fill_dice_feedback(p.sums, double(p.count), p.var, dice_columns<T>(p.columns, C).scale, p.eps, C, p.feedback);
}

template <Capability kTarget, typename T>
void dice_backward(const DiceBackward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.channels;
    const DiceFeedback<T> feedback = p.batch_statistics ? dice_feedback<T>(p.feedback, C) : DiceFeedback<T>{nullptr, nullptr};
    for (int64_t block = block_begin; block < block_end; ++block) {
        for_runs(p, block, [&](int64_t row, int64_t rows, bool valid) {
            if (valid) {
                dice_gradient_rows(dice_columns<T>(p.columns, C), feedback, p.input + row * C, C, p.grad_output + row * C, C,
                                   p.grad_input + row * C, C, rows, C);
            } else {
                fill_zeros(p.grad_input + row * C, rows * C);
            }
        });
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                            \
    template void dice_moments<kCapability, T>(const DiceForward<T>&, int64_t, int64_t);   \
    template void dice_statistics<kCapability, T>(const DiceForward<T>&);                  \
    template void dice_prepare<kCapability, T>(const DiceProblem<T>&, const T*, const T*); \
    template void dice_forward<kCapability, T>(const DiceForward<T>&, int64_t, int64_t);   \
    template void dice_sums<kCapability, T>(const DiceBackward<T>&, int64_t, int64_t);     \
    template void dice_reduce<kCapability, T>(const DiceBackward<T>&);                     \
    template void dice_backward<kCapability, T>(const DiceBackward<T>&, int64_t, int64_t);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
