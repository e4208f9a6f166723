// SPDX-License-Identifier: Apache-2.0
// Dice (DIN eq. 9) over a [B, T, C] tensor with padding, or an [N, C] matrix as its special case. Contracts: dice.h.
//
// Bound by memory. With batch statistics the input is read twice forward (moments, output) and, with the output's gradient,
// twice backward (sums, gradient): 3 and 5 tensors' bytes over the bandwidth, 3.35 TB/s on an H100. Fixed statistics: 2
// forward, in one launch. The gate p is computed anew in every phase: a sigmoid is some 20 instructions, and the chip does 35
// for each value of 16 bits that it reads and writes.
//
// Who does what: a thread takes as many neighbouring columns as 16 bytes hold (one, where C is no multiple of that) and goes
// down rows. It loads and stores them as one where all tensors are aligned, else one by one. The threads of a block lie side
// by side along a row, up to kMostPacks of them, and along as many rows at once as there are threads for. To keep memory busy
// for its latency of some 700 ns, 18 KB must be under way on each of the 132 multiprocessors. A thread loads 64 bytes before
// it uses the first (kAhead): the 512 threads, or more, for which there are registers have 32 KB under way. What is known of
// the columns is read while a thread's first rows are.
//
// Sums are of Compute<S> over at most kMostRows rows of a thread, then of double: over the threads of a block by halves,
// through shared memory, and over the blocks ("parts") by a second launch with a block for each column. The order follows from
// the sizes alone. Moments are sums of distances from the thread's first row, joined as mean and deviation: a
// large mean costs no precision.
#include "cuda/dice.h"

#include "cuda/dice_rows.cuh"

namespace dien_ops::cuda {
namespace {

// -------------------------------------------------------------------------------------------------------------- sums

// A count of rows; the sums of the gradient of alpha, of g_logit and of g_logit (s - E).
struct Sums {
    static constexpr int kNumbers = 4;
    double v[kNumbers];

    DIEN_OPS_DEVICE void join(const Sums& other) {
#pragma unroll
        for (int k = 0; k < kNumbers; ++k) v[k] += other.v[k];
    }
};

// Bytes that join_rows needs: at most half of the block's rows hand theirs on at a time.
template <typename Joined, int kColumns>
int64_t join_bytes(const Tiling& l) {
    return arena_bytes<double>(int64_t(l.rows_per_step / 2) * l.packs_per_block * kColumns * Joined::kNumbers);
}

// Joins what the threads of the same columns have, always the same rows with the same: those of row 0 have all of it then.
template <typename Joined, int kColumns>
DIEN_OPS_DEVICE void join_rows(Joined (&mine)[kColumns], const Place<kColumns>& place, const Tiling& l) {
    constexpr int kNumbers = Joined::kNumbers;
    Arena arena;
    const int width = l.packs_per_block * kColumns, rows = l.rows_per_step;
    const view<double> shared = arena.take<double>(rows / 2 * width * kNumbers, "joined rows");
    int half = 1;
    while (2 * half < rows) half *= 2;
    for (; half > 0; half /= 2) {
        const auto at = [&](int row, int i, int k) { return (k * (rows / 2) + row) * width + place.pack * kColumns + i; };
        if (place.y >= half && place.y < 2 * half && place.y < rows) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
#pragma unroll
                for (int k = 0; k < kNumbers; ++k) shared.st(at(place.y - half, i, k), mine[i].v[k]);
            }
        }
        sync_block();
        if (place.y < half && place.y + half < rows) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                Joined other;
#pragma unroll
                for (int k = 0; k < kNumbers; ++k) other.v[k] = shared.ld(at(place.y, i, k));
                mine[i].join(other);
            }
        }
        sync_block();
    }
}

// partial [kNumbers, C, parts] = what the block has of its part.
template <typename Joined, int kColumns>
DIEN_OPS_DEVICE void store_part(const gmem<double>& partial, const Joined (&mine)[kColumns], const Place<kColumns>& place,
                                const Tiling& l) {
    if (!place.present || place.y != 0) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
        for (int k = 0; k < Joined::kNumbers; ++k) {
            partial.st((k * l.channels + place.column + i) * l.parts + place.part, mine[i].v[k]);
        }
    }
}

// All parts of the block's column, in an order that their number fixes; thread 0 has the result.
template <typename Joined>
DIEN_OPS_DEVICE Joined join_parts(const gmem<const double>& partial, int64_t channels, int64_t parts) {
    constexpr int kNumbers = Joined::kNumbers;
    const int64_t column = block_index();
    Joined mine = {};
    for (int64_t part = thread_index(); part < parts; part += kThreads) {
        Joined other;
#pragma unroll
        for (int k = 0; k < kNumbers; ++k) other.v[k] = partial.ld((k * channels + column) * parts + part);
        mine.join(other);
    }
    return join_block(mine);
}

template <typename Joined>
Grid join_grid(int64_t channels) {
    return {channels, 1, 1, kThreads, join_block_bytes<Joined>(kThreads)};
}

// ----------------------------------------------------------------------------------------------------------- moments

struct Nothing {};  // to prepare

template <typename S, int kColumns>
DIEN_OPS_KERNEL(kThreads)
void part_moments(Tiling l, gmem<const int64_t> lengths, gmem<const S> input, gmem<double> partial) {
    using T = Compute<S>;
    const Place<kColumns> place(l);
    Values<T, kColumns> pivot = {}, sum = {}, square = {};
    int count = 0;
    for_rows<kColumns>(
        place, l, lengths, [] { return Nothing{}; },
        [&](Nothing, int64_t, bool valid, const Values<T, kColumns>& s) {
            if (!valid) return;
            if (count == 0) pivot = s;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const T d = s.v[i] - pivot.v[i];
                sum.v[i] += d;
                square.v[i] += d * d;
            }
            ++count;
        },
        input);
    DiceMoments mine[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const double offset = count > 0 ? double(sum.v[i]) / count : 0, deviation = square.v[i] - sum.v[i] * offset;
        mine[i] = {{double(count), pivot.v[i] + offset, deviation < 0 ? 0 : deviation}};
    }
    join_rows(mine, place, l);
    store_part(partial, mine, place, l);
}

template <typename T>
DIEN_OPS_KERNEL(kThreads)
void join_moments(gmem<const double> partial, int64_t channels, int64_t parts, gmem<T> mean, gmem<T> var) {
    const DiceMoments all = join_parts<DiceMoments>(partial, channels, parts);
    if (thread_index() != 0) return;
    mean.st(block_index(), T(all.mean()));
    var.st(block_index(), T(all.var()));
}

// ----------------------------------------------------------------------------------------------- the gate, its gradient

template <typename T>
struct Columns {
    gmem<const T> mean, var, alpha, weight, bias;
    DiceEps eps;

    template <typename S>
    explicit Columns(const DiceProblem<S>& p)
        : mean(p.mean, p.channels, "mean"),
          var(p.var, p.channels, "var"),
          alpha(p.alpha, p.channels, "alpha"),
          weight(p.weight, p.channels, "weight"),
          bias(p.bias, p.channels, "bias"),
          eps(p.eps) {}
};

// What a thread knows of its columns.
template <typename T, int kColumns>
struct OfColumns {
    Values<T, kColumns> mean, scale, bias, alpha;
};

template <typename T>
int64_t columns_bytes(const Tiling& l, int columns) {
    return arena_bytes<T>(int64_t(l.packs_per_block) * columns);
}

// The block computes the scale of each column once: a root and a quotient in double.
template <int kColumns, typename T>
DIEN_OPS_DEVICE OfColumns<T, kColumns> read_columns(const Columns<T>& from, const Place<kColumns>& place, const Tiling& l) {
    OfColumns<T, kColumns> columns = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        if (!place.present) continue;
        const int64_t c = place.column + i;
        columns.mean.v[i] = from.mean.ld(c);
        columns.bias.v[i] = from.bias ? from.bias.ld(c) : T(0);
        columns.alpha.v[i] = from.alpha.ld(c);
    }
    Arena arena;
    const int width = l.packs_per_block * kColumns;
    const view<T> scale = arena.take<T>(width, "scale");
    const int64_t first = block_index() % l.chunks * width;
#pragma unroll 1
    for (int i = thread_index(); i < width; i += kThreads) {
        const int64_t c = first + i;
        if (c >= l.channels) continue;
        scale.st(i, T((from.weight ? from.weight.ld(c) : T(1)) / from.eps.divisor(from.var.ld(c))));
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns.scale.v[i] = place.present ? scale.ld(place.pack * kColumns + i) : T(0);
    return columns;
}

template <typename S, int kColumns>
DIEN_OPS_KERNEL(kThreads)
void apply(Tiling l, gmem<const int64_t> lengths, Columns<Compute<S>> from, gmem<const S> input, gmem<S> output,
           gmem<Compute<S>> mean, gmem<Compute<S>> var) {
    using T = Compute<S>;
    const Place<kColumns> place(l);
    if (mean && place.present && place.part == 0 && place.y == 0) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            mean.st(place.column + i, from.mean.ld(place.column + i));
            var.st(place.column + i, from.var.ld(place.column + i));
        }
    }
    for_rows<kColumns>(
        place, l, lengths, [&] { return read_columns(from, place, l); },
        [&](const OfColumns<T, kColumns>& of, int64_t index, bool valid, const Values<T, kColumns>& s) {
            Values<T, kColumns> y = {};
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const T p = Gate<S>::sigmoid(of.scale.v[i] * (s.v[i] - of.mean.v[i]) + of.bias.v[i]);
                y.v[i] = valid ? dice_value(s.v[i], p, of.alpha.v[i]) : T(0);
            }
            store<kColumns>(output, index, l.aligned, y);
        },
        input);
}

template <typename S, int kColumns>
DIEN_OPS_KERNEL(kThreads)
void part_sums(Tiling l, gmem<const int64_t> lengths, Columns<Compute<S>> from, gmem<const S> input, gmem<const S> grad_output,
               gmem<double> partial) {
    using T = Compute<S>;
    const Place<kColumns> place(l);
    Values<T, kColumns> alpha = {}, logit = {}, centered = {};
    int count = 0;
    for_rows<kColumns>(
        place, l, lengths, [&] { return read_columns(from, place, l); },
        [&](const OfColumns<T, kColumns>& of, int64_t, bool valid, const Values<T, kColumns>& s, const Values<T, kColumns>& g) {
            if (!valid) return;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const T distance = s.v[i] - of.mean.v[i];
                const T p = Gate<S>::sigmoid(of.scale.v[i] * distance + of.bias.v[i]);
                const T g_logit = dice_logit_gradient(g.v[i], s.v[i], p, of.alpha.v[i]);
                alpha.v[i] += g.v[i] * dice_slope_of_alpha(s.v[i], p);
                logit.v[i] += g_logit;
                centered.v[i] += g_logit * distance;
            }
            ++count;
        },
        input, grad_output);
    Sums mine[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        mine[i] = {{double(count), double(alpha.v[i]), double(logit.v[i]), double(centered.v[i])}};
    }
    sync_block();  // the memory of the columns is join_rows' next
    join_rows(mine, place, l);
    store_part(partial, mine, place, l);
}

// The gradients of alpha, weight and bias; feedback [2, C].
template <typename T>
struct ColumnGradients {
    gmem<T> alpha, weight, bias, feedback;
};

template <typename T>
DIEN_OPS_KERNEL(kThreads)
void join_sums(gmem<const double> partial, int64_t channels, int64_t parts, Columns<T> from, ColumnGradients<T> to) {
    const Sums all = join_parts<Sums>(partial, channels, parts);
    if (thread_index() != 0) return;
    const int64_t c = block_index();
    const double count = all.v[0], var = from.var.ld(c), divisor = from.eps.divisor(var);
    to.alpha.st(c, T(all.v[1]));
    to.bias.st(c, T(all.v[2]));
    to.weight.st(c, T(all.v[3] / divisor));
    const T scale = T((from.weight ? from.weight.ld(c) : T(1)) / divisor);
    to.feedback.st(c, count > 0 ? T(all.v[2] / count) : T(0));
    to.feedback.st(channels + c, count > 0 ? T(from.eps.pull(scale, var, all.v[3] / count)) : T(0));
}

template <typename S, int kColumns>
DIEN_OPS_KERNEL(kThreads)
void input_gradient(Tiling l, gmem<const int64_t> lengths, Columns<Compute<S>> from, gmem<const Compute<S>> feedback,
                    gmem<const S> input, gmem<const S> grad_output, gmem<S> grad_input) {
    using T = Compute<S>;
    const Place<kColumns> place(l);
    Values<T, kColumns> mean_g_logit = {}, pull = {};
    if (place.present && feedback) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            mean_g_logit.v[i] = feedback.ld(place.column + i);
            pull.v[i] = feedback.ld(l.channels + place.column + i);
        }
    }
    for_rows<kColumns>(
        place, l, lengths, [&] { return read_columns(from, place, l); },
        [&](const OfColumns<T, kColumns>& of, int64_t index, bool valid, const Values<T, kColumns>& s,
            const Values<T, kColumns>& g) {
            Values<T, kColumns> grad = {};
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const T distance = s.v[i] - of.mean.v[i];
                const T p = Gate<S>::sigmoid(of.scale.v[i] * distance + of.bias.v[i]);
                const T g_logit = dice_logit_gradient(g.v[i], s.v[i], p, of.alpha.v[i]);
                const T d =
                    dice_gradient(g.v[i], g_logit, p, of.alpha.v[i], of.scale.v[i], distance, mean_g_logit.v[i], pull.v[i]);
                grad.v[i] = valid ? d : T(0);
            }
            store<kColumns>(grad_input, index, l.aligned, grad);
        },
        input, grad_output);
}

// ------------------------------------------------------------------------------------------------------------ launches

template <typename S>
constexpr int kWide = 16 / sizeof(S);

// The backward keeps so much for each column that with 8 of them too few threads find registers.
template <typename S>
constexpr int kWideBackward = kWide<S> < 4 ? kWide<S> : 4;

template <typename... P>
bool all_aligned(const P*... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// How many columns a thread takes: by the sizes alone, for the order of sums follows from it.
template <typename S>
int64_t columns_of_thread(const DiceProblem<S>& p, int most) {
    return p.channels % kWide<S> == 0 ? most : 1;
}

// Calls f(columns, tiling) with the columns that a thread takes as a constant, at most kMost; `tensors` are what it loads and
// stores.
template <int kMost, typename S, typename F, typename... P>
void with_columns(const DiceProblem<S>& p, F&& f, const P*... tensors) {
    const auto run = [&](auto columns) {
        Tiling l = tiling(p, columns());
        l.aligned = columns() == 1 || all_aligned(tensors...);
        f(columns, l);
    };
    columns_of_thread(p, kMost) > 1 ? run(std::integral_constant<int, kMost>{}) : run(std::integral_constant<int, 1>{});
}

template <typename S>
gmem<const int64_t> lengths_of(const DiceProblem<S>& p) {
    return {p.lengths, p.batch, "lengths"};
}

template <typename S>
gmem<S> tensor(S* data, int64_t rows, int64_t channels, const char* name) {
    return {data, rows * channels, name};
}

}  // namespace

template <typename S>
int64_t dice_moments_partial(const DiceProblem<S>& p) {
    return DiceMoments::kNumbers * p.channels * tiling(p, columns_of_thread(p, kWide<S>)).parts;
}

template <typename S>
int64_t dice_sums_partial(const DiceProblem<S>& p) {
    return Sums::kNumbers * p.channels * tiling(p, columns_of_thread(p, kWideBackward<S>)).parts;
}

template <typename S>
void dice_moments(Stream stream, const DiceProblem<S>& p, double* partial, Compute<S>* mean, Compute<S>* var) {
    using T = Compute<S>;
    const gmem<double> parts(partial, dice_moments_partial(p), "partial moments");
    const auto input = tensor(p.input, p.rows(), p.channels, "input");
    const auto run = [&](auto columns, const Tiling& l) {
        constexpr int kColumns = columns();
        launch("dice_part_moments", part_moments<S, kColumns>, l.grid(join_bytes<DiceMoments, kColumns>(l)), stream, l,
               lengths_of(p), input, parts);
        launch("dice_join_moments", join_moments<T>, join_grid<DiceMoments>(p.channels), stream, gmem<const double>(parts),
               p.channels, l.parts, gmem<T>(mean, p.channels, "mean"), gmem<T>(var, p.channels, "var"));
    };
    with_columns<kWide<S>>(p, run, p.input);
}

template <typename S>
void dice_forward(Stream stream, const DiceProblem<S>& p, S* output, Compute<S>* mean, Compute<S>* var) {
    using T = Compute<S>;
    const auto run = [&](auto columns, const Tiling& l) {
        constexpr int kColumns = columns();
        launch("dice_apply", apply<S, kColumns>, l.grid(columns_bytes<T>(l, kColumns)), stream, l, lengths_of(p), Columns<T>(p),
               tensor(p.input, p.rows(), p.channels, "input"), tensor(output, p.rows(), p.channels, "output"),
               gmem<T>(mean, p.channels, "used mean"), gmem<T>(var, p.channels, "used var"));
    };
    with_columns<kWide<S>>(p, run, p.input, output);
}

template <typename S>
void dice_sums(Stream stream, const DiceBackward<S>& p) {
    using T = Compute<S>;
    const gmem<double> parts(p.partial, dice_sums_partial<S>(p), "partial sums");
    const auto run = [&](auto columns, const Tiling& l) {
        constexpr int kColumns = columns();
        const int64_t own = columns_bytes<T>(l, kColumns), joined = join_bytes<Sums, kColumns>(l);
        launch("dice_part_sums", part_sums<S, kColumns>, l.grid(own > joined ? own : joined), stream, l, lengths_of<S>(p),
               Columns<T>(p), tensor(p.input, p.rows(), p.channels, "input"),
               tensor(p.grad_output, p.rows(), p.channels, "grad_output"), parts);
        const ColumnGradients<T> to = {{p.grad_alpha, p.channels, "grad_alpha"},
                                       {p.grad_weight, p.channels, "grad_weight"},
                                       {p.grad_bias, p.channels, "grad_bias"},
                                       {p.feedback, 2 * p.channels, "feedback"}};
        launch("dice_join_sums", join_sums<T>, join_grid<Sums>(p.channels), stream, gmem<const double>(parts), p.channels,
               l.parts, Columns<T>(p), to);
    };
    with_columns<kWideBackward<S>, S>(p, run, p.input, p.grad_output);
}

template <typename S>
void dice_backward(Stream stream, const DiceBackward<S>& p) {
    using T = Compute<S>;
    const gmem<const T> feedback(p.batch_statistics ? p.feedback : nullptr, 2 * p.channels, "feedback");
    const auto run = [&](auto columns, const Tiling& l) {
        constexpr int kColumns = columns();
        launch("dice_input_gradient", input_gradient<S, kColumns>, l.grid(columns_bytes<T>(l, kColumns)), stream, l,
               lengths_of<S>(p), Columns<T>(p), feedback, tensor(p.input, p.rows(), p.channels, "input"),
               tensor(p.grad_output, p.rows(), p.channels, "grad_output"),
               tensor(p.grad_input, p.rows(), p.channels, "grad_input"));
    };
    with_columns<kWideBackward<S>, S>(p, run, p.input, p.grad_output, p.grad_input);
}

#define DIEN_OPS_INSTANTIATE(S)                                                                      \
    template int64_t dice_moments_partial<S>(const DiceProblem<S>&);                                 \
    template int64_t dice_sums_partial<S>(const DiceProblem<S>&);                                    \
    template void dice_moments<S>(Stream, const DiceProblem<S>&, double*, Compute<S>*, Compute<S>*); \
    template void dice_forward<S>(Stream, const DiceProblem<S>&, S*, Compute<S>*, Compute<S>*);      \
    template void dice_sums<S>(Stream, const DiceBackward<S>&);                                      \
    template void dice_backward<S>(Stream, const DiceBackward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
