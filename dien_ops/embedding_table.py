# SPDX-License-Identifier: Apache-2.0
"""An embedding table that knows how often each id occurs in the training set."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dien_ops import _checks
from dien_ops.embedding import COUNT_DTYPES, check_counts

if TYPE_CHECKING:
    from typing_extensions import Self


def _wide(counts: Tensor) -> torch.dtype:
    """The dtype that a table keeps counts in."""
    return torch.float64 if counts.is_floating_point() else torch.int64


def _advise_huge_pages(new: Tensor) -> None:
    """Rows are read and written all over a table: with pages of 4 KiB each of them needs a walk through the page table,
    which for a large table is as slow as the row itself. Nobody has touched the memory of a new tensor yet."""
    if new.is_cpu:
        torch.ops.dien_ops.advise_huge_pages(new)


_living: weakref.WeakSet[MBAEmbedding] = weakref.WeakSet()


class MBAEmbedding(nn.Embedding):
    r"""An embedding table for mini-batch aware L2 (DIN eq. 6-7): :class:`torch.nn.Embedding` whose gradient
    is sparse and which knows how often each id occurs in the training set.

    The optimizers of :mod:`dien_ops.optim` find the table that owns a weight by themselves, take its
    ``counts`` as :math:`n_j` and leave its padding row alone. That holds after ``load_state_dict``,
    ``copy.deepcopy``, pickling, and moving or replacing the weight: they look for the living module whose
    ``weight`` the parameter is.

    A new weight on the CPU is put into large pages where the system grants them (Linux: transparent huge pages), which
    keeps random rows of a large table fast.

    torch cannot compile the backward of a sparse gradient. A model in training is compiled around the table,
    or uses :func:`dien_ops.functional.mba_sgd_` and its like; inference compiles.

    Args:
        num_embeddings: rows of the table, ids are 0..num_embeddings-1.
        embedding_dim: D.
        padding_idx: an id whose row starts as zeros, gets no gradient, is not counted and never changes.
        counts: [num_embeddings], integer or floating point: :math:`n_j`, copied. None until :meth:`count_` is
            called, and as long as it is None the optimizers take :math:`n_j = 1`.
        learn_counts: the number of instances of the training set, where nobody counted them beforehand. Then each
            lookup in training counts its ids as :meth:`count_` does, a row of ids [B] or [B, L] being an instance,
            and the optimizers take ``counts[j] * learn_counts / seen`` for :math:`n_j`, an estimate without bias from
            the first batch on. Where one instance looks the table up in two calls, it counts as two: double it.
        id_dropout: in training, each id is replaced by padding_idx with this probability, in [0, 1): it reads zeros,
            gets no gradient and is not decayed. "Dropout" in DIN section 6.5, with 0.5.
        min_count: ids whose count is below it read the padding row, in training and evaluation: "Filter" in DIN
            section 6.5. For the K most frequent ids set it after counting:
            ``table.min_count = table.counts.topk(K).values[-1].item()``.
        device, dtype: of the weight.

    Attributes:
        weight: [num_embeddings, D], initialised as in torch.nn.Embedding.
        counts: a buffer, int64 (float64 where floating point counts were given) or None. It is saved in the
            state_dict once it is there, and loading one that has it creates it, integer or floating point as
            saved; counts that do not fit the table are an error and leave it as it was.
        seen: how many instances were counted. With learn_counts it is saved in the state_dict beside the counts; counts
            that are loaded without it are taken for those of the whole training set.

    Raises:
        IndexError: an id is out of range. (On CUDA: a device-side assertion.)
        RuntimeError: a lookup needs counts, for min_count, and there are none.
        TypeError, ValueError: an option has the wrong type or value, or needs a padding_idx.

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
        learn_counts: int | None = None,
        id_dropout: float = 0.0,
        min_count: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, sparse=True, device=device, dtype=dtype)
        self.register_buffer("counts", None)
        self.seen = 0
        self._set_options(counts, learn_counts, id_dropout, min_count)
        _living.add(self)

    def _set_options(
        self, counts: Tensor | None, learn_counts: int | None, id_dropout: float, min_count: float | None
    ) -> None:
        if learn_counts is not None:
            _checks.size("learn_counts", learn_counts)
            if counts is not None:
                raise ValueError("counts must be None where learn_counts is given, which counts from zero")
        _checks.fraction("id_dropout", id_dropout)
        if min_count is not None:
            _checks.non_negative("min_count", min_count)
        if self.padding_idx is None and (id_dropout > 0 or min_count is not None):
            raise ValueError("padding_idx must be given where id_dropout or min_count are: its row is read instead")
        if counts is not None:
            check_counts(counts, self.weight)
            counts = self._zero_counts(_wide(counts)).copy_(counts.detach())
        self.counts = counts
        self.learn_counts, self.id_dropout, self.min_count = learn_counts, id_dropout, min_count

    def reset_parameters(self) -> None:
        _advise_huge_pages(self.weight)
        super().reset_parameters()

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
        *,
        learn_counts: int | None = None,
        id_dropout: float = 0.0,
        min_count: float | None = None,
    ) -> Self:
        """A table that starts from embeddings [num_embeddings, D]; freeze: without gradient, as in torch."""
        _checks.tensor("embeddings", embeddings)
        _checks.rank("embeddings", embeddings, 2)
        num_embeddings, dim = embeddings.shape
        table = cls(num_embeddings, dim, padding_idx, device="meta", dtype=embeddings.dtype)
        table.weight = nn.Parameter(embeddings, requires_grad=not freeze)
        table._set_options(counts, learn_counts, id_dropout, min_count)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        if self.training and self.learn_counts is not None:
            self.count_(ids)
        if torch.compiler.is_compiling():
            return super().forward(self._read_instead(ids))
        try:
            return super().forward(self._read_instead(ids))
        except IndexError:
            self._check_ids(ids)  # says which id; torch only says that there is one
            raise

    def _read_instead(self, ids: Tensor) -> Tensor:
        """The ids, with padding_idx for those that are dropped or too rare."""
        if self.padding_idx is None:  # and then there are no such options
            return ids
        if self.min_count is not None:
            if self.counts is None:
                raise RuntimeError("min_count needs counts: give them, or call count_ with the training set")
            rare = self.counts.index_select(0, ids.reshape(-1)).view(ids.shape) < self.min_count
            ids = ids.masked_fill(rare, self.padding_idx)
        if self.training and self.id_dropout > 0:
            dropped = torch.rand(ids.shape, device=ids.device) < self.id_dropout
            ids = ids.masked_fill(dropped, self.padding_idx)
        return ids

    def extra_repr(self) -> str:
        ours = {"learn_counts": None, "id_dropout": 0.0, "min_count": None}
        given = (f"{name}={getattr(self, name)}" for name, default in ours.items() if getattr(self, name) != default)
        return ", ".join([super().extra_repr(), *given])

    @torch.no_grad()
    def count_(self, ids: Tensor, *, of: str = "instances") -> Self:
        r"""Adds a piece of the training set to ``counts``: call it for each piece, in any order, once.

        :math:`n_j` is the number of instances (training samples) that hold id j: only then does the decay of
        one pass over the training set add up to the L2 term of DIN eq. 4. An instance's ids must come in one
        call, those of the target and of the history together where they share this table, so that an id in
        both counts once. An id that is never counted has :math:`n_j = 0`, which the optimizers refuse when they
        meet it: where sampled negatives bring up such ids, ``counts.clamp_(min=1)`` after counting.

        Args:
            ids: int32 or int64, [B] or [B, L]: row i holds the ids of instance i, repeated in any way. The
                padding id is not counted.
            of: "instances" that hold the id, which are added to ``seen`` too; or "occurrences", every one of them, with
                ids of any shape: what a vocabulary file holds.

        Raises:
            TypeError, ValueError: an argument has the wrong type; dtype, rank or value.
            IndexError: an id is out of range; nothing was counted. (On CUDA: a device-side assertion.)

        Example:
            >>> table = dien_ops.MBAEmbedding(4, 2)
            >>> table.count_(torch.tensor([[1, 1, 2], [1, 3, 3]])).counts
            tensor([0, 2, 1, 1])
            >>> table.seen
            2
        """
        _checks.tensor("ids", ids)
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
        _checks.one_of("of", of, ("instances", "occurrences"))
        if of == "instances":
            _checks.rank("ids", ids, 1, 2)
        if not ids.is_cuda:  # there nobody waits for them
            self._check_ids(ids)
        if self.counts is None:
            self.counts = self._zero_counts(torch.int64)
        counted = torch.ones_like(ids, dtype=torch.bool)
        if of == "instances" and ids.dim() == 2:
            ids = ids.sort(dim=1).values
            counted[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if self.padding_idx is not None:
            counted &= ids != self.padding_idx
        self.counts.index_add_(0, ids.reshape(-1), counted.reshape(-1).to(self.counts.dtype))
        if of == "instances":
            self.seen += ids.shape[0]
        return self

    def _zero_counts(self, dtype: torch.dtype) -> Tensor:
        counts = torch.zeros(self.num_embeddings, dtype=dtype, device=self.weight.device)
        _advise_huge_pages(counts)
        return counts

    def _check_ids(self, ids: Tensor) -> None:
        wrong = ids[(ids < 0) | (ids >= self.num_embeddings)]
        if wrong.numel() > 0:
            raise IndexError(f"ids must be in 0..{self.num_embeddings - 1}, got {int(wrong[0])}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learn_counts is not None and self.counts is not None:
            destination[prefix + "seen"] = torch.tensor(self.seen, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        seen = state_dict.pop(prefix + "seen", None)
        saved, before = state_dict.get(prefix + "counts"), self.counts
        if not isinstance(saved, Tensor):
            return super()._load_from_state_dict(state_dict, prefix, *args)
        known = saved.dtype in COUNT_DTYPES
        if not known:
            error_msgs: list[str] = args[-1]
            error_msgs.append(f"{prefix}counts must be int32, int64, float32 or float64, got {saved.dtype}")
        if before is None or before.dtype != _wide(saved) or not known:  # torch would cast to the dtype that is there
            self.counts = self._zero_counts(_wide(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)  # which reports a wrong shape
        if not known or list(saved.shape) != [self.num_embeddings]:
            self.counts = before
        elif self.counts is not None:  # assign=True takes the saved tensor itself
            self.counts = self.counts.to(_wide(saved))
            whole = self.learn_counts or 0  # the training set, where the counts come from elsewhere
            self.seen = whole if seen is None else int(seen)


def owners() -> dict[int, list[MBAEmbedding]]:
    """The living tables by ``id(table.weight)``; several where they share a weight."""
    found: dict[int, list[MBAEmbedding]] = {}
    for table in list(_living):
        found.setdefault(id(table._parameters.get("weight")), []).append(table)
    return found
