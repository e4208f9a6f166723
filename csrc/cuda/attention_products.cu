// SPDX-License-Identifier: Apache-2.0
// The products of matrices in softmax attention. Those with W, g = W e_a and from the gradient of g those of e_a and of W, are
// each one product over all targets of the batch; the gradient of W is summed in parts of about kRowsPerPart targets, which
// reduce_parts adds in order. None is large: 2 B C H A operations, 34 million for B1024 C1 H128 A128, and what is read fits the
// L2 cache. Those with the gradient d of the logits, where targets are many, are one product for each sequence: grad h = d^T g
// and grad g = d h.
#include <algorithm>

#include "cuda/attention.h"
#include "cuda/elements.cuh"
#include "cuda/products.cuh"

namespace dien_ops::cuda {
namespace {

template <typename S>
gmem<const S> targets(const BilinearAttentionProblem<S>& p) {
    return {p.target, p.rows() * p.target_size, "target"};
}
template <typename S>
gmem<const Compute<S>> weight(const BilinearAttentionProblem<S>& p) {
    return {p.weight, p.hidden_size * p.target_size, "weight"};
}

}  // namespace

template <typename S>
void bilinear_attention_project(Stream stream, const BilinearAttentionProblem<S>& p, Compute<S>* projected) {
    const int64_t N = p.rows(), H = p.hidden_size, A = p.target_size;
    with_math<S>(p.tf32, [&](auto math) {
        multiply_many<decltype(math)>("bilinear_attention_project", stream, product_side(targets(p), 0, A, 1, N, A),
                                      product_side(weight(p), 0, A, 1, H, A), {1, N, H, A, 0, H, ProductSizes::none}, {},
                                      gmem<Compute<S>>{projected, N * H, "projected"});
    });
}

template <typename S>
void bilinear_attention_product_gradients(Stream stream, const BilinearAttentionBackward<S>& p, const Compute<S>* grad_logits) {
    using T = Compute<S>;
    const int64_t B = p.batch, C = p.targets, steps = p.steps, H = p.hidden_size;
    const int64_t stride_b = p.state_stride_b, stride_t = p.state_stride_t;
    const gmem<const T> d = {grad_logits, B * C * steps, "gradients of logits"}, g = {p.projected, B * C * H, "projected"};
    const gmem<const S> states = {p.states, B * steps * H, "states"};
    const gmem<const int64_t> lengths = {p.lengths, B, "lengths"};
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        multiply_many<Math>("bilinear_attention_state_gradient", stream, product_side(d, C * steps, 1, steps, steps, C),
                            product_side(g, C * H, 1, H, H, C), {B, steps, H, C, stride_b, stride_t, ProductSizes::limit_rows},
                            lengths, gmem<S>{p.grad_states, B * steps * H, "grad_states"});
        multiply_many<Math>("bilinear_attention_projected_gradient", stream, product_side(d, C * steps, steps, 1, C, steps),
                            product_side(states, stride_b, 1, stride_t, H, steps),
                            {B, C, H, steps, C * H, H, ProductSizes::limit_depth}, lengths,
                            gmem<T>{p.grad_projected, B * C * H, "grad_projected"});
    });
}

template <typename S>
int64_t bilinear_attention_weight_parts(const BilinearAttentionProblem<S>& p) {
    constexpr int64_t kRowsPerPart = 64, kMostParts = 128, kMostBytes = 64 << 20;
    const int64_t bytes = p.hidden_size * p.target_size * sizeof(Compute<S>);
    const int64_t fit = bytes == 0 ? kMostParts : kMostBytes / bytes;
    return std::max<int64_t>(1, std::min({p.rows() / kRowsPerPart, kMostParts, fit}));
}

template <typename S>
void bilinear_attention_project_backward(Stream stream, const BilinearAttentionBackward<S>& p) {
    using T = Compute<S>;
    const int64_t N = p.rows(), H = p.hidden_size, A = p.target_size, parts = bilinear_attention_weight_parts<S>(p);
    const gmem<const T> grad_projected = {p.grad_projected, N * H, "grad_projected"};
    with_math<S>(p.tf32, [&](auto math) {
        using Math = decltype(math);
        multiply_many<Math>("bilinear_attention_target_gradient", stream, product_side(grad_projected, 0, H, 1, N, H),
                            product_side(weight(p), 0, 1, A, A, H), {1, N, A, H, 0, A, ProductSizes::none}, {},
                            gmem<S>{p.grad_target, N * A, "grad_target"});
        multiply_many<Math>("bilinear_attention_weight_gradient", stream, product_side(grad_projected, 0, 1, H, H, N),
                            product_side(targets<S>(p), 0, 1, A, A, N), {parts, H, A, N, H * A, A, ProductSizes::parts}, {},
                            gmem<T>{p.partial_weights, parts * H * A, "partial weights"});
    });
    launch("bilinear_attention_reduce_parts", reduce_parts<T>, element_grid(H * A), stream,
           gmem<const T>{p.partial_weights, parts * H * A, "partial weights"}, parts, H * A, H * A, 0, H * A,
           gmem<T>{p.grad_weight, H * A, "grad_weight"});
}

#define DIEN_OPS_INSTANTIATE(S)                                                                                            \
    template void bilinear_attention_project<S>(Stream, const BilinearAttentionProblem<S>&, Compute<S>*);                  \
    template void bilinear_attention_product_gradients<S>(Stream, const BilinearAttentionBackward<S>&, const Compute<S>*); \
    template int64_t bilinear_attention_weight_parts<S>(const BilinearAttentionProblem<S>&);                               \
    template void bilinear_attention_project_backward<S>(Stream, const BilinearAttentionBackward<S>&);
DIEN_OPS_INSTANTIATE(float)
DIEN_OPS_INSTANTIATE(double)
DIEN_OPS_INSTANTIATE(BFloat16)
DIEN_OPS_INSTANTIATE(Half)
#undef DIEN_OPS_INSTANTIATE

}  // namespace dien_ops::cuda
