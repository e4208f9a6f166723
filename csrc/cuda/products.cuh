// SPDX-License-Identifier: Apache-2.0
// Products of matrices that lie in global memory in any order and may be of different formats: many small ones in one launch,
// or one whose sum is cut into parts. What is read goes through shared memory, kProductDepth numbers of k at a time, rounded to
// the operand type on its way; neighbouring threads read neighbouring numbers.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace dien_ops::cuda {

constexpr int kProductWarps = 4;
constexpr int kProductRows = 64;   // of a block
constexpr int kProductDepth = 32;  // k at a time

// A side of a product: the number of (product, line, k) is memory[product * of_product + line * of_line + k * of_depth], where
// lines are the rows of A or the columns of B.
template <typename S>
struct ProductSide {
    gmem<const S> memory;
    int64_t of_product, of_line, of_depth;  // one of the last two is 1
    bool paired;                            // numbers may be read two at a time

    DIEN_OPS_DEVICE int64_t first(int64_t product) const { return product * of_product; }
};

// lines, depth: the side's sizes.
template <typename S>
ProductSide<S> product_side(const gmem<const S>& memory, int64_t of_product, int64_t of_line, int64_t of_depth, int64_t lines,
                            int64_t depth) {
    const auto even = [](auto... numbers) { return ((numbers % 2 == 0) && ...); };
    const bool aligned = reinterpret_cast<uintptr_t>(memory.ptr) % (2 * sizeof(S)) == 0;
    const bool paired = aligned && (of_depth == 1 ? even(of_product, of_line, depth) : even(of_product, of_depth, lines));
    return {memory, of_product, of_line, of_depth, paired};
}

// Where a block keeps kProductDepth numbers of its rows and of kColumns columns.
template <typename Math, int kColumns>
struct ProductMemory {
    using Operand = typename Math::Operand;
    static constexpr int kTiles = kProductDepth / Math::kDepth, kStride = padded_stride<Math>(kTiles);
    view<Operand> a, b;

    static int64_t bytes() {
        return arena_bytes<Operand>(kProductRows * kStride) + arena_bytes<Operand>(kColumns * kProductDepth);
    }
    DIEN_OPS_DEVICE explicit ProductMemory(Arena& arena)
        : a(arena.take<Operand>(kProductRows * kStride, "A")), b(arena.take<Operand>(kColumns * kProductDepth, "B")) {}

    DIEN_OPS_DEVICE void set_a(int row, int k, Compute<typename Math::Storage> x) const {
        a.st(row * kStride + k, Math::operand(x));
    }
    DIEN_OPS_DEVICE void set_b(int column, int k, Compute<typename Math::Storage> x) const {
        const int tile = k / Math::kDepth * (kColumns / kTileColumns) + column / kTileColumns;
        b.st(tile * kTileNumbers<Math> + Math::position(column % kTileColumns, k % Math::kDepth), Math::operand(x));
    }
};

// Calls set(line, k, number) for all kLines lines and kProductDepth numbers of a side that begins at `first`; zeros where there
// are only `lines` or `depth` of them.
template <int kLines, typename S, typename F>
DIEN_OPS_DEVICE void read_side(const ProductSide<S>& side, int64_t first, int64_t lines, int64_t depth, const F& set) {
    constexpr int kThreads = kProductWarps * kWarp;
    const bool along_depth = side.of_depth == 1;
#pragma unroll 4
    for (int i = thread_index() * 2; i < kLines * kProductDepth; i += kThreads * 2) {
        const int line = along_depth ? i / kProductDepth : i % kLines, k = along_depth ? i % kProductDepth : i / kLines;
        const int64_t left = along_depth ? (line < lines ? depth - k : 0) : (k < depth ? lines - line : 0);
        const int count = left < 0 ? 0 : left < 2 ? static_cast<int>(left) : 2;
        const auto pair =
            unpack<S>(load_pair(side.memory, first + line * side.of_line + k * side.of_depth, count, side.paired));
        set(line, k, pair.v[0]);
        // A pair may reach beyond what lengths limit, where anything may lie.
        set(along_depth ? line : line + 1, along_depth ? k + 1 : k, count > 1 ? pair.v[1] : Compute<S>(0));
    }
}

// d += A B over k in [begin, end), by all threads of the block: `rows` rows from a_first on and `columns` columns from b_first
// on, of kProductRows and kColumns. The warps stand kWarpRows by kProductWarps / kWarpRows.
template <typename Math, int kWarpRows, int kRowTiles, int kColumnTiles, int kColumns, typename SA, typename SB>
DIEN_OPS_DEVICE void add_products(Accumulator<Math> (&d)[kRowTiles][kColumnTiles][4],
                                  const ProductMemory<Math, kColumns>& memory, const ProductSide<SA>& a, int64_t a_first,
                                  int64_t rows, const ProductSide<SB>& b, int64_t b_first, int64_t columns, int64_t begin,
                                  int64_t end) {
    using Memory = ProductMemory<Math, kColumns>;
    using T = Accumulator<Math>;
    static_assert(kWarpRows * kRowTiles * kTileRows == kProductRows);
    static_assert(kProductWarps / kWarpRows * kColumnTiles * kTileColumns == kColumns);
    const int row = warp_index() % kWarpRows * kRowTiles * kTileRows, column_tile = warp_index() / kWarpRows * kColumnTiles;
    for (int64_t k = begin; k < end; k += kProductDepth) {
        read_side<kProductRows>(a, a_first + k * a.of_depth, rows, end - k,
                                [&](int line, int depth, T x) { memory.set_a(line, depth, x); });
        read_side<kColumns>(b, b_first + k * b.of_depth, columns, end - k,
                            [&](int line, int depth, T x) { memory.set_b(line, depth, x); });
        sync_block();
        multiply_tiles<Math>(d, memory.a, row * Memory::kStride, Memory::kStride, memory.b, column_tile,
                             kColumns / kTileColumns, 0, Memory::kTiles);
        sync_block();
    }
}

// Many products in one launch: out [products, rows, columns] = A B.
struct ProductSizes {
    int64_t products, rows, columns, depth;
    int64_t out_of_product, out_of_row;  // from one to the next
    // What lengths limit: the rows, behind which zeros are written, or the depth. parts: all products are parts of one, and
    // each takes its share of the depth.
    enum Limit { none, limit_rows, limit_depth, parts } limit;
};

namespace {

constexpr int kProductColumns = 64;  // of a block

template <typename Math, typename SA, typename SB, typename Out>
DIEN_OPS_KERNEL(kProductWarps* kWarp)
void multiply_blocks(ProductSide<SA> a, ProductSide<SB> b, ProductSizes sizes, gmem<const int64_t> lengths, gmem<Out> out,
                     bool paired) {
    using T = Accumulator<Math>;
    Arena arena;
    const ProductMemory<Math, kProductColumns> memory(arena);
    const int64_t row_blocks = divide_up<int64_t>(sizes.rows, kProductRows);
    const int64_t product = block_index() / row_blocks, row = block_index() % row_blocks * kProductRows;
    const int64_t column = block_index_y() * kProductColumns;
    int64_t rows = sizes.rows, begin = 0, end = sizes.depth;
    if (sizes.limit == ProductSizes::parts) {
        begin = sizes.depth * product / sizes.products, end = sizes.depth * (product + 1) / sizes.products;
    } else if (lengths && sizes.limit == ProductSizes::limit_rows) {
        rows = lengths.ld(product);
    } else if (lengths && sizes.limit == ProductSizes::limit_depth) {
        end = lengths.ld(product);
    }

    T d[2][4][4] = {};
    if (row < rows) {  // the whole block
        add_products<Math, 2>(d, memory, a, a.first(product) + row * a.of_line, rows - row, b,
                              b.first(product) + column * b.of_line, sizes.columns - column, begin, end);
    }

    const int first_row = warp_index() % 2 * 2 * kTileRows, first_tile = warp_index() / 2 * 4;
    for_lane_rows<2>([&](int m, int half, int lane_row) {
        const int64_t r = row + first_row + lane_row;
        if (r >= sizes.rows) return;
        const int64_t offset = product * sizes.out_of_product + r * sizes.out_of_row;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int64_t c = column + (first_tile + n) * kTileColumns + tile_column();
            const int64_t left = sizes.columns - c;
            const int count = left < 0 ? 0 : left < 2 ? static_cast<int>(left) : 2;
            const Pack<T, 2> pair = {d[m][n][half * 2], d[m][n][half * 2 + 1]};
            store_pair(out, offset + c, count, paired, r < rows ? pair : Pack<T, 2>{});
        }
    });
}

}  // namespace

template <typename Math, typename SA, typename SB, typename Out>
void multiply_many(const char* name, Stream stream, const ProductSide<SA>& a, const ProductSide<SB>& b,
                   const ProductSizes& sizes, const gmem<const int64_t>& lengths, const gmem<Out>& out) {
    const bool paired = reinterpret_cast<uintptr_t>(out.ptr) % (2 * sizeof(Out)) == 0 && sizes.columns % 2 == 0 &&
                        sizes.out_of_row % 2 == 0 && sizes.out_of_product % 2 == 0;
    const Grid grid = {sizes.products * divide_up<int64_t>(sizes.rows, kProductRows),
                       divide_up<int64_t>(sizes.columns, kProductColumns), 1, kProductWarps * kWarp,
                       ProductMemory<Math, kProductColumns>::bytes()};
    launch(name, multiply_blocks<Math, SA, SB, Out>, grid, stream, a, b, sizes, lengths, out, paired);
}

}  // namespace dien_ops::cuda
