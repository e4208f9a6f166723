// SPDX-License-Identifier: Apache-2.0
// What is looked at before a table is touched: ids, counts and gradients. Design: embedding.cu. Contracts: embedding.h.
#include "cuda/embedding_tables.cuh"

namespace dien_ops::cuda {
namespace {

// require with a format that begins with "table %lld: ", which is said where the call has several tables.
template <typename... Numbers>
DIEN_OPS_DEVICE void require_of(const Group& g, const Table& t, bool condition, const char* format, Numbers... numbers) {
    constexpr int kBeginning = sizeof("table %lld: ") - 1;
    if (condition) return;
    if (g.several) {
        require(false, format, t.number, numbers...);
    } else {
        require(false, format + kBeginning, numbers...);
    }
}

DIEN_OPS_DEVICE int64_t read_id(const Table& t, int64_t i) {
    return t.int32_ids ? number_of<int32_t>(t.ids, t.batch, i, "ids") : number_of<int64_t>(t.ids, t.batch, i, "ids");
}

// ------------------------------------------------------------------------------------------------------- ids and counts

// A thread for each position: its word, not yet sorted.
// stack allowed: 64 bytes (the messages of require)
DIEN_OPS_KERNEL(kThreads) void make_words(Group g, Words words, bool check_ids) {
    const int k = g.table();
    const Table& t = g.tables[k];
    const int64_t i = (block_index() - g.first_block[k]) * kThreads + thread_index();
    if (i >= t.batch) return;
    const int64_t id = read_id(t, i);
    const bool inside = id >= 0 && id < t.rows;
    require_of(g, t, inside || !check_ids, "table %lld: ids must be in 0..%lld, got %lld at position %lld", t.rows - 1, id, i);
    const bool left_out = !inside || id == t.padding;
    if (!left_out) {
        const double count = count_of(t, id);
        require_of(g, t, count > 0, "table %lld: counts must be positive for every id of the mini-batch, got %g for id %lld",
                   count, id);
    }
    const int64_t position = t.first_position + i;
    words.words.st(position, static_cast<uint64_t>(t.first_key + (left_out ? t.rows : id)) << words.bits |
                                 static_cast<uint64_t>(position));
}

// ------------------------------------------------------------------------------------------------------------ gradients

// Whether somebody has found something, in words of join_block's.
struct Found {
    static constexpr int kNumbers = 1;
    double v[kNumbers];

    DIEN_OPS_DEVICE void join(const Found& other) {
        if (other.v[0] > v[0]) v[0] = other.v[0];
    }
};

// A group of lanes goes through kFiniteRows rows. With flags, the block says there whether it has met a number that is not
// finite; without, such a number is an error, if nothing says that no table will change.
// stack allowed: 48 bytes (the message of require)
template <typename S>
DIEN_OPS_KERNEL(kThreads)
void find_nonfinite(Group g, Words words, gmem<const float> found_inf, gmem<int32_t> flags) {
    constexpr int kAhead = 64 / sizeof(Chunk<S>);
    const int k = g.table();
    const Table& t = g.tables[k];
    const TableWords of(words, t);
    const gmem<const S> grad = gradient_of<S>(t);
    const int64_t block = block_index() - g.first_block[k];
    const int groups = t.lanes.groups();
    int64_t first = block * groups * kFiniteRows + t.lanes.group();
    int64_t found = -1;  // the position, the column and the value that the thread has found first
    int found_column = 0;
    Compute<S> value = 0;
    for (int64_t r = 0; r < kFiniteRows; r += kAhead, first += kAhead * groups) {
        for (int pass = 0; pass < t.lanes.passes; ++pass) {
            const int column = t.lanes.column<S>(pass), numbers = t.lanes.count<S>(column);
            Chunk<S> loaded[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int64_t position = first + i * groups;
                const bool counted = position < t.batch && of.row(position) != t.rows;
                loaded[i] = load_chunk(grad, position * t.dim + column, counted ? numbers : 0, t.lanes.whole);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
#pragma unroll
                for (int n = 0; n < kChunk<S>; ++n) {
                    const Compute<S> x = to_compute(loaded[i].v[n]);
                    if (x - x == 0 || found >= 0) continue;
                    found = first + i * groups, found_column = column + n, value = x;
                }
            }
        }
    }
    if (flags) {
        const Found any = join_block(Found{found >= 0 ? 1.0 : 0.0});
        if (thread_index() == 0) flags.st(t.flags + block, any.v[0] > 0 ? 1 : 0);
    } else if (found >= 0 && (!found_inf || found_inf.ld(0) == 0)) {
        require_of(g, t, false, "table %lld: grad must be finite, got %g at position %lld (id %lld), column %lld", value, found,
                   of.row(found), found_column);
    }
}

// flags[number of the table] = whether one of its blocks has met a number that is not finite. A block for each table.
DIEN_OPS_KERNEL(kThreads) void join_flags(Group g, gmem<int32_t> flags) {
    const Table& t = g.tables[g.table()];
    Found found = {};
    for (int64_t i = thread_index(); i < t.flag_count; i += kThreads) found.join({{double(flags.ld(t.flags + i))}});
    found = join_block(found);
    if (thread_index() == 0) flags.st(t.number, found.v[0] > 0 ? 1 : 0);
}

}  // namespace

template <typename S>
void embedding_check(Stream stream, const EmbeddingCall& call) {
    const Tables all = place_tables<S>(call);
    const Words words = {{call.words[0], all.sizes.words, "words"}, all.position_bits};
    for_groups(
        all.tables, [](const Table& t) { return divide_up<int64_t>(t.batch, kThreads); },
        [&](const Group& g, int64_t blocks) {
            launch("embedding_check", make_words, {blocks, 1, 1, kThreads}, stream, g, words, call.check_ids);
        });
    if (!call.refuse_nonfinite && !call.skip_nonfinite) return;
    const int64_t bytes = join_block_bytes<Found>(kThreads);
    const gmem<int32_t> flags = {call.skip_nonfinite ? call.flags : nullptr, all.sizes.flags, "flags"};
    const gmem<const float> found_inf = {call.found_inf, 1, "found_inf"};
    for_groups(
        all.tables, [](const Table& t) { return t.flag_count; },
        [&](const Group& g, int64_t blocks) {
            launch("embedding_find_nonfinite", find_nonfinite<S>, {blocks, 1, 1, kThreads, bytes}, stream, g, words, found_inf,
                   flags);
        });
    if (!call.skip_nonfinite) return;
    for_groups(
        all.tables, [](const Table&) { return 1; },
        [&](const Group& g, int64_t blocks) {
            launch("embedding_join_flags", join_flags, {blocks, 1, 1, kThreads, bytes}, stream, g, flags);
        });
}

template void embedding_check<float>(Stream, const EmbeddingCall&);
template void embedding_check<double>(Stream, const EmbeddingCall&);
template void embedding_check<BFloat16>(Stream, const EmbeddingCall&);
template void embedding_check<Half>(Stream, const EmbeddingCall&);

}  // namespace dien_ops::cuda
