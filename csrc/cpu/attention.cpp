// SPDX-License-Identifier: Apache-2.0
// a_t = softmax_t(h_t W e_a) (DIEN eq. 8), for the C targets a of each sequence. Contracts: attention.h.
//
// h_t W e_a is taken as h_t . g with g = W e_a: g costs one small product per target, and the states are then read once,
// whatever their number, and never projected. With a few targets each logit is a dot product straight from the states, at the
// speed of memory. With many (serving scores hundreds of ads for one user) the sequence's states are packed, transposed, and
// one register-tiled product gives the logits of all targets.
//
// A thread takes blocks of consecutive sequences. Everything of a sequence stays in its caches: logits become scores in place,
// over the valid steps alone; the padding's scores are set to 0 and its states are never read.
//
// Backward, with d the gradient of the logits: grad h_t = sum over c of d_ct g_c and grad g_c = sum over t of d_ct h_t per
// sequence, then grad e = W^T grad g and grad W = sum of grad g e^T per block. A block writes its share of grad W to memory of
// its own, and the shares are summed in the order of the blocks, so that the bits do not depend on the threads.
#include "cpu/attention.h"

#include "cpu/attention_rows.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace dien_ops::cpu {
namespace {

// From so many targets on, packing the states pays.
constexpr int64_t kManyTargets = 4;

template <typename F, typename Problem>
void for_blocks(const Problem& p, int64_t block_begin, int64_t block_end, F&& f) {
    for (int64_t block = block_begin; block < block_end; ++block) {
        const int64_t begin = block * p.sequences_per_block, left = p.batch - begin;
        f(block, begin, begin + (left < p.sequences_per_block ? left : p.sequences_per_block));
    }
}

// `rows` rows of n numbers, `stride` apart.
template <typename T>
void fill_zero_rows(T* p, int64_t stride, int64_t rows, int64_t n) {
    if (stride == n) return fill_zeros(p, rows * n);
    for (int64_t r = 0; r < rows; ++r) fill_zeros(p + r * stride, n);
}

}  // namespace

template <Capability kTarget, typename T>
int64_t bilinear_attention_packed_size(int64_t hidden_size, int64_t target_size) {
    const int64_t forward = packed_size<T>(target_size, hidden_size), backward = packed_size<T>(hidden_size, target_size);
    return forward > backward ? forward : backward;
}

template <Capability kTarget, typename T>
void bilinear_attention_pack(const BilinearAttentionForward<T>& p) {
    pack(p.weight, 1, p.target_size, p.target_size, p.hidden_size, p.packed);
}

template <Capability kTarget, typename T>
void bilinear_attention_forward(const BilinearAttentionForward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.targets, steps = p.steps, H = p.hidden_size, A = p.target_size;
    const bool many = C >= kManyTargets;
    const Scratch<T> packed_states(many ? packed_size<T>(H, steps) : 0);
    for_blocks(p, block_begin, block_end, [&](int64_t, int64_t begin, int64_t end) {
        multiply<T>(p.target + begin * C * A, A, p.packed, nullptr, false, p.projected + begin * C * H, H, (end - begin) * C, H,
                    A);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t length = p.lengths[b];
            const T* states = p.states + b * p.state_stride_b;
            const T* projected = p.projected + b * C * H;
            T* scores = p.scores + b * C * steps;
            if (many) {
                pack<T>(states, 1, p.state_stride_t, H, length, packed_states);
                multiply<T>(projected, H, packed_states, nullptr, false, scores, steps, C, length, H);
            }
            for (int64_t c = 0; c < C; ++c) {
                T* row = scores + c * steps;
                if (!many) dot_rows(states, p.state_stride_t, projected + c * H, row, length, H);
                softmax_row(row, length);
                fill_zeros(row + length, steps - length);
            }
        }
    });
}

template <Capability kTarget, typename T>
void bilinear_attention_backward_pack(const BilinearAttentionBackward<T>& p) {
    pack(p.weight, p.target_size, 1, p.hidden_size, p.target_size, p.packed);
}

template <Capability kTarget, typename T>
void bilinear_attention_backward(const BilinearAttentionBackward<T>& p, int64_t block_begin, int64_t block_end) {
    const int64_t C = p.targets, steps = p.steps, H = p.hidden_size, A = p.target_size;
    const Scratch<T> grad_logits(C * steps), transposed(C * steps);  // [C, T] and [T, C]
    for_blocks(p, block_begin, block_end, [&](int64_t block, int64_t begin, int64_t end) {
        fill_zeros(p.grad_projected + begin * C * H, (end - begin) * C * H);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t length = p.lengths[b];
            for (int64_t c = 0; c < C; ++c) {
                const int64_t row = (b * C + c) * steps;
                softmax_row_gradient<T>(p.scores + row, p.grad_scores + row, grad_logits + c * steps, length);
                for (int64_t t = 0; t < length; ++t) transposed[t * C + c] = grad_logits[c * steps + t];
            }
            const T* states = p.states + b * p.state_stride_b;
            T* grad_states = p.grad_states + b * p.state_stride_b;
            fill_zero_rows(grad_states, p.state_stride_t, steps, H);
            accumulate_outer<T>(grad_logits, steps, p.projected + b * C * H, H, grad_states, p.state_stride_t, length, H, C);
            accumulate_outer<T>(transposed, C, states, p.state_stride_t, p.grad_projected + b * C * H, H, C, H, length);
        }
        const int64_t rows = (end - begin) * C;
        const T* grad_projected = p.grad_projected + begin * C * H;
        multiply<T>(grad_projected, H, p.packed, nullptr, false, p.grad_target + begin * C * A, A, rows, A, H);
        accumulate_outer<T>(grad_projected, H, p.target + begin * C * A, A, p.partial_weights + block * H * A, A, H, A, rows);
    });
}

template <Capability kTarget, typename T>
void bilinear_attention_reduce(const BilinearAttentionBackward<T>& p) {
    const int64_t size = p.hidden_size * p.target_size;
    for (int64_t block = 0; block < p.blocks(); ++block) {
        for (int64_t i = 0; i < size; ++i) p.grad_weight[i] += p.partial_weights[block * size + i];
    }
}

#define DIEN_OPS_INSTANTIATE(T)                                                                                       \
    template int64_t bilinear_attention_packed_size<kCapability, T>(int64_t, int64_t);                                \
    template void bilinear_attention_pack<kCapability, T>(const BilinearAttentionForward<T>&);                        \
    template void bilinear_attention_forward<kCapability, T>(const BilinearAttentionForward<T>&, int64_t, int64_t);   \
    template void bilinear_attention_backward_pack<kCapability, T>(const BilinearAttentionBackward<T>&);              \
    template void bilinear_attention_backward<kCapability, T>(const BilinearAttentionBackward<T>&, int64_t, int64_t); \
    template void bilinear_attention_reduce<kCapability, T>(const BilinearAttentionBackward<T>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cpu
