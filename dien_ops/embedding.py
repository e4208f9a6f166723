# SPDX-License-Identifier: Apache-2.0
"""Sparse updates of embedding tables with mini-batch aware L2 (DIN eq. 6-7), and a table that counts ids."""

from __future__ import annotations

import numbers
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dien_ops import _checks

if TYPE_CHECKING:
    from typing_extensions import Self

# -------------------------------------------------------------------------------------------------- operators


def _updates_in_place(*_: Any) -> None:
    """The fake rule of an operator that returns nothing."""


for _name in ("mba_sgd_", "mba_adagrad_", "mba_rowwise_adagrad_", "mba_adam_", "mba_check"):
    torch.library.register_fake(f"dien_ops::{_name}", _updates_in_place)

# ------------------------------------------------------------------------------------------------- functional

COUNT_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


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


def _normalized(padding_idx: int | None, num_embeddings: int) -> int | None:
    """padding_idx in 0..num_embeddings-1; as in torch, a negative one counts from the end."""
    if padding_idx is None:
        return None
    if not isinstance(padding_idx, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"padding_idx must be an integer, got {type(padding_idx).__name__}")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be in {-num_embeddings}..{num_embeddings - 1}, got {padding_idx}")
    return padding_idx % num_embeddings


def _mini_batch(
    weight: Tensor,
    ids: Tensor,
    grad: Tensor,
    lr: float,
    l2: float,
    counts: Tensor | None,
    padding_idx: int | None,
    **states: Tensor,  # of the weight's dtype; their shapes are checked by the operator
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """Checks what all updates share. Returns ids [N], grad [N, D], counts, and padding_idx counted from 0."""
    _checks.supported("weight", weight, _checks.FULL_PRECISION, cuda_kernels=False)
    _checks.rank("weight", weight, 2)
    for name, value in {"ids": ids, "grad": grad, **states}.items():
        _checks.tensor(name, value)
    _checks.matches("weight", weight, grad=grad, **states)
    _checks.same_device("weight", weight, "ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    num_embeddings, dim = weight.shape
    _checks.shape("grad", grad, [*ids.shape, dim], "[*ids.shape, D]")
    check_counts(counts, weight)
    _checks.non_negative("lr", lr)
    _checks.non_negative("l2", l2)
    return ids.reshape(-1), grad.reshape(ids.numel(), dim), counts, _normalized(padding_idx, num_embeddings)


def _mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd, so that a backward that needs the old values raises instead of using the new ones."""
    if not torch.compiler.is_compiling():  # which tracks what it writes by itself
        tracked = [t for t in tensors if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(tracked)


@torch.no_grad()
def mba_sgd_(
    weight: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    r"""Updates an embedding table by SGD with mini-batch aware L2 (DIN eq. 7), in place.

    For every id j of the mini-batch, once, however often it occurs:

    .. math:: w_j \leftarrow w_j - \eta (g_j + \frac{\lambda}{n_j} w_j)

    with :math:`g_j` the sum of the gradient rows whose id is j, :math:`\eta` = lr, :math:`\lambda` = l2, and
    :math:`n_j` = counts[j]. With a momentum buffer b: :math:`b_j \leftarrow` momentum :math:`b_j + g_j +
    \frac{\lambda}{n_j} w_j` and :math:`w_j \leftarrow w_j - \eta b_j`. Rows whose id is not in the
    mini-batch, and their momentum, keep their bits: the cost grows with the mini-batch, never with the table.
    The result is the same bits however many threads run.

    It needs no sparse tensor, so it also works where a model was compiled: look the rows up, differentiate
    with respect to the rows, and pass their gradient on (see the example).

    Args:
        weight: [num_embeddings, D], contiguous, float32 or float64.
        ids: int32 or int64 of any shape, each in 0..num_embeddings-1, repeated in any way.
        grad: [\*ids.shape, D], the gradient of each looked-up row. Any strides; no memory of the tensors that are
            updated.
        lr: learning rate, >= 0.
        l2: :math:`\lambda`, >= 0; 0 is plain sparse SGD.
        counts: [num_embeddings], int32, int64, float32 or float64: in how many instances of the training set
            each id occurs (:meth:`dien_ops.MBAEmbedding.count_`). Positive for every id of the mini-batch. 1
            for all where None.
        padding_idx: an id whose row is never changed, whatever its gradient.
        momentum_buffer: [num_embeddings, D], updated in place; needed where momentum is not 0.
        momentum: in [0, 1).

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; dtype, rank or value; size or
            device.
        RuntimeError: an id is out of range, the count of an id of the mini-batch is not positive, or grad shares
            memory with a tensor that is updated.
        Nothing has been written where an error is raised.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([[3, 7, 3]])
        >>> rows = weight[ids].requires_grad_()  # [1, 3, 8]
        >>> rows.square().sum().backward()
        >>> dien_ops.functional.mba_sgd_(weight, ids, rows.grad, lr=0.1)
    """
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    batch = _mini_batch(weight, ids, grad, lr, l2, counts, padding_idx, **states)
    _checks.fraction("momentum", momentum)
    if momentum != 0.0 and momentum_buffer is None:
        raise ValueError(f"momentum_buffer must be given where momentum is not 0, got momentum={momentum}")
    torch.ops.dien_ops.mba_sgd_(weight, momentum_buffer, *batch, lr, l2, momentum)
    _mark_written(weight, momentum_buffer)


@torch.no_grad()
def mba_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
) -> None:
    r"""Updates an embedding table by Adagrad with mini-batch aware L2, in place.

    For every id j of the mini-batch, once, with :math:`g_j` the summed gradient plus
    :math:`\frac{\lambda}{n_j} w_j` (DIN eq. 7): :math:`s_j \leftarrow s_j + g_j^2` and :math:`w_j \leftarrow
    w_j - \eta g_j / (\sqrt{s_j} + \epsilon)`. With l2 = 0 it is :class:`torch.optim.Adagrad` on a sparse
    gradient.

    Args:
        weight, ids, grad, lr, l2, counts, padding_idx: as in :func:`mba_sgd_`.
        state_sum: [num_embeddings, D], updated in place.
        eps: :math:`\epsilon` >= 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> dien_ops.functional.mba_adagrad_(weight, torch.zeros(1000, 8), ids, torch.randn(3, 8), lr=0.1)
    """
    batch = _mini_batch(weight, ids, grad, lr, l2, counts, padding_idx, state_sum=state_sum)
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_adagrad_(weight, state_sum, *batch, lr, l2, eps)
    _mark_written(weight, state_sum)


@torch.no_grad()
def mba_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
) -> None:
    r"""Updates an embedding table by row-wise Adagrad with mini-batch aware L2, in place.

    :func:`mba_adagrad_` with one accumulator per row: :math:`s_j \leftarrow s_j + \text{mean}_d\, g_{jd}^2`.
    The state is as small as the table has rows.

    Args:
        weight, ids, grad, lr, l2, counts, padding_idx: as in :func:`mba_sgd_`.
        state_sum: [num_embeddings], updated in place.
        eps: added to :math:`\sqrt{s_j}`, >= 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> sums, grad = torch.zeros(1000), torch.randn(3, 8)
        >>> dien_ops.functional.mba_rowwise_adagrad_(weight, sums, ids, grad, lr=0.1)
    """
    batch = _mini_batch(weight, ids, grad, lr, l2, counts, padding_idx, state_sum=state_sum)
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_rowwise_adagrad_(weight, state_sum, *batch, lr, l2, eps)
    _mark_written(weight, state_sum)


@torch.no_grad()
def mba_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
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
        weight, ids, grad, lr, l2, counts, padding_idx: as in :func:`mba_sgd_`.
        exp_avg, exp_avg_sq: [num_embeddings, D], m and v, updated in place.
        step: [num_embeddings], int64, t, updated in place.
        betas: each in [0, 1).
        eps: :math:`\epsilon` >= 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mba_sgd_`; nothing has been written.

    Example:
        >>> weight, ids = torch.randn(1000, 8), torch.tensor([3, 7, 3])
        >>> m, v, t = torch.zeros(1000, 8), torch.zeros(1000, 8), torch.zeros(1000, dtype=torch.int64)
        >>> dien_ops.functional.mba_adam_(weight, m, v, t, ids, torch.randn(3, 8), lr=1e-3)
    """
    batch = _mini_batch(weight, ids, grad, lr, l2, counts, padding_idx, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _checks.tensor("step", step)
    if step.dtype != torch.int64:
        raise ValueError(f"step must be int64, got {step.dtype}")
    check_betas(betas)
    _checks.non_negative("eps", eps)
    torch.ops.dien_ops.mba_adam_(weight, exp_avg, exp_avg_sq, step, *batch, lr, l2, *betas, eps)
    _mark_written(weight, exp_avg, exp_avg_sq, step)


# ----------------------------------------------------------------------------------------------------- module


def _wide(counts: Tensor) -> torch.dtype:
    """The dtype that a table keeps counts in."""
    return torch.float64 if counts.is_floating_point() else torch.int64


_living: weakref.WeakSet[MBAEmbedding] = weakref.WeakSet()


class MBAEmbedding(nn.Embedding):
    r"""An embedding table for mini-batch aware L2 (DIN eq. 6-7): :class:`torch.nn.Embedding` whose gradient
    is sparse and which knows how often each id occurs in the training set.

    The optimizers of :mod:`dien_ops.optim` find the table that owns a weight by themselves, take its
    ``counts`` as :math:`n_j` and leave its padding row alone. That holds after ``load_state_dict``,
    ``copy.deepcopy``, pickling, and moving or replacing the weight: they look for the living module whose
    ``weight`` the parameter is.

    torch cannot compile the backward of a sparse gradient. A model in training is compiled around the table,
    or uses :func:`dien_ops.functional.mba_sgd_` and its like; inference compiles.

    Args:
        num_embeddings: rows of the table, ids are 0..num_embeddings-1.
        embedding_dim: D.
        padding_idx: an id whose row starts as zeros, gets no gradient, is not counted and never changes.
        counts: [num_embeddings], integer or floating point: :math:`n_j`, copied. None until :meth:`count_` is
            called, and as long as it is None the optimizers take :math:`n_j = 1`.
        device, dtype: of the weight.

    Attributes:
        weight: [num_embeddings, D], initialised as in torch.nn.Embedding.
        counts: a buffer, int64 (float64 where floating point counts were given) or None. It is saved in the
            state_dict once it is there, and loading one that has it creates it, integer or floating point as
            saved; counts that do not fit the table are an error and leave it as it was.

    Raises:
        IndexError: an id is out of range.

    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18, padding_idx=0)
        >>> training_set = [(torch.tensor([3, 5]), torch.tensor([[7, 3, 7], [8, 0, 0]]))]
        >>> for target, history in training_set:
        ...     _ = items.count_(torch.cat([target.unsqueeze(1), history], dim=1))
        >>> items.counts[[0, 3, 5, 7, 8]]
        tensor([0, 1, 1, 1, 1])
        >>> optimizer = dien_ops.optim.MBASGD(items.parameters(), lr=0.1, l2=0.01)
    """

    counts: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        counts: Tensor | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, sparse=True, device=device, dtype=dtype)
        self.register_buffer("counts", None)
        self._set_counts(counts)
        _living.add(self)

    def _set_counts(self, counts: Tensor | None) -> None:
        if counts is not None:
            check_counts(counts, self.weight)
            counts = counts.detach().to(_wide(counts), copy=True)
        self.counts = counts

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and unpickled tables do not see __init__
        super().__setstate__(state)
        _living.add(self)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # nn.Embedding's other options are not this table's
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        counts: Tensor | None = None,
    ) -> Self:
        """A table that starts from embeddings [num_embeddings, D]; freeze: without gradient, as in torch."""
        _checks.tensor("embeddings", embeddings)
        _checks.rank("embeddings", embeddings, 2)
        num_embeddings, dim = embeddings.shape
        table = cls(num_embeddings, dim, padding_idx, device="meta", dtype=embeddings.dtype)
        table.weight = nn.Parameter(embeddings, requires_grad=not freeze)
        table._set_counts(counts)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(ids)
        try:
            return super().forward(ids)
        except IndexError:
            self._check_ids(ids)  # says which id; torch only says that there is one
            raise

    @torch.no_grad()
    def count_(self, ids: Tensor, *, occurrences: bool = False) -> Self:
        r"""Adds a piece of the training set to ``counts``: call it for each piece, in any order, once.

        :math:`n_j` is the number of instances (training samples) that hold id j: only then does the decay of
        one pass over the training set add up to the L2 term of DIN eq. 4. An instance's ids must come in one
        call, those of the target and of the history together where they share this table, so that an id in
        both counts once. An id that is never counted has :math:`n_j = 0`, which the optimizers refuse when they
        meet it: where sampled negatives bring up such ids, ``counts.clamp_(min=1)`` after counting.

        Args:
            ids: int32 or int64, [B] or [B, L]: row i holds the ids of instance i, repeated in any way. The
                padding id is not counted.
            occurrences: count every occurrence instead, ids of any shape: what a vocabulary file holds.

        Raises:
            IndexError: an id is out of range; nothing was counted.

        Example:
            >>> table = dien_ops.MBAEmbedding(4, 2)
            >>> table.count_(torch.tensor([[1, 1, 2], [1, 3, 3]])).counts
            tensor([0, 2, 1, 1])
        """
        _checks.tensor("ids", ids)
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
        if not occurrences:
            _checks.rank("ids", ids, 1, 2)
        self._check_ids(ids)
        if not occurrences and ids.dim() == 2:
            ids = ids.sort(dim=1).values
            repeated = torch.zeros_like(ids, dtype=torch.bool)
            repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
            ids = ids[~repeated]
        ids = ids.flatten()
        if self.padding_idx is not None:
            ids = ids[ids != self.padding_idx]
        if self.counts is None:
            self.counts = torch.zeros(self.num_embeddings, dtype=torch.int64, device=self.weight.device)
        self.counts.index_add_(0, ids, self.counts.new_ones(()).expand(ids.numel()))
        return self

    def _check_ids(self, ids: Tensor) -> None:
        wrong = ids[(ids < 0) | (ids >= self.num_embeddings)]
        if wrong.numel() > 0:
            raise IndexError(f"ids must be in 0..{self.num_embeddings - 1}, got {int(wrong[0])}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved, before = state_dict.get(prefix + "counts"), self.counts
        if not isinstance(saved, Tensor):
            return super()._load_from_state_dict(state_dict, prefix, *args)
        known = saved.dtype in COUNT_DTYPES
        if not known:
            error_msgs: list[str] = args[-1]
            error_msgs.append(f"{prefix}counts must be int32, int64, float32 or float64, got {saved.dtype}")
        if before is None or before.dtype != _wide(saved) or not known:  # torch would cast to the dtype that is there
            self.counts = torch.zeros(self.num_embeddings, dtype=_wide(saved), device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)  # which reports a wrong shape
        if not known or list(saved.shape) != [self.num_embeddings]:
            self.counts = before
        elif self.counts is not None:  # assign=True takes the saved tensor itself
            self.counts = self.counts.to(_wide(saved))


def owners() -> dict[int, list[MBAEmbedding]]:
    """The living tables by ``id(table.weight)``; several where they share a weight."""
    found: dict[int, list[MBAEmbedding]] = {}
    for table in list(_living):
        found.setdefault(id(table._parameters.get("weight")), []).append(table)
    return found
