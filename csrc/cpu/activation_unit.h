// SPDX-License-Identifier: Apache-2.0
// The local activation unit (DIN eq. 3) on the CPU: contracts. Design: activation_unit_forward.cpp and
// activation_unit_backward.cpp.
//
// Rows are the valid steps of the valid (sequence, target) pairs, pair by pair; padding has no row. Tiles are runs of whole
// pairs, partitions are runs of whole tiles. Callers fill a struct, run unit_prepare, and then the stages:
//
//   forward   0, 1, .., L       stage l < L computes hidden layer l, stage L the scores and the pooled vector
//   backward  L, L - 1, .., 0   stage L takes the gradient back to hidden layer L - 1, stage l < L through hidden layer l
//
// Where Dice uses batch statistics, a stage must be complete for the whole batch before the next begins, and unit_statistics
// (unit_feedback) for its layer comes between the two. Else one call runs all stages, tile by tile.
#pragma once

#include <cstdint>

#include "common/activation_unit.h"
#include "common/dice.h"
#include "cpu/capability.h"

namespace dien_ops::cpu {

// Hidden values have rows of `width` = outputs rounded up to kUnitAlignment bytes, so that no loop over them has a remainder.

// The widest panels of packed weights (cpu/gemm.h) of any instruction set, in bytes.
constexpr int64_t kUnitLargestPanel = 192;

// A weight matrix W [outputs, inputs], ready for x W^T and for g W.
template <typename T>
struct UnitMatrix {
    int64_t inputs, outputs, input_width, width;  // the last two are padded; input_width of the first layer is not: D
    T* transposed;                                // [input_width, width]: W^T, 0 where padded
    T* forward;                                   // `transposed`, packed: inputs * width rounded up to the panel
    T* backward;                                  // W, packed: outputs * input_width rounded up to the panel; null in forward
    int64_t gradient;                             // where its gradient [input_width, width] lies in a partition's share
};

template <typename T>
struct UnitLayer {
    UnitMatrix<T> matrix;  // of the first layer: the keys' part, W_k - W_d
    const T* weight;       // [outputs, inputs], [outputs, 4 D] for the first layer
    const T* bias;         // [outputs]
    const T* alpha;        // [outputs]; null for the sigmoid, and for a layer without activation
    T* mean;               // [width]: Dice's statistics, given, or zeros until unit_statistics has run
    T* var;                // [width]: likewise
    T* padded_bias;        // [width]
    T* columns;            // [4, width]: what Dice needs per column; alpha is its last row
    T* feedback;           // [2, width]: written by unit_feedback
    int64_t offset;        // the widths of the layers below it: where it lies in a buffer of hidden values
};

// The valid steps of one target of one sequence.
struct UnitPair {
    int64_t sequence, pair, first_row, rows;  // pair = sequence * C + target
};

// What forward and backward share. All pointers are borrowed for the duration of the call.
template <typename T>
struct UnitProblem {
    int64_t targets, steps, embedding_dim;  // C, T, D
    int64_t hidden_layers;                  // L
    Activation activation;
    bool batch_statistics, softmax;
    DiceEps eps;

    const T* query;                // [B, C, D]
    const T* keys;                 // [B, T, D]
    const UnitLayer<T>* layers;    // the L hidden layers; where there are none, the output layer alone
    UnitMatrix<T> query_matrix;    // W_q + W_d, of the first layer
    UnitMatrix<T> product_matrix;  // W_p
    const T* output_weight;        // [width of the last hidden layer], 0 where padded; null where L = 0
    T output_bias;                 // 0 where L = 0

    const UnitPair* pairs;  // those with rows, in order
    const int64_t* tiles;   // [tiles + 1]: the first pair of each tile
    int64_t tile_count, row_count;
    int64_t most_tile_rows, most_tile_pairs;
    int64_t total_width;  // of all layers
    T* hidden;            // with batch statistics: [hidden_rows] rows of each layer, before the activation; else null
    int64_t hidden_rows;
};

// Fills the matrices, the padded biases and the columns. Everything else runs after it.
template <Capability kTarget, typename T>
void unit_prepare(const UnitProblem<T>& p);

template <typename T>
struct UnitForward : UnitProblem<T> {
    double* moments;  // [tiles, 1 + 2 * the largest width], zeros before every stage; with batch statistics only
    T* scores;        // [B, C, T], zeros
    T* pooled;        // [B, C, D], zeros
};

template <Capability kTarget, typename T>
void unit_forward(const UnitForward<T>& p, int64_t first_stage, int64_t last_stage, int64_t tile_begin, int64_t tile_end);
// The batch's mean and variance of a layer, and its columns, from the moments of its stage; sets these to 0 again.
template <Capability kTarget, typename T>
void unit_statistics(const UnitForward<T>& p, int64_t layer);

template <typename T>
struct UnitBackward : UnitProblem<T> {
    const T* scores;            // [B, C, T], the forward's
    const T* grad_pooled;       // [B, C, D] or null (zeros)
    const T* grad_scores;       // [B, C, T] or null (zeros)
    const int64_t* partitions;  // [partitions + 1]: the first tile of each partition
    int64_t partition_count;

    // The sequence, some targets of which are in an earlier partition; -1 where there is none.
    int64_t continued_sequence(int64_t partition) const {
        const UnitPair& first = this->pairs[this->tiles[partitions[partition]]];
        return first.pair % this->targets != 0 ? first.sequence : -1;
    }

    T* logit_gradient;  // with batch statistics: [hidden_rows], of the scores before the softmax; else null
    T* shares;          // [partitions, share_size], zeros: each partition's share of the parameters' gradients
    int64_t share_size;
    double* sums;             // [partitions, 4 * total_width + 1], zeros: of each layer [4, width], three sums of Dice, the
                              // first of which is alpha's gradient, and the bias's gradient; then that of the output's bias
    int64_t output_gradient;  // where the output weight's gradient [width of the last hidden layer] lies in a share
    T* grad_query;            // [B, C, D], zeros
    T* grad_keys;             // [B, T, D], zeros
    T* continued_keys;        // [partitions, T, D], zeros: what they add for a sequence that an earlier one began; null for
                              // C = 1, where there is none
};

// Stages first_stage, first_stage - 1, .., last_stage.
template <Capability kTarget, typename T>
void unit_backward(const UnitBackward<T>& p, int64_t first_stage, int64_t last_stage, int64_t partition_begin,
                   int64_t partition_end);
// Adds up a layer's three sums of Dice, into the first partition's, and with batch statistics fills its feedback.
template <Capability kTarget, typename T>
void unit_feedback(const UnitBackward<T>& p, int64_t layer);
// Adds up all shares and the other sums, into the first partition's, and the gradients of continued sequences' keys.
template <Capability kTarget, typename T>
void unit_reduce(const UnitBackward<T>& p);

}  // namespace dien_ops::cpu
