# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of :mod:`dien_ops.optim` share: options, state, checks, the order of a step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from dien_ops import _checks, embedding
from dien_ops.embedding_table import MBAEmbedding, owners

_NUMBERS = ("log_decay", "updates")  # state that is no tensor


class Name(NamedTuple):
    """What messages call a parameter."""

    group: int
    place: int  # in the group
    weight: Tensor

    def __str__(self) -> str:
        return f"parameter {self.place} of group {self.group} (shape {list(self.weight.shape)})"


class Table(NamedTuple):
    """A parameter with a gradient, and what a step does to it."""

    weight: Tensor
    ids: Tensor  # [N]
    grad: Tensor  # [N, D]
    counts: Tensor | None
    padding_idx: int
    number: int  # of the parameter, over all groups
    name: Name


class Call(NamedTuple):
    """Tables that one operator call updates: of one group, dtype, device and l2, and all with counts or none."""

    group: dict[str, Any]
    l2: float
    tables: list[Table]

    @property
    def batches(self) -> tuple[list[Any], ...]:
        """The operators' lists from ids to padding_idx."""
        _, ids, grads, counts, padding_idx, _, _ = map(list, zip(*self.tables, strict=True))
        return ids, grads, [] if counts[0] is None else counts, padding_idx

    @property
    def weights(self) -> list[Tensor]:
        return [table.weight for table in self.tables]


class _Uncast:
    """A tensor of a state_dict on its way through Optimizer.load_state_dict, which would cast it to the parameter's
    dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _wrapped(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        return _Uncast(value) if isinstance(value, Tensor) else value

    numbers = {number for group in state_dict["param_groups"] for number in group["params"]}
    state = {
        number: {name: one(x) for name, x in of.items()} if number in numbers else of
        for number, of in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _mixed(*numbers: int) -> int:
    """An int64 in which every bit depends on every bit of the numbers: each goes through the finalizer of SplitMix64
    (Steele, Lea, Flood 2014) with what came before."""
    z = 0
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


class naming:
    """Errors of what is done within name the parameter."""

    def __init__(self, parameter: Name) -> None:
        self.parameter = parameter

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise type(error)(f"{self.parameter}: {error}") from error


class MBAOptimizer(Optimizer, ABC):
    """What the optimizers share: options, checks, the order of a step."""

    _step_supports_amp_scaling = True  # a GradScaler sets self.grad_scale and self.found_inf for the time of a step

    _operator: Any
    _options: tuple[str, ...]  # the rule's own
    _decays: Sequence[str] = embedding.DECAYS
    _states: tuple[tuple[str, ...], ...]  # those that come together: a table has all of them or none
    _row_states: tuple[str, ...] = ()  # those with one number per row; the other tensors have the weight's shape
    # the others have that which the weight is computed in
    _own_dtypes: ClassVar[dict[str, torch.dtype]] = {"step": torch.int64, "decayed": torch.float64}

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        l2: float,
        counts: Tensor | None,
        decay: str,
        nonfinite: str,
        check_ids: bool,
        seed: int | None,
        **options: Any,
    ) -> None:
        shared = {"decay": decay, "nonfinite": nonfinite, "check_ids": check_ids, "seed": seed}
        super().__init__(params, {"lr": lr, "l2": l2, "counts": counts, **shared, **options})

    # ------------------------------------------------------------------------------------------- options and state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the dtype of the state, which comes back as it was."""
        handle = self.register_load_state_dict_pre_hook(_wrapped)  # after the caller's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, of a pickle, and what load_state_dict loads
        needed = ("lr", "l2", "counts", "decay", "nonfinite", "check_ids", "seed", *self._options)
        for i, group in enumerate(state["param_groups"]):  # self.defaults may hold more, which torch puts there
            missing = [name for name in needed if name not in group]
            if missing:
                raise ValueError(
                    f"{type(self).__name__} needs the options {', '.join(needed)}, but parameter group {i} of the "
                    f"state_dict has no {', '.join(missing)}: it is that of another optimizer"
                )
        for weight, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, _Uncast):
                    floating = value.tensor.is_floating_point()
                    dtype = self._dtype(name, weight) if floating else value.tensor.dtype
                    values[name] = value.tensor.to(weight.device, dtype)
        super().__setstate__(state)

    @abstractmethod
    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises TypeError or ValueError for an option of the rule that has the wrong type or is out of its range."""

    @abstractmethod
    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The last arguments of the operator."""

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        lr = lr.item() if isinstance(lr, Tensor) else lr
        embedding.check_options(
            lr, group["l2"], group["decay"], group["nonfinite"], group["check_ids"], group["seed"], self._decays
        )
        self._check_options(group)
        for weight in group["params"]:
            _checks.supported("an embedding weight", weight)
            if weight.dim() != 2:
                raise ValueError(
                    f"{type(self).__name__} updates embedding tables [num_embeddings, D], got a parameter of "
                    f"shape {list(weight.shape)}: give dense parameters to an optimizer of torch.optim"
                )
            embedding.check_counts(group["counts"], weight)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _dtype(self, name: str, weight: Tensor) -> torch.dtype:
        return self._own_dtypes.get(name, _checks.compute_dtype(weight.dtype))

    def _shape(self, name: str, weight: Tensor) -> torch.Size:
        return weight.shape[:1] if name in self._row_states else weight.shape

    def _new_state(self, name: str, weight: Tensor, group: dict[str, Any]) -> Any:
        return torch.zeros(self._shape(name, weight), dtype=self._dtype(name, weight), device=weight.device)

    def _used_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those that the group's options call for."""
        return tuple(itertools.chain(*self._states))

    def _tensor_states(self) -> list[str]:
        """In the order of the operator's lists."""
        return [name for name in itertools.chain(*self._states) if name not in _NUMBERS]

    def _check_state(self, weight: Tensor) -> None:
        """What an update would refuse, found before any: a state_dict may have brought anything."""
        state = self.state.get(weight, {})
        known = list(itertools.chain(*self._states))
        some = any(0 < sum(name in state for name in together) < len(together) for together in self._states)
        if some or not state.keys() <= {*known, "updates"}:
            raise RuntimeError(f"the state must be {', '.join(known)}, got {', '.join(map(str, state))}")
        for name, value in {"weight": weight, **state}.items():
            if name in _NUMBERS:
                _checks.number(name, value)
                continue
            _checks.tensor(name, value)
            expected = weight.dtype if name == "weight" else self._dtype(name, weight)
            if value.dtype != expected:
                raise ValueError(f"{name} must be {expected} for a weight of {weight.dtype}, got {value.dtype}")
            _checks.same_device("weight", weight, name, value)
            meaning = "[num_embeddings]" if name in self._row_states else "[num_embeddings, D]"
            _checks.shape(name, value, self._shape(name, weight), meaning)
            if not value.is_contiguous():
                raise RuntimeError(f"{name} must be contiguous: it is updated in place")

    # -------------------------------------------------------------------------------------------------------- a step

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
        calls = self._calls()
        if len(calls) > 1:  # else the update's own check is the first thing it does
            for call in calls:
                try:
                    self._check(call)
                except RuntimeError as error:
                    self._name_the_culprit(call, error)
                    raise
        for call in calls:
            self._update(call, float(call.group["lr"]))
        return loss

    def _parameters(self) -> Iterator[tuple[int, int, Tensor, Name]]:
        """Each parameter after the number of its group and its own over all groups, with its name for messages."""
        number = 0
        for i, group in enumerate(self.param_groups):
            self._check_group(group)
            for j, weight in enumerate(group["params"]):
                yield i, number, weight, Name(i, j, weight)
                number += 1

    def _calls(self) -> list[Call]:
        """The tables that have a gradient, as they are updated together; checks all that can be checked here."""
        tables = owners()
        calls: dict[Any, Call] = {}
        for i, number, weight, name in self._parameters():
            if weight.grad is None:
                continue
            group, owned_by = self.param_groups[i], tables.get(id(weight), [])
            with naming(name):
                remedy = "give dense parameters to an optimizer of torch.optim"
                ids, grad = embedding.sparse_rows(weight.grad, weight, remedy)
                self._check_state(weight)
                counts, l2 = _counts_and_l2(group, owned_by)
            table = Table(weight, ids, grad, counts, padding_of(owned_by), number, name)
            key = (i, weight.dtype, weight.device, counts is None, l2)
            calls.setdefault(key, Call(group, l2, [])).tables.append(table)
        return list(calls.values())

    def _scaler(self, name: str, device: torch.device) -> Tensor | None:
        """What a GradScaler set for the time of this step, grad_scale or found_inf."""
        value: Tensor | None = getattr(self, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)

    def _nonfinite(self, call: Call) -> str:
        scaled = getattr(self, "found_inf", None) is not None  # by a GradScaler, which looks for such gradients itself
        return "propagate" if scaled else call.group["nonfinite"]

    def _check(self, call: Call) -> None:
        """Everything that an update checks of its mini-batches."""
        torch.ops.dien_ops.mba_check(call.weights, *call.batches, self._nonfinite(call), call.group["check_ids"])

    def _name_the_culprit(self, call: Call, error: RuntimeError) -> None:
        """Raises what a refused call said of one of its tables, with the parameter's name."""
        if isinstance(error, torch.AcceleratorError):  # of a kernel that ran before, any: the next call is told of it
            return
        for table in call.tables:
            with naming(table.name):
                self._check(call._replace(tables=[table]))

    def _update(self, call: Call, lr: float, *log_decays: list[float]) -> None:
        """Updates the rows of a call's tables. State that was not there yet is kept if that succeeds."""
        group, weights, device = call.group, call.weights, call.weights[0].device
        used, states = self._used_states(group), [dict(self.state.get(weight, {})) for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            for name in used:
                if name not in state:
                    state[name] = self._new_state(name, weight, group)
        lists = [[state[name] for state in states] if name in used else [] for name in self._tensor_states()]
        seeds = []
        if group["seed"] is not None and weights[0].dtype in (torch.bfloat16, torch.float16):
            numbers = [table.number for table in call.tables]
            updates = [state.get("updates", 0) for state in states]
            seeds = [_mixed(group["seed"], *pair) for pair in zip(numbers, updates, strict=True)]
        decay, _ = embedding.as_computed(group["decay"], None)
        try:
            self._operator(
                weights, *lists, *call.batches, seeds, *log_decays, self._scaler("grad_scale", device),
                self._scaler("found_inf", device), decay, self._nonfinite(call), group["check_ids"], lr, call.l2,
                *self._numbers(group),
            )  # fmt: skip
        except RuntimeError as error:
            self._name_the_culprit(call, error)
            raise
        embedding.mark_written(*weights, *(tensor for tensors in lists for tensor in tensors))
        for weight, state in zip(weights, states, strict=True):
            if seeds:
                state["updates"] = state.get("updates", 0) + 1
            if state:
                self.state[weight].update(state)


def _counts_and_l2(group: dict[str, Any], tables: list[MBAEmbedding]) -> tuple[Tensor | None, float]:
    """n_j, of the group or of the tables that own a weight (mostly one or none), and what is divided by it."""
    l2: float = group["l2"]
    if group["decay"] in ("difacto", "lazy"):
        return None, l2
    if group["counts"] is not None:
        return group["counts"], l2
    counted = [table for table in tables if table.counts is not None]
    if any(other.counts is not counted[0].counts for other in counted[1:]):
        raise RuntimeError(
            f"{len(tables)} MBAEmbeddings share a weight of shape {list(tables[0].weight.shape)} and have "
            f"counts of their own: pass the optimizer the counts to use"
        )
    if not counted:
        return None, l2
    if counted[0].learn_counts is not None:  # n_j = counts_j learn_counts / seen
        l2 = l2 * counted[0].seen / counted[0].learn_counts
    return counted[0].counts, l2


def padding_of(tables: list[MBAEmbedding]) -> int:
    """The padding row of the tables that own a weight; a row that is padding to some of them only is data."""
    padding = {table.padding_idx for table in tables}
    common = padding.pop() if len(padding) == 1 else None
    return embedding.NO_PADDING if common is None else common
