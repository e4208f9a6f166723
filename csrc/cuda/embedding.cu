// SPDX-License-Identifier: Apache-2.0
// w_j <- w_j - lr (g_j + (l2 / n_j) w_j) for each id j of a mini-batch, once (DIN eq. 7), and the same gradient under momentum,
// Adagrad and Adam; of all tables of a call at once. Contracts: embedding.h.
//
// Bound by memory: every gradient row is read once, every row of weight and state that the batch names read and written once.
// With U distinct ids of N that is (N + 2 U (1 + states)) D numbers over the bandwidth, 3.35 TB/s on an H100: 51,200 Zipf ids
// on rows of 64 floats are some 25 MB, 7 us, of which the host sees nothing: how many ids are distinct is known on the device
// alone, and launches are sized for N. At such sizes it is latency that counts: few launches, no chain of loads without need.
//
//   1. A thread for each position checks id and count and makes a word: a key above the position's number. The tables of a call
//      are one virtual table, and the key is the row in it; positions that are left out (padding, or ids outside where that is
//      no error) get a key of their own behind the table's rows. (embedding_check.cu, where gradients are looked through too.)
//   2. The words are sorted by their keys (sort.h), stably, so that a row's positions stand together, a segment, in the
//      order of the batch; and a table's stand where they stood before, whatever other tables there are.
//   3. Of segments longer than kPiece, every further piece of kPiece rows is summed; of those longer than kSuper, every
//      further kSuper rows are summed from those sums. An id that fills a third of a batch is shared by many warps. Pieces are
//      counted from a segment's beginning, which the group of lanes finds by bisection: the order of a sum depends on the
//      table's own batch alone. In each window of kPiece positions at most one such piece begins, and that window's place in
//      memory is its sum's: who sums and who joins need not talk. (kSuper likewise.)
//   4. A block takes kTile positions. Its threads find the segments that begin there; a thread for each looks up what the row
//      as a whole needs (n_j, the step, exp and roots in double), many rows at once; then a few lanes for each row (rows.cuh)
//      sum up to kPiece gradient rows and what 3. left, apply decay and rule, and write weight and state.
//
// Sums are Compute<S>, one row after the other within a piece, then one piece after the other. A kernel takes up to
// kTablesPerLaunch tables; the tables of a call that has more are checked in several launches, all of them before the first
// one that writes.
#include <math.h>

#include "common/rounding.h"
#include "cuda/embedding_tables.cuh"
#include "cuda/sort.h"

namespace dien_ops::cuda {
namespace {

// --------------------------------------------------------------------------------------------------- sums of long segments

// Of the segment that stretches over the beginning of a window of kSize positions: what begins in the window, a whole number of
// windows from the segment's beginning. None: count is 0.
struct Part {
    int64_t first = 0, count = 0;  // positions, at most kSize
};

template <int64_t kSize>
DIEN_OPS_DEVICE Part part_in_window(const TableWords& words, const Table& t, int64_t window) {
    const int64_t begin = window * kSize;
    if (begin == 0 || begin >= t.batch) return {};
    const int64_t row = words.row(begin);
    if (row == t.rows || words.row(begin - 1) != row) return {};
    const bool near = begin >= kPiece && words.row(begin - kPiece) != row;
    const int64_t start = words.first_of(row, near ? begin - kPiece : 0, begin);
    const int64_t first = start + divide_up(begin - start, kSize) * kSize;
    if (first >= t.batch || words.row(first) != row) return {};
    const int64_t end = first + kSize < t.batch ? first + kSize : t.batch;
    if (words.row(end - 1) == row) return {first, end - first};
    return {first, words.first_of(row + 1, first, end) - first};
}

DIEN_OPS_DEVICE int64_t window_of_group(const Group& g, int k, const RowLanes& lanes) {
    return (block_index() - g.first_block[k]) * lanes.groups() + lanes.group();
}

// A group of lanes for each window: the sum of the piece that begins there.
template <typename S>
DIEN_OPS_KERNEL(kThreads)
void sum_pieces(Group g, Words all, gmem<Compute<S>> sums) {
    using T = Compute<S>;
    const int k = g.table();
    const Table& t = g.tables[k];
    const TableWords words(all, t);
    const int64_t window = window_of_group(g, k, t.lanes);
    const Part piece = part_in_window<kPiece>(words, t, window);
    const gmem<const S> grad = gradient_of<S>(t);
    for (int pass = 0; piece.count > 0 && pass < t.lanes.passes; ++pass) {
        const int column = t.lanes.column<S>(pass), numbers = t.lanes.count<S>(column);
        const auto at = [&](int64_t i) { return words.position_of(words.words.ld(piece.first + i)) * t.dim + column; };
        T sum[kChunk<T>] = {};
        add_rows(grad, 0, piece.count, numbers, t.lanes.whole, at, sum);
        store_chunk(sums, t.pieces + window * t.dim + column, numbers, t.lanes.whole, sum);
    }
}

// A group of lanes for each window of kSuper positions: the sum of the pieces of what begins there.
template <typename T>
DIEN_OPS_KERNEL(kThreads)
void join_pieces(Group g, Words all, gmem<T> sums) {
    const int k = g.table();
    const Table& t = g.tables[k];
    const TableWords words(all, t);
    const int64_t window = window_of_group(g, k, t.lanes);
    const Part part = part_in_window<kSuper>(words, t, window);
    const gmem<const T> pieces = sums;
    for (int pass = 0; part.count > 0 && pass < t.lanes.passes; ++pass) {
        const int column = t.lanes.column<T>(pass), numbers = t.lanes.count<T>(column);
        const auto at = [&](int64_t i) { return t.pieces + (part.first / kPiece + i) * t.dim + column; };
        T sum[kChunk<T>] = {};
        add_rows(pieces, 0, divide_up(part.count, kPiece), numbers, t.lanes.whole, at, sum);
        store_chunk(sums, t.superpieces + window * t.dim + column, numbers, t.lanes.whole, sum);
    }
}

// --------------------------------------------------------------------------------------------------------------- the rules

// What the numbers of a row share.
template <typename T>
struct OfRow {
    RowDecay<T> decay;
    T step_size, root_scale;  // the latter of Adam only; of RowwiseAdagrad, step_size is at first the row's state
};

// A rule as the update takes it. kStates: numbers of state of each number of a row; prepare: what a thread does for a row
// before the row's lanes come.
template <typename Rule>
struct RuleOfRows;

template <typename T>
struct RuleOfRows<SgdRule<T>> {
    static constexpr int kStates = 1;
    SgdRule<T> rule;

    DIEN_OPS_DEVICE void prepare(const Table&, int64_t, OfRow<T>&) const {}
    DIEN_OPS_DEVICE T step(const OfRow<T>&, T g, T (&state)[1], bool has_state) const {
        return has_state ? rule.step(g, state[0]) : rule.step(g);
    }
};

template <typename T>
struct RuleOfRows<AdagradRule<T>> {
    static constexpr int kStates = 1;
    AdagradRule<T> rule;

    DIEN_OPS_DEVICE void prepare(const Table&, int64_t, OfRow<T>&) const {}
    DIEN_OPS_DEVICE T step(const OfRow<T>&, T g, T (&state)[1], bool) const { return rule.step(g, state[0]); }
};

template <typename T>
DIEN_OPS_DEVICE gmem<T> row_state_of(const Table& t) {
    return {static_cast<T*>(t.row_state), t.rows, "state of the rows"};
}

template <typename T>
struct RuleOfRows<RowwiseAdagradRule<T>> {
    static constexpr int kStates = 0;
    RowwiseAdagradRule<T> rule;

    DIEN_OPS_DEVICE void prepare(const Table& t, int64_t row, OfRow<T>& of) const { of.step_size = row_state_of<T>(t).ld(row); }
    DIEN_OPS_DEVICE T step(const OfRow<T>& of, T g, T (&)[1], bool) const { return of.step_size * g; }
};

template <typename T>
struct AdamOf : AdamRule {};  // of numbers in T

template <typename T>
struct RuleOfRows<AdamOf<T>> {
    static constexpr int kStates = 2;
    AdamOf<T> rule;

    DIEN_OPS_DEVICE void prepare(const Table& t, int64_t row, OfRow<T>& of) const {
        const gmem<int64_t> steps = row_state_of<int64_t>(t);
        const int64_t step = steps.ld(row) + 1;
        steps.st(row, step);
        const double s = static_cast<double>(step);
        const AdamRow<T> corrected(rule, -expm1(s * rule.log_beta1), -expm1(s * rule.log_beta2));
        of.step_size = corrected.step_size, of.root_scale = corrected.root_scale;
    }
    DIEN_OPS_DEVICE T step(const OfRow<T>& of, T g, T (&state)[2], bool) const {
        AdamRow<T> adam(rule, 1, 1);
        adam.step_size = of.step_size, adam.root_scale = of.root_scale;
        return adam.step(g, state[0], state[1]);
    }
};

template <typename Rule>
constexpr bool kByRow = false;
template <typename T>
constexpr bool kByRow<RuleOfRows<RowwiseAdagradRule<T>>> = true;

// ------------------------------------------------------------------------------------------------------- rounding of weights

template <typename S>
DIEN_OPS_DEVICE Chunk<S> to_nearest(const Compute<S> (&values)[kChunk<S>]) {
    Chunk<S> chunk;
#pragma unroll
    for (int k = 0; k < kChunk<S>; ++k) chunk.v[k] = to_storage<S>(values[k]);
    return chunk;
}

// column: a multiple of kChunk<S>, half of what one counter has noise for.
template <typename S>
DIEN_OPS_DEVICE Chunk<S> with_noise(const float (&values)[4], uint64_t seed, int64_t row, int column) {
    static_assert(sizeof(S) == 2 && kChunk<S> == 4 && kNumbersPerPhilox == 8);
    const PhiloxBlock<uint32_t> noise = philox(noise_counter(row, column / kNumbersPerPhilox), seed);
    const bool upper = column % kNumbersPerPhilox != 0;
    const uint32_t words[2] = {upper ? noise.word[2] : noise.word[0], upper ? noise.word[3] : noise.word[1]};
    Chunk<S> chunk;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t bits;
        memcpy(&bits, &values[k], sizeof(bits));
        chunk.v[k] = {static_cast<uint16_t>(round_with_noise(bits, words[k / 2] >> (k % 2 * 16) & 0xffff, S{}))};
    }
    return chunk;
}

// -------------------------------------------------------------------------------------------------------------- the update

constexpr int kMostlyAll = 4;  // rows of a segment that are loaded at once, in any case

struct Options {
    DecayRule decay;
    bool stochastic;
    gmem<const float> grad_scale, found_inf;
    gmem<const int32_t> skipped;  // of the call's tables, or absent
};

// What a block knows of the segments that begin among its positions, in shared memory.
template <typename T>
struct Segments {
    view<uint64_t> words;  // [kThreads], of the block's positions and of the kPiece behind them
    view<int> begins;      // [kThreads], of all segments that begin there: places in words
    view<int64_t> counts;  // [kTile], positions of each, as what follows of those that are to be updated
    view<T> coupled, kept, step_size, root_scale;

    static int64_t bytes() {
        return arena_bytes<uint64_t>(kThreads) + arena_bytes<int>(kThreads) + arena_bytes<int64_t>(kTile) +
               4 * arena_bytes<T>(kTile);
    }
    DIEN_OPS_DEVICE explicit Segments(Arena& arena)
        : words(arena.take<uint64_t>(kThreads, "words")),
          begins(arena.take<int>(kThreads, "begins")),
          counts(arena.take<int64_t>(kTile, "counts")),
          coupled(arena.take<T>(kTile, "coupled")),
          kept(arena.take<T>(kTile, "kept")),
          step_size(arena.take<T>(kTile, "step_size")),
          root_scale(arena.take<T>(kTile, "root_scale")) {}

    DIEN_OPS_DEVICE OfRow<T> of_row(int s) const { return {{coupled.ld(s), kept.ld(s)}, step_size.ld(s), root_scale.ld(s)}; }
    DIEN_OPS_DEVICE void set(int s, const OfRow<T>& of) const {
        coupled.st(s, of.decay.coupled), kept.st(s, of.decay.kept);
        step_size.st(s, of.step_size), root_scale.st(s, of.root_scale);
    }
};

struct Found {
    int segments, all;  // to be updated; with those that only end others
};

// Fills words and begins of the positions from `tile` on. A segment that is to be updated begins in the first kTile of them.
// All threads of the block call.
template <typename T>
DIEN_OPS_DEVICE Found find_segments(const TableWords& from, const Table& t, int64_t tile, const Segments<T>& to,
                                    const view<int>& of_warps) {
    const int64_t i = tile + thread_index();
    const uint64_t word = i < t.batch ? from.words.ld(i) : 0;
    const int64_t row = i < t.batch ? from.row_of(word) : -1;
    const bool begins = i < t.batch && (i == 0 || from.row(i - 1) != row);
    const bool mine = begins && row < t.rows && thread_index() < kTile;
    to.words.st(thread_index(), word);
    // Both counts in one number: of the lanes before this one, and of the warp.
    const int one = (begins ? 1 : 0) + (mine ? 1 << 16 : 0);
    int before = 0, total = one;
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
        const int other = shuffle_xor(total, mask);
        if ((lane_index() & mask) != 0) before += other;
        total += other;
    }
    if (lane_index() == 0) of_warps.st(warp_index(), total);
    sync_block();
    int sum = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
        if (warp == warp_index()) before += sum;
        sum += of_warps.ld(warp);
    }
    if (begins) to.begins.st(before & 0xffff, thread_index());
    sync_block();
    return {sum >> 16, sum & 0xffff};
}

// A thread for each segment: how long it is, and what its row needs once.
template <typename T, typename Rule>
DIEN_OPS_DEVICE void prepare_row(const TableWords& words, const Table& t, int64_t tile, const Found& found,
                                 const Options& options, const RuleOfRows<Rule>& rule, const Segments<T>& segments) {
    const int s = thread_index();
    const int begin = segments.begins.ld(s);
    const int64_t row = words.row_of(segments.words.ld(begin));
    const int64_t count =
        s + 1 < found.all ? segments.begins.ld(s + 1) - begin : words.first_of(row + 1, tile + begin, t.batch) - (tile + begin);
    segments.counts.st(s, count);
    double decayed = 0;
    if (options.decay.mode == Decay::lazy) {
        const gmem<double> decays = row_state_of<double>(t);
        decayed = decays.ld(row);
        decays.st(row, t.log_decay);
    }
    OfRow<T> of = {options.decay.of_row<T>(count_of(t, row), t.log_decay, decayed), 0, 0};
    rule.prepare(t, row, of);
    segments.set(s, of);
}

// The blocks for which a multiprocessor is to have registers: the bound of the kernel's threads says so, though its own are
// fewer. Of one more, some numbers would not stay in them.
template <typename S, typename Rule>
constexpr int kBlocksAtOnce = sizeof(S) == 8                   ? 4
                              : RuleOfRows<Rule>::kStates == 2 ? 5
                                                               : 6;

// A group of lanes' share of a row.
template <typename S, int kStates>
struct Share {
    Compute<S> weight[kChunk<S>], grad[kChunk<S>], states[kChunk<S>][kStates > 0 ? kStates : 1];
};

template <typename S, typename Rule>
DIEN_OPS_KERNEL((kBlocksAtOnce<S, Rule>)*kThreads)
void update_rows(Group g, Words all, Options options, RuleOfRows<Rule> rule, gmem<const Compute<S>> sums) {
    using T = Compute<S>;
    constexpr int kStates = RuleOfRows<Rule>::kStates;
    const int k = g.table();
    const Table& t = g.tables[k];
    const TableWords words(all, t);
    const int64_t tile = (block_index() - g.first_block[k]) * kTile;
    Arena arena;
    const Segments<T> segments(arena);
    Found found = find_segments(words, t, tile, segments, arena.take<int>(kThreads / kWarp, "of warps"));
    if (options.found_inf && options.found_inf.ld(0) != 0) found.segments = 0;
    if (options.skipped && options.skipped.ld(t.number) != 0) found.segments = 0;
    if (thread_index() < found.segments) prepare_row(words, t, tile, found, options, rule, segments);
    sync_block();

    const RowLanes& lanes = t.lanes;
    const gmem<const S> grad = gradient_of<S>(t);
    const gmem<S> weight = {static_cast<S*>(t.weight), t.rows * t.dim, "weight"};
    gmem<T> states[2];
#pragma unroll
    for (int i = 0; i < kStates; ++i) states[i] = {static_cast<T*>(t.states[i]), t.rows * t.dim, "state"};
    const T scale = options.grad_scale ? T(options.grad_scale.ld(0)) : T(1);
    for (int first = 0; first < found.segments; first += lanes.groups()) {  // a warp's lanes stay together
        const int s = first + lanes.group();
        const bool present = s < found.segments;
        const int begin = present ? segments.begins.ld(s) : 0;
        const int64_t count = present ? segments.counts.ld(s) : 0, start = tile + begin;
        const int64_t row = present ? words.row_of(segments.words.ld(begin)) : 0;
        OfRow<T> of = present ? segments.of_row(s) : OfRow<T>{};

        // Loads what is the lane's of the row in a pass, sums its gradient and adds the decay.
        const auto load = [&](int column, int numbers, Share<S, kStates>& mine) {
            const int64_t at = row * t.dim + column;
            const Chunk<S> loaded = load_chunk<S>(weight, at, numbers, lanes.whole);
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
                const Chunk<T> state = load_chunk<T>(states[i], at, states[i] ? numbers : 0, lanes.whole);
#pragma unroll
                for (int n = 0; n < kChunk<S>; ++n) mine.states[n][i] = state.v[n];
            }
            T(&sum)[kChunk<S>] = mine.grad;
#pragma unroll
            for (int n = 0; n < kChunk<S>; ++n) sum[n] = 0;
            const auto position = [&](int64_t i) {
                return words.position_of(segments.words.ld(begin + static_cast<int>(i))) * t.dim + column;
            };
            const int64_t alone = count < kPiece ? count : kPiece;
            add_some_rows<kMostlyAll>(grad, 0, alone, numbers, lanes.whole, position, sum);
            add_rows(grad, kMostlyAll, alone, numbers, lanes.whole, position, sum);
            if (count > kPiece) {  // the pieces of the first kSuper positions, then those sums of pieces that follow
                const int64_t pieces = divide_up(count < kSuper ? count : kSuper, kPiece) - 1,
                              supers = divide_up(count, kSuper) - 1;
                const auto part = [&](int64_t i) {
                    return column + (i < pieces ? t.pieces + (start / kPiece + 1 + i) * t.dim
                                                : t.superpieces + (start / kSuper + 1 + i - pieces) * t.dim);
                };
                add_rows(sums, 0, pieces + supers, numbers, lanes.whole, part, sum);
            }
#pragma unroll
            for (int n = 0; n < kChunk<S>; ++n) {
                mine.weight[n] = to_compute(loaded.v[n]);
                if (options.grad_scale) sum[n] /= scale;
                if (of.decay.coupled != 0) sum[n] += of.decay.coupled * mine.weight[n];  // 0 times infinite would be NaN
            }
        };
        Share<S, kStates> mine;
        if constexpr (kByRow<RuleOfRows<Rule>>) {
            T squares = 0;
            for (int pass = 0; pass < lanes.passes; ++pass) {
                const int column = lanes.column<S>(pass), numbers = present ? lanes.count<S>(column) : 0;
                load(column, numbers, mine);
#pragma unroll
                for (int n = 0; n < kChunk<S>; ++n) squares += mine.grad[n] * mine.grad[n];
            }
            squares = row_sum(squares, lanes.lanes);
            T state = of.step_size;
            of.step_size = rule.rule.step_size(t.dim > 0 ? squares / T(t.dim) : T(0), state);
            if (present && lanes.lane() == 0) row_state_of<T>(t).st(row, state);
        }
        for (int pass = 0; pass < lanes.passes; ++pass) {
            const int column = lanes.column<S>(pass), numbers = present ? lanes.count<S>(column) : 0;
            if (!kByRow<RuleOfRows<Rule>> || lanes.passes > 1) load(column, numbers, mine);
            const int64_t at = row * t.dim + column;
#pragma unroll
            for (int n = 0; n < kChunk<S>; ++n) {
                const T step = rule.step(of, mine.grad[n], mine.states[n], t.states[0] != nullptr);
                mine.weight[n] = of.decay.kept * mine.weight[n] - step;
            }
            Chunk<S> rounded = to_nearest<S>(mine.weight);
            if constexpr (sizeof(S) == 2) {
                if (options.stochastic) rounded = with_noise<S>(mine.weight, t.seed, row, column);
            }
            store_chunk(weight, at, numbers, lanes.whole, rounded);
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
                if (!states[i]) continue;
                T values[kChunk<T>];
#pragma unroll
                for (int n = 0; n < kChunk<T>; ++n) values[n] = mine.states[n][i];
                store_chunk(states[i], at, numbers, lanes.whole, values);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ launches

template <typename S, typename Rule>
void update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const Rule& rule) {
    using T = Compute<S>;
    const Tables all = place_tables<S>(call);
    const int64_t positions = all.sizes.words;
    if (positions == 0) return;
    uint64_t* const sorted = sort_words(stream, call.words[0], call.words[1], positions, all.position_bits,
                                        all.position_bits + all.key_bits, call.workspace, call.workspace_bytes);
    const Words words = {{sorted, positions, "words"}, all.position_bits};
    const gmem<T> sums = {static_cast<T*>(call.sums), all.sizes.sums, "sums"};
    const auto of_windows = [&](int64_t size) {
        return [=](const Table& t) {
            return t.batch > size && t.dim > 0 ? divide_up(divide_up(t.batch, size), int64_t{kThreads} / t.lanes.lanes) : 0;
        };
    };
    for_groups(all.tables, of_windows(kPiece), [&](const Group& g, int64_t blocks) {
        launch("embedding_sum_pieces", sum_pieces<S>, {blocks, 1, 1, kThreads}, stream, g, words, sums);
    });
    for_groups(all.tables, of_windows(kSuper), [&](const Group& g, int64_t blocks) {
        launch("embedding_join_pieces", join_pieces<T>, {blocks, 1, 1, kThreads}, stream, g, words, sums);
    });
    const Options options = {decay,
                             call.stochastic,
                             {call.grad_scale, 1, "grad_scale"},
                             {call.found_inf, 1, "found_inf"},
                             {call.skip_nonfinite ? call.flags : nullptr, call.count, "flags"}};
    const int64_t bytes = Segments<T>::bytes() + arena_bytes<int>(kThreads / kWarp);
    for_groups(
        all.tables, [](const Table& t) { return divide_up<int64_t>(t.batch, kTile); },
        [&](const Group& g, int64_t blocks) {
            launch("embedding_update", update_rows<S, Rule>, {blocks, 1, 1, kThreads, bytes}, stream, g, words, options,
                   RuleOfRows<Rule>{rule}, gmem<const T>(sums));
        });
}

}  // namespace

template <typename S>
EmbeddingSizes embedding_sizes(const EmbeddingCall& call) {
    Tables all = place_tables<S>(call);
    all.sizes.sort_bytes = sort_workspace(all.sizes.words, all.position_bits, all.position_bits + all.key_bits);
    return all.sizes;
}

template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const SgdRule<Compute<S>>& rule) {
    update<S>(stream, call, decay, rule);
}
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const AdagradRule<Compute<S>>& rule) {
    update<S>(stream, call, decay, rule);
}
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay,
                      const RowwiseAdagradRule<Compute<S>>& rule) {
    update<S>(stream, call, decay, rule);
}
template <typename S>
void embedding_update(Stream stream, const EmbeddingCall& call, const DecayRule& decay, const AdamRule& rule) {
    update<S>(stream, call, decay, AdamOf<Compute<S>>{rule});
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                               \
    template EmbeddingSizes embedding_sizes<S>(const EmbeddingCall&);                                                         \
    template void embedding_update<S>(Stream, const EmbeddingCall&, const DecayRule&, const SgdRule<Compute<S>>&);            \
    template void embedding_update<S>(Stream, const EmbeddingCall&, const DecayRule&, const AdagradRule<Compute<S>>&);        \
    template void embedding_update<S>(Stream, const EmbeddingCall&, const DecayRule&, const RowwiseAdagradRule<Compute<S>>&); \
    template void embedding_update<S>(Stream, const EmbeddingCall&, const DecayRule&, const AdamRule&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
