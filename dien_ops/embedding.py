# SPDX-License-Identifier: Apache-2.0
"""Sparse updates of embedding tables with mini-batch aware L2 (DIN eq. 6-7)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dien_ops import _checks

# -------------------------------------------------------------------------------------------------- operators


def _updates_in_place(*_: Any) -> None:
    """The fake rule of an operator that returns nothing."""


for _name in ("mba_sgd_", "mba_adagrad_", "mba_rowwise_adagrad_", "mba_adam_", "mba_check", "advise_huge_pages"):
    torch.library.register_fake(f"dien_ops::{_name}", _updates_in_place)

# ------------------------------------------------------------------------------------------------- functional

COUNT_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
DECAYS = ("mini_batch_aware", "decoupled", "difacto")  # of every rule
SGD_DECAYS = (*DECAYS, "lazy")
NO_PADDING = -1  # the operators' padding_idx where there is none


def check_counts(counts: Tensor | None, weight: Tensor) -> None:
    """Type, shape and device; that they are positive is checked by the operator, where a batch meets them."""
    if counts is None:
        return
    _checks.tensor("counts", counts)
    if counts.dtype not in COUNT_DTYPES:
        raise ValueError(f"counts must be int32, int64, float32 or float64, got {counts.dtype}")
    _checks.shape("counts", counts, [weight.shape[0]], "[num_embeddings]")
    _checks.same_device("weight", weight, "counts", counts)


def check_betas(betas: tuple[float, float]) -> None:
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be a pair of numbers, got {type(betas).__name__}")
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {len(betas)} of them")
    _checks.fraction("betas[0]", betas[0])
    _checks.fraction("betas[1]", betas[1])


def check_options(
    lr: float, l2: float, decay: str, nonfinite: str, check_ids: bool, seed: int | None, decays: Sequence[str]
) -> None:
    """The options of every rule."""
    _checks.non_negative("lr", lr)
    _checks.non_negative("l2", l2)
    _checks.one_of("decay", decay, decays)
    _checks.one_of("nonfinite", nonfinite, ("propagate", "skip", "error"))
    _checks.boolean("check_ids", check_ids)
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"seed must be an integer or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in -2**63..2**63-1, got {seed}")


def check_lazy(momentum: float, counts: Tensor | None) -> None:
    """What decay="lazy" does not go with."""
    if momentum != 0.0:
        raise ValueError(f'momentum must be 0 where decay is "lazy", got {momentum}')
    if counts is not None:
        raise ValueError('counts must be None where decay is "lazy", which decays all rows alike')


def sparse_rows(grad: Tensor, weight: Tensor, remedy: str) -> tuple[Tensor, Tensor]:
    """The ids [N] and the gradient rows [N, D] of a sparse gradient, as they are: not coalesced."""
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        came = "dense" if grad.layout == torch.strided else "sparse"
        raise RuntimeError(
            f"grad must be of sparse rows, as nn.Embedding(sparse=True) and dien_ops.MBAEmbedding give it, got a "
            f"{came} matrix: {remedy}"
        )
    _checks.shape("grad", grad, weight.shape, "[num_embeddings, D]")
    return grad._indices()[0], grad._values()


def as_computed(decay: str, counts: Tensor | None) -> tuple[str, Tensor | None]:
    """The decay of the operators, and its counts: DiFacto's is the mini-batch aware one with n_j = 1."""
    return ("mini_batch_aware", None) if decay == "difacto" else (decay, counts)


def _normalized(padding_idx: int | None, num_embeddings: int) -> int:
    """padding_idx in 0..num_embeddings-1; as in torch, a negative one counts from the end."""
    if padding_idx is None:
        return NO_PADDING
    if not isinstance(padding_idx, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"padding_idx must be an integer, got {type(padding_idx).__name__}")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be in {-num_embeddings}..{num_embeddings - 1}, got {padding_idx}")
    return padding_idx if padding_idx >= 0 else padding_idx + num_embeddings


def _check_number_on_device(name: str, value: Tensor | None, weight: Tensor) -> None:
    """grad_scale or found_inf, as a GradScaler has them."""
    if value is None:
        return
    _checks.tensor(name, value)
    if value.dtype != torch.float32 or value.numel() != 1:
        raise ValueError(f"{name} must be one float32 number, got {value.dtype} of shape {list(value.shape)}")
    _checks.same_device("weight", weight, name, value)


def _mini_batch(
    weight: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    states: dict[str, Tensor],  # of the computing dtype; their shapes are checked by the operator
    lr: float,
    l2: float,
    counts: Tensor | None,
    padding_idx: int | None,
    decay: str,
    nonfinite: str,
    check_ids: bool,
    seed: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decays: Sequence[str] = DECAYS,
) -> tuple[list[list[Any]], list[Any]]:
    """Checks what all updates share. Returns the operators' lists, from ids to seeds, each of one table, and their
    options from grad_scale to l2."""
    _checks.supported("weight", weight)
    _checks.rank("weight", weight, 2)
    for name, value in {"grad": grad, **states}.items():
        _checks.tensor(name, value)
    if ids is None:
        ids, grad = sparse_rows(grad, weight, "give the ids of a dense one")
    _checks.tensor("ids", ids)
    _checks.matches("weight", weight, grad=grad)
    _checks.states("weight", weight, **states)
    _checks.same_device("weight", weight, "ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    num_embeddings, dim = weight.shape
    _checks.shape("grad", grad, [*ids.shape, dim], "[*ids.shape, D]")
    check_counts(counts, weight)
    check_options(lr, l2, decay, nonfinite, check_ids, seed, decays)
    _check_number_on_device("grad_scale", grad_scale, weight)
    _check_number_on_device("found_inf", found_inf, weight)
    decay, counts = as_computed(decay, counts)
    lists: list[list[Any]] = [
        [ids.reshape(-1)],
        [grad.reshape(ids.numel(), dim)],
        [] if counts is None else [counts],
        [_normalized(padding_idx, num_embeddings)],
        [] if seed is None else [seed],
    ]
    return lists, [grad_scale, found_inf, decay, nonfinite, check_ids, lr, l2]


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd, so that a backward that needs the old values raises instead of using the new ones."""
    if not torch.compiler.is_compiling():  # which tracks what it writes by itself
        tracked = [t for t in tensors if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(tracked)


@torch.no_grad()
def mba_sgd_(
    weight: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    decay: str = "mini_batch_aware",
    decayed: Tensor | None = None,
    log_decay: float | None = None,
    nonfinite: str = "propagate",
    check_ids: bool = True,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Updates an embedding table by SGD with mini-batch aware L2 (DIN eq. 7), in place.

    For every id j of the mini-batch, once, however often it occurs:

    .. math:: w_j \leftarrow w_j - \eta (g_j + \frac{\lambda}{n_j} w_j)

    with :math:`g_j` the sum of the gradient rows whose id is j, :math:`\eta` = lr, :math:`\lambda` = l2, and
    :math:`n_j` = counts[j]. With a momentum buffer b: :math:`b_j \leftarrow` momentum :math:`b_j + g_j +
    \frac{\lambda}{n_j} w_j` and :math:`w_j \leftarrow w_j - \eta b_j`. Rows whose id is not in the
    mini-batch, and their momentum, keep their bits: the cost grows with the mini-batch, never with the table.
    The result is the same bits however many threads run.

    It needs no sparse tensor, so a whole training step can be compiled: look the rows up, differentiate with
    respect to the rows, and pass their gradient on (see the example). For torch.compile the numbers (lr, l2 and the
    like) are constants: other ones compile again. Other ids, sizes and seeds do not.

    Args:
        weight: [num_embeddings, D], contiguous, float32, float64, bfloat16 or float16. 16-bit weights are computed in
            float32, which is also the dtype of their state.
        ids: int32 or int64 of any shape, each in 0..num_embeddings-1, repeated in any way. None: grad is sparse.
        grad: [\*ids.shape, D], the gradient of each looked-up row. Any strides; no memory of the tensors that are
            updated. Or, without ids, the sparse gradient [num_embeddings, D] of an nn.Embedding(sparse=True), which
            need not be coalesced.
        lr: learning rate, >= 0.
        l2: :math:`\lambda`, >= 0; 0 is plain sparse SGD.
        counts: [num_embeddings], int32, int64, float32 or float64: in how many instances of the training set
            each id occurs (:meth:`dien_ops.MBAEmbedding.count_`). Positive for every id of the mini-batch. 1
            for all where None.
        padding_idx: an id whose row is never changed, whatever its gradient; as in torch, a negative one counts from
            the end.
        momentum_buffer: [num_embeddings, D], updated in place; needed where momentum is not 0.
        momentum: in [0, 1).
        decay: "mini_batch_aware": as above, :math:`\frac{\lambda}{n_j} w_j` is part of the gradient that the rule sees.
            "decoupled": it is not, and :math:`w_j \leftarrow w_j - \eta \frac{\lambda}{n_j} w_j` beside the rule's
            step, as in AdamW (Loshchilov and Hutter 2019), on the rows of the mini-batch.
            "difacto": the mini-batch aware decay with :math:`n_j = 1` whatever the counts: an id is decayed in each
            mini-batch that holds it, so frequent ids are decayed most (DiFacto, Li et al. 2016; DIN section 6.5
            compares with it).
            "lazy" (of this rule alone, without momentum and counts): dense SGD with L2 on all rows,
            :math:`w \leftarrow (1 - \eta \lambda) w - \eta g`, of which a row pays its share when it is touched:
            :math:`w_j \leftarrow e^{s - d_j} w_j - \eta g_j` and :math:`d_j \leftarrow s`, with s = log_decay and
            d = decayed. Rows that are read in between lag behind. l2 itself is not used.
        decayed: [num_embeddings], float64, d, zeros at first, updated in place; needed where decay is "lazy".
        log_decay: s, the sum of :math:`\ln(1 - \eta \lambda)` over all steps so far, this one included; needed where
            decay is "lazy".
        nonfinite: what becomes of NaN and infinity in the gradient, that of the padding row left aside. "propagate":
            they go into the weight; "skip": the whole update is left out; "error": an error that names one.
        check_ids: False leaves out ids that are not in the table, instead of an error.
        seed: None rounds 16-bit weights to the nearest, by which updates below half a unit in the last place are lost.
            An integer rounds them stochastically, up or down with the probabilities that make the expected value exact:
            give another one for each update. Ignored for float32 and float64.
        grad_scale: one float32 number by which the gradient is divided, as of torch.amp.GradScaler; on weight's
            device, like found_inf, and nobody waits for either.
        found_inf: one float32 number: where it is not 0, nothing is changed at all.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; dtype, rank or value; size or
            device.
        RuntimeError: an id is out of range, the count of an id of the mini-batch is not positive, the gradient is not
            finite where nonfinite is "error", or grad shares memory with a tensor that is updated. On CUDA nobody
            waits for ids, counts and gradients: a wrong one is a device-side assertion, which names it and ends the
            process's use of the GPU.
        Nothing has been written where an error is raised.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([[3, 7, 3]])
        >>> def loss_of(rows):  # [1, 3, 8]
        ...     return rows.square().sum()
        >>> def training_step(weight, ids):  # torch.compile(training_step, fullgraph=True) is one graph
        ...     grad, loss = torch.func.grad_and_value(loss_of)(weight[ids])
        ...     dien_ops.functional.mba_sgd_(weight, ids, grad, lr=0.1)
        ...     return loss
        >>> loss = training_step(weight, ids)
    """
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    lists, options = _mini_batch(
        weight, ids, grad, states, lr, l2, counts, padding_idx, decay, nonfinite, check_ids, seed, grad_scale,
        found_inf, SGD_DECAYS,
    )  # fmt: skip
    _checks.fraction("momentum", momentum)
    if momentum != 0.0 and momentum_buffer is None:
        raise ValueError(f"momentum_buffer must be given where momentum is not 0, got momentum={momentum}")
    log_decays: list[float] = []
    if decay == "lazy":
        if decayed is None or log_decay is None:
            raise ValueError('decayed and log_decay must be given where decay is "lazy"')
        check_lazy(momentum, counts)
        if momentum_buffer is not None:
            raise ValueError('momentum_buffer must be None where decay is "lazy"')
        _check_decayed(decayed, log_decay, weight)
        log_decays = [log_decay]
    elif decayed is not None or log_decay is not None:
        raise ValueError(f'decayed and log_decay must be None where decay is not "lazy", got decay={decay!r}')
    torch.ops.dien_ops.mba_sgd_(
        [weight], list(states.values()), [] if decayed is None else [decayed], *lists, log_decays, *options, momentum
    )
    mark_written(weight, momentum_buffer, decayed)


def _check_decayed(decayed: Tensor, log_decay: float, weight: Tensor) -> None:
    _checks.tensor("decayed", decayed)
    if decayed.dtype != torch.float64:
        raise ValueError(f"decayed must be float64, got {decayed.dtype}")
    _checks.same_device("weight", weight, "decayed", decayed)
    _checks.number("log_decay", log_decay)
    if not -math.inf < log_decay <= 0.0:
        raise ValueError(f"log_decay must be finite and <= 0, got {log_decay}")


@torch.no_grad()
def mba_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
    decay: str = "mini_batch_aware",
    nonfinite: str = "propagate",
    check_ids: bool = True,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Updates an embedding table by Adagrad with mini-batch aware L2, in place.

    For every id j of the mini-batch, once, with :math:`g_j` the summed gradient plus
    :math:`\frac{\lambda}{n_j} w_j` (DIN eq. 7): :math:`s_j \leftarrow s_j + g_j^2` and :math:`w_j \leftarrow
    w_j - \eta g_j / (\sqrt{s_j} + \epsilon)`. With l2 = 0 it is :class:`torch.optim.Adagrad` on a sparse
    gradient.

    Args:
        weight, ids, grad, lr, l2, counts, padding_idx, nonfinite, check_ids, seed, grad_scale, found_inf: as in
            :func:`mba_sgd_`.
        state_sum: [num_embeddings, D], updated in place; float32 for a 16-bit weight.
        eps: :math:`\epsilon` >= 0.
        decay: as in :func:`mba_sgd_`, but for "lazy".

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> dien_ops.functional.mba_adagrad_(weight, torch.zeros(1000, 8), ids, torch.randn(3, 8), lr=0.1)
    """
    lists, options = _mini_batch(
        weight, ids, grad, {"state_sum": state_sum}, lr, l2, counts, padding_idx, decay, nonfinite, check_ids, seed,
        grad_scale, found_inf,
    )  # fmt: skip
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_adagrad_([weight], [state_sum], *lists, *options, eps)
    mark_written(weight, state_sum)


@torch.no_grad()
def mba_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
    decay: str = "mini_batch_aware",
    nonfinite: str = "propagate",
    check_ids: bool = True,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Updates an embedding table by row-wise Adagrad with mini-batch aware L2, in place.

    :func:`mba_adagrad_` with one accumulator per row: :math:`s_j \leftarrow s_j + \text{mean}_d\, g_{jd}^2`.
    The state is as small as the table has rows.

    Args:
        weight, ids, grad, lr, l2, counts, padding_idx, nonfinite, check_ids, seed, grad_scale, found_inf: as in
            :func:`mba_sgd_`.
        state_sum: [num_embeddings], updated in place; float32 for a 16-bit weight.
        eps: added to :math:`\sqrt{s_j}`, >= 0.
        decay: as in :func:`mba_sgd_`, but for "lazy".

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> sums, grad = torch.zeros(1000), torch.randn(3, 8)
        >>> dien_ops.functional.mba_rowwise_adagrad_(weight, sums, ids, grad, lr=0.1)
    """
    lists, options = _mini_batch(
        weight, ids, grad, {"state_sum": state_sum}, lr, l2, counts, padding_idx, decay, nonfinite, check_ids, seed,
        grad_scale, found_inf,
    )  # fmt: skip
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_rowwise_adagrad_([weight], [state_sum], *lists, *options, eps)
    mark_written(weight, state_sum)


@torch.no_grad()
def mba_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    decay: str = "mini_batch_aware",
    nonfinite: str = "propagate",
    check_ids: bool = True,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Updates an embedding table by lazy Adam with mini-batch aware L2, in place.

    For every id j of the mini-batch, once, with :math:`g_j` the summed gradient plus
    :math:`\frac{\lambda}{n_j} w_j` (DIN eq. 7) and :math:`t_j` the number of updates of row j, this one
    included:

    .. math::
        m_j &\leftarrow \beta_1 m_j + (1 - \beta_1) g_j \\
        v_j &\leftarrow \beta_2 v_j + (1 - \beta_2) g_j^2 \\
        w_j &\leftarrow w_j - \eta \frac{m_j / (1 - \beta_1^{t_j})}{\sqrt{v_j / (1 - \beta_2^{t_j})} +
        \epsilon}

    The moments of absent rows stand still, and each row's bias is corrected by its own :math:`t_j`: a rare
    id's first update is as long as any other's. (:class:`torch.optim.SparseAdam` corrects by the number of
    steps of the whole table, which shortens it.)

    Args:
        weight, ids, grad, lr, l2, counts, padding_idx, nonfinite, check_ids, seed, grad_scale, found_inf: as in
            :func:`mba_sgd_`.
        exp_avg, exp_avg_sq: [num_embeddings, D], m and v, updated in place; float32 for a 16-bit weight.
        step: [num_embeddings], int64, t, updated in place.
        betas: each in [0, 1).
        eps: :math:`\epsilon` >= 0.
        decay: as in :func:`mba_sgd_`, but for "lazy".

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> m, v, t = torch.zeros(1000, 8), torch.zeros(1000, 8), torch.zeros(1000, dtype=torch.int64)
        >>> dien_ops.functional.mba_adam_(weight, m, v, t, ids, torch.randn(3, 8), lr=1e-3)
    """
    lists, options = _mini_batch(
        weight, ids, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, lr, l2, counts, padding_idx, decay,
        nonfinite, check_ids, seed, grad_scale, found_inf,
    )  # fmt: skip
    _checks.tensor("step", step)
    if step.dtype != torch.int64:
        raise ValueError(f"step must be int64, got {step.dtype}")
    check_betas(betas)
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_adam_([weight], [exp_avg], [exp_avg_sq], [step], *lists, *options, *betas, eps)
    mark_written(weight, exp_avg, exp_avg_sq, step)
