# SPDX-License-Identifier: Apache-2.0
"""Optimizers for embedding tables with mini-batch aware L2 (DIN eq. 6-7). The update rules:
:mod:`dien_ops.functional`.

They take sparse gradients only, those of :class:`dien_ops.MBAEmbedding` or any
``torch.nn.Embedding(sparse=True)``; dense parameters go to an optimizer of :mod:`torch.optim` beside it. Each
row of a mini-batch is updated once, rows that are not in it keep their bits, and a step's cost grows with the
mini-batch, never with the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from dien_ops import _checks, functional
from dien_ops.embedding import MBAEmbedding, check_betas, check_counts, owners

_SHARED_ARGUMENTS = """

    Args:
        params: embedding weights, or groups of them with their own options, as in :mod:`torch.optim`.
        lr: learning rate.
        l2: the strength of the decay; it is divided by n_j. 0 turns it off.
        counts: n_j, [num_embeddings]: in how many instances of the training set each id occurs. Usually given
            per group. Where it is None: those of the MBAEmbedding that owns the weight; where there are none,
            n_j = 1. An option as any other: it is saved in the state_dict and comes back from it."""

_RAISES = """

    Raises:
        TypeError, ValueError: an option is no number; it is out of its range; a parameter cannot be an embedding
            table; a state_dict to load is that of an optimizer with other options.
        RuntimeError: in ``step``: a gradient is dense, the count of an id of the mini-batch is not positive, or
            a loaded state is incomplete. All parameters are checked before the first is updated and before any
            state is created, so that nothing is half-updated.
"""


class _MiniBatch(NamedTuple):
    """What a step does to one table."""

    weight: Tensor
    ids: Tensor  # [N]
    grad: Tensor  # [N, D]
    counts: Tensor | None
    padding_idx: int | None
    group: dict[str, Any]


class _MBAOptimizer(Optimizer):
    """What the optimizers share: options, checks, the order of a step."""

    _options: tuple[str, ...]  # the rule's own
    _states: tuple[str, ...]  # a table has all of them, or none before its first update
    _row_states: tuple[str, ...] = ()  # those with one number per row; the others have the weight's shape

    def __init__(self, params: ParamsT, lr: float, l2: float, counts: Tensor | None, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "l2": l2, "counts": counts, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, of a pickle, and what load_state_dict loads
        needed = ("lr", "l2", "counts", *self._options)  # self.defaults may hold more, which torch puts there
        for i, group in enumerate(state["param_groups"]):
            missing = [name for name in needed if name not in group]
            if missing:
                raise ValueError(
                    f"{type(self).__name__} needs the options {', '.join(needed)}, but parameter group {i} of the "
                    f"state_dict has no {', '.join(missing)}: it is that of another optimizer"
                )
        super().__setstate__(state)

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError for an option of the rule that is no number or out of its range."""
        raise NotImplementedError

    def _update(self, batch: _MiniBatch, lr: float, state: dict[str, Any]) -> None:
        """Updates the rows of one table; creates the rule's state where there is none yet."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        _checks.non_negative("lr", lr.item() if isinstance(lr, Tensor) else lr)
        _checks.non_negative("l2", group["l2"])
        self._check_options(group)
        for weight in group["params"]:
            _checks.supported("an embedding weight", weight, _checks.FULL_PRECISION, cuda_kernels=False)
            if weight.dim() != 2:
                raise ValueError(
                    f"{type(self).__name__} updates embedding tables [num_embeddings, D], got a parameter of "
                    f"shape {list(weight.shape)}: give dense parameters to an optimizer of torch.optim"
                )
            check_counts(group["counts"], weight)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every table that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._mini_batches()
        for weight, ids, grad, counts, padding_idx, _ in batches:
            if len(batches) > 1 or weight not in self.state:  # else the update's own check is the first thing it does
                torch.ops.dien_ops.mba_check(weight, ids, grad, counts, padding_idx)
        for batch in batches:
            self._update(batch, float(batch.group["lr"]), self.state[batch.weight])
        return loss

    def _mini_batches(self) -> list[_MiniBatch]:
        tables = owners()
        batches = []
        for group in self.param_groups:
            self._check_group(group)
            for weight in group["params"]:
                grad = weight.grad
                if grad is None:
                    continue
                if not grad.is_sparse or grad.sparse_dim() != 1:
                    came = "sparse" if grad.is_sparse else "dense"
                    raise RuntimeError(
                        f"{type(self).__name__} needs gradients of sparse rows, as nn.Embedding(sparse=True) "
                        f"and dien_ops.MBAEmbedding give them, got a {came} matrix for a parameter of shape "
                        f"{list(weight.shape)}: give dense parameters to an optimizer of torch.optim"
                    )
                self._check_state(weight)
                owned_by = tables.get(id(weight), [])
                counts = group["counts"] if group["counts"] is not None else _counts_of(owned_by)
                ids, values = grad._indices()[0], grad._values()
                batches.append(_MiniBatch(weight, ids, values, counts, _padding_of(owned_by), group))
        return batches

    def _check_state(self, weight: Tensor) -> None:
        """What an update would refuse, found before any: a state_dict may have brought anything."""
        state = self.state.get(weight, {})
        if state and state.keys() != set(self._states):
            raise RuntimeError(
                f"the state of a parameter of shape {list(weight.shape)} must be {', '.join(self._states)}, "
                f"got {', '.join(map(str, state))}"
            )
        for name, value in {"weight": weight, **state}.items():
            _checks.tensor(name, value)
            if value.is_floating_point():
                _checks.matches("weight", weight, **{name: value})
            if name in self._row_states:
                _checks.shape(name, value, weight.shape[:1], "[num_embeddings]")
            else:
                _checks.shape(name, value, weight.shape, "[num_embeddings, D]")
            if not value.is_contiguous():
                raise RuntimeError(f"{name} must be contiguous: it is updated in place")


def _counts_of(tables: list[MBAEmbedding]) -> Tensor | None:
    """Those of the tables that own a weight; mostly there is one table or none."""
    counts = [table.counts for table in tables if table.counts is not None]
    if any(other is not counts[0] for other in counts[1:]):
        raise RuntimeError(
            f"{len(tables)} MBAEmbeddings share a weight of shape {list(tables[0].weight.shape)} and have "
            f"counts of their own: pass the optimizer the counts to use"
        )
    return counts[0] if counts else None


def _padding_of(tables: list[MBAEmbedding]) -> int | None:
    """The padding row of the tables that own a weight; a row that is padding to some of them only is data."""
    padding = {table.padding_idx for table in tables}
    return padding.pop() if len(padding) == 1 else None


class MBASGD(_MBAOptimizer):
    __doc__ = f"""SGD with mini-batch aware L2 (DIN eq. 7): ``w_j <- w_j - lr (g_j + (l2 / n_j) w_j)``.

    See :func:`dien_ops.functional.mba_sgd_`. With l2=0 and momentum=0 it is :class:`torch.optim.SGD` on a
    sparse gradient. With momentum, the momentum of a row stands still while its id is
    absent.{_SHARED_ARGUMENTS}
        momentum: in [0, 1).{_RAISES}
    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18)
        >>> optimizer = dien_ops.optim.MBASGD(items.parameters(), lr=0.1)
        >>> items(torch.tensor([1, 5, 1])).sum().backward()
        >>> optimizer.step()
    """

    _options = ("momentum",)
    _states = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        l2: float = 0.01,
        counts: Tensor | None = None,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(params, lr, l2, counts, momentum=momentum)

    def _check_options(self, group: dict[str, Any]) -> None:
        _checks.fraction("momentum", group["momentum"])

    def _update(self, batch: _MiniBatch, lr: float, state: dict[str, Any]) -> None:
        weight, ids, grad, counts, padding_idx, group = batch
        if group["momentum"] != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        functional.mba_sgd_(
            weight, ids, grad, lr=lr, l2=group["l2"], counts=counts, padding_idx=padding_idx,
            momentum_buffer=state.get("momentum_buffer"), momentum=group["momentum"],
        )  # fmt: skip


class MBAAdagrad(_MBAOptimizer):
    __doc__ = f"""Adagrad with mini-batch aware L2: the decay ``(l2 / n_j) w_j`` of DIN eq. 7 is part of the
    gradient.

    See :func:`dien_ops.functional.mba_adagrad_`. With l2=0 it is :class:`torch.optim.Adagrad` on a sparse
    gradient.{_SHARED_ARGUMENTS}
        initial_accumulator_value: what the sum of squares starts from, >= 0.
        eps: added to its root, >= 0.{_RAISES}
    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18)
        >>> optimizer = dien_ops.optim.MBAAdagrad(items.parameters(), lr=0.1)
    """

    _options = ("initial_accumulator_value", "eps")
    _states = ("sum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        l2: float = 0.01,
        counts: Tensor | None = None,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        options = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, lr, l2, counts, **options)

    def _check_options(self, group: dict[str, Any]) -> None:
        _checks.non_negative("initial_accumulator_value", group["initial_accumulator_value"])
        _checks.non_negative("eps", group["eps"])

    def _initial_sum(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.full_like(weight, group["initial_accumulator_value"])

    _function = staticmethod(functional.mba_adagrad_)

    def _update(self, batch: _MiniBatch, lr: float, state: dict[str, Any]) -> None:
        weight, ids, grad, counts, padding_idx, group = batch
        if "sum" not in state:
            state["sum"] = self._initial_sum(weight, group)
        self._function(
            weight, state["sum"], ids, grad, lr=lr, l2=group["l2"], counts=counts, padding_idx=padding_idx,
            eps=group["eps"],
        )  # fmt: skip


class MBARowwiseAdagrad(MBAAdagrad):
    __doc__ = f"""Adagrad with one accumulator per row, and mini-batch aware L2: the state is as small as the
    table has rows.

    See :func:`dien_ops.functional.mba_rowwise_adagrad_`.{_SHARED_ARGUMENTS}
        initial_accumulator_value: what a row's mean square starts from, >= 0.
        eps: added to its root, >= 0.{_RAISES}
    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18)
        >>> optimizer = dien_ops.optim.MBARowwiseAdagrad(items.parameters(), lr=0.1)
    """

    _row_states = ("sum",)

    def _initial_sum(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        return weight.new_full([weight.shape[0]], group["initial_accumulator_value"])

    _function = staticmethod(functional.mba_rowwise_adagrad_)


class MBAAdam(_MBAOptimizer):
    __doc__ = f"""Lazy Adam with mini-batch aware L2: the decay ``(l2 / n_j) w_j`` of DIN eq. 7 is part of the
    gradient.

    The moments of a row stand still while its id is absent, and its bias is corrected by its own number of
    updates: see :func:`dien_ops.functional.mba_adam_`.{_SHARED_ARGUMENTS}
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second, >= 0.{_RAISES}
    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18)
        >>> optimizer = dien_ops.optim.MBAAdam(items.parameters(), lr=1e-3)
    """

    _options = ("betas", "eps")
    _states = ("exp_avg", "exp_avg_sq", "step")
    _row_states = ("step",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        l2: float = 0.01,
        counts: Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, l2, counts, betas=betas, eps=eps)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        _checks.non_negative("eps", group["eps"])

    def _update(self, batch: _MiniBatch, lr: float, state: dict[str, Any]) -> None:
        weight, ids, grad, counts, padding_idx, group = batch
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
        functional.mba_adam_(
            weight, state["exp_avg"], state["exp_avg_sq"], state["step"], ids, grad, lr=lr,
            betas=group["betas"], eps=group["eps"], l2=group["l2"], counts=counts, padding_idx=padding_idx,
        )  # fmt: skip
