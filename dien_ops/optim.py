# SPDX-License-Identifier: Apache-2.0
"""Optimizers for embedding tables with mini-batch aware L2 (DIN eq. 6-7). The update rules:
:mod:`dien_ops.functional`.

They take sparse gradients only, those of :class:`dien_ops.MBAEmbedding` or any
``torch.nn.Embedding(sparse=True)``; dense parameters go to an optimizer of :mod:`torch.optim` beside it. Each
row of a mini-batch is updated once, rows that are not in it keep their bits, and a step's cost grows with the
mini-batch, never with the table. One call of an operator updates all tables of a group that have the same dtype and
device, and all counts or none.

``torch.amp.GradScaler`` is understood as torch's fused optimizers understand it: the kernels divide by the scale, and
where a gradient is not finite nothing changes; nobody waits for the device (but with ``decay="lazy"``, whose decay is
known to the host).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dien_ops import _checks, embedding
from dien_ops._optimizer import Call, MBAOptimizer, Table, naming, padding_of
from dien_ops.embedding_table import owners

_ROWS_AT_ONCE = 2**18  # of catch_up_

_SHARED_ARGUMENTS = """

    Args:
        params: embedding weights, or groups of them with their own options, as in :mod:`torch.optim`. 16-bit weights
            have float32 state.
        lr: learning rate.
        l2: the strength of the decay; it is divided by n_j. 0 turns it off.
        counts: n_j, [num_embeddings]: in how many instances of the training set each id occurs. Usually given
            per group. Where it is None: those of the MBAEmbedding that owns the weight; where there are none,
            n_j = 1. An option as any other: it is saved in the state_dict and comes back from it.
        decay: "mini_batch_aware", "decoupled" or "difacto": see :func:`dien_ops.functional.mba_sgd_`.
        nonfinite: what becomes of NaN and infinity in a gradient: "propagate", "skip" (that table's update is left out)
            or "error". A GradScaler's skipping comes first.
        check_ids: False leaves out ids that are not in the table, instead of an error.
        seed: an int rounds 16-bit weights stochastically, with other noise for each parameter and update (the number of
            the latter is part of the state); None rounds them to the nearest."""

_RAISES = """

    Raises:
        TypeError, ValueError: an option has the wrong type; it is out of its range; a parameter cannot be an embedding
            table; a state_dict to load is that of an optimizer with other options.
        RuntimeError: in ``step``: a gradient is dense, the count of an id of the mini-batch is not positive, a gradient
            is not finite where nonfinite is "error", or a loaded state is incomplete. The message names the parameter.
            All parameters are checked before the first is updated and before any state is created, so that nothing is
            half-updated. (On CUDA nobody waits for ids, counts and gradients: a wrong one is a device-side assertion.)
"""


class MBASGD(MBAOptimizer):
    __doc__ = f"""SGD with mini-batch aware L2 (DIN eq. 7): ``w_j <- w_j - lr (g_j + (l2 / n_j) w_j)``.

    See :func:`dien_ops.functional.mba_sgd_`. With l2=0 and momentum=0 it is :class:`torch.optim.SGD` on a
    sparse gradient. With momentum, the momentum of a row stands still while its id is
    absent.{_SHARED_ARGUMENTS}
        momentum: in [0, 1).

    ``decay="lazy"`` (without momentum and counts; lr l2 < 1) is dense SGD with L2, which torch.optim.SGD calls
    weight_decay, at the cost of the mini-batch: a row pays what it owes when it is touched next. Rows that are read in
    between lag behind, so :meth:`catch_up_` must be called before evaluation, saving or export. An update that is left
    out for nonfinite="skip" still owes its decay. One that a GradScaler left out does not, so the scaler's finding is
    read, which waits for the device.{_RAISES}
    Example:
        >>> items = dien_ops.MBAEmbedding(1000, 18)
        >>> optimizer = dien_ops.optim.MBASGD(items.parameters(), lr=0.1)
        >>> items(torch.tensor([1, 5, 1])).sum().backward()
        >>> optimizer.step()
    """

    _operator = torch.ops.dien_ops.mba_sgd_
    _options = ("momentum",)
    _decays = embedding.SGD_DECAYS
    _states = (("momentum_buffer",), ("decayed", "log_decay"))
    _row_states = ("decayed",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        l2: float = 0.01,
        counts: Tensor | None = None,
        momentum: float = 0.0,
        decay: str = "mini_batch_aware",
        nonfinite: str = "propagate",
        check_ids: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(params, lr, l2, counts, decay, nonfinite, check_ids, seed, momentum=momentum)

    def _check_options(self, group: dict[str, Any]) -> None:
        _checks.fraction("momentum", group["momentum"])
        if group["decay"] == "lazy":
            embedding.check_lazy(group["momentum"], group["counts"])
            if not float(group["lr"]) * group["l2"] < 1:
                raise ValueError(f'lr l2 must be below 1 where decay is "lazy", got {float(group["lr"]) * group["l2"]}')

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (group["momentum"],)

    def _used_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        if group["decay"] == "lazy":
            return ("decayed", "log_decay")
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _new_state(self, name: str, weight: Tensor, group: dict[str, Any]) -> Any:
        return 0.0 if name == "log_decay" else super()._new_state(name, weight, group)

    def _update(self, call: Call, lr: float, *_: list[float]) -> None:
        if call.group["decay"] != "lazy":
            return super()._update(call, lr, [])
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item() != 0:
            return
        this_step = math.log1p(-lr * call.l2)
        log_decays = [self.state.get(weight, {}).get("log_decay", 0.0) + this_step for weight in call.weights]
        super()._update(call, lr, log_decays)
        for weight, log_decay in zip(call.weights, log_decays, strict=True):
            self.state[weight]["log_decay"] = log_decay

    @torch.no_grad()
    def catch_up_(self) -> None:
        """Pays what the rows of all tables with ``decay="lazy"`` owe, so that they are those of dense SGD with L2.

        Call it before evaluation, saving or export: its cost grows with the tables. Training goes on from there.

        Example:
            >>> items = dien_ops.MBAEmbedding(1000, 18)
            >>> optimizer = dien_ops.optim.MBASGD(items.parameters(), lr=0.1, decay="lazy")
            >>> items(torch.tensor([1, 5, 1])).sum().backward()
            >>> optimizer.step()
            >>> optimizer.catch_up_()
        """
        tables = owners()
        for i, number, weight, name in self._parameters():
            group, state = self.param_groups[i], self.state.get(weight, {})
            if group["decay"] != "lazy" or "decayed" not in state:
                continue
            with naming(name):
                self._check_state(weight)
            padding_idx = padding_of(tables.get(id(weight), []))
            for ids in torch.arange(weight.shape[0], device=weight.device).split(_ROWS_AT_ONCE):
                grad = weight.new_zeros(1, 1).expand(ids.numel(), weight.shape[1])
                table = Table(weight, ids, grad, None, padding_idx, number, name)
                super()._update(Call(group, 0.0, [table]), 0.0, [state["log_decay"]])


class MBAAdagrad(MBAOptimizer):
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

    _operator = torch.ops.dien_ops.mba_adagrad_
    _options = ("initial_accumulator_value", "eps")
    _states = (("sum",),)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        l2: float = 0.01,
        counts: Tensor | None = None,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        decay: str = "mini_batch_aware",
        nonfinite: str = "propagate",
        check_ids: bool = True,
        seed: int | None = 0,
    ) -> None:
        options = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, lr, l2, counts, decay, nonfinite, check_ids, seed, **options)

    def _check_options(self, group: dict[str, Any]) -> None:
        _checks.non_negative("initial_accumulator_value", group["initial_accumulator_value"])
        _checks.non_negative("eps", group["eps"])

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (group["eps"],)

    def _new_state(self, name: str, weight: Tensor, group: dict[str, Any]) -> Any:
        return super()._new_state(name, weight, group).fill_(group["initial_accumulator_value"])


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

    _operator = torch.ops.dien_ops.mba_rowwise_adagrad_
    _row_states = ("sum",)


class MBAAdam(MBAOptimizer):
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

    _operator = torch.ops.dien_ops.mba_adam_
    _options = ("betas", "eps")
    _states = (("exp_avg", "exp_avg_sq", "step"),)
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
        decay: str = "mini_batch_aware",
        nonfinite: str = "propagate",
        check_ids: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(params, lr, l2, counts, decay, nonfinite, check_ids, seed, betas=betas, eps=eps)

    def _check_options(self, group: dict[str, Any]) -> None:
        embedding.check_betas(group["betas"])
        _checks.non_negative("eps", group["eps"])

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (*group["betas"], group["eps"])
