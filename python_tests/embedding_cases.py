# SPDX-License-Identifier: Apache-2.0
"""What the tests of the embedding column share: tables with the state of a rule, mini-batches, and dense brute force."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dien_ops._checks import compute_dtype

STATES = {  # of each rule, in the order of the operators' arguments
    "sgd": [],
    "momentum": ["momentum_buffer"],
    "adagrad": ["state_sum"],
    "rowwise_adagrad": ["state_sum"],
    "adam": ["exp_avg", "exp_avg_sq", "step"],
}
RULES = list(STATES)
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
DECAYS = ["mini_batch_aware", "decoupled", "difacto"]
EVERY_DECAY = pytest.mark.parametrize("decay", DECAYS)
COUNT_TYPES = [torch.int32, torch.int64, torch.float32, torch.float64]
F64 = torch.float64
BIT16 = [torch.bfloat16, torch.float16]
ANY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, F64, *BIT16], ids=str)


def function_of(rule: str) -> str:
    return f"mba_{'sgd' if rule == 'momentum' else rule}_"


class Table:
    """A weight with the state of one rule; update() runs a step with the functional or the reference form."""

    def __init__(self, rule: str, rows: int = 11, dim: int = 5, dtype: torch.dtype = F64) -> None:
        self.rule = rule
        self.weight = torch.randn(rows, dim).to(dtype)
        wide = compute_dtype(dtype)
        shape = [rows] if rule == "rowwise_adagrad" else [rows, dim]
        self.state = {name: torch.zeros(shape, dtype=wide) for name in STATES[rule]}
        if rule == "adam":
            self.state["step"] = torch.zeros(rows, dtype=torch.int64)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.state.values()]

    def copy(self, dtype: torch.dtype | None = None) -> Table:
        other = copy.deepcopy(self)
        if dtype is not None:
            wide = compute_dtype(dtype)
            other.weight = other.weight.to(dtype)
            other.state = {k: v.to(wide) if v.is_floating_point() else v for k, v in other.state.items()}
        return other

    def update(self, module, ids: Tensor | None, grad: Tensor, lr: float = 0.1, **options) -> list[Tensor]:
        if self.rule == "momentum":
            options["momentum"] = 0.9
        function = getattr(module, function_of(self.rule))
        assert function(self.weight, ids=ids, grad=grad, lr=lr, **self.state, **options) is None
        return self.tensors


def skewed_ids(count: int, rows: int) -> Tensor:
    """Ids that repeat: a third of them are the same one."""
    ids = torch.randint(rows, (count,))
    ids[::3] = rows // 2
    return ids


def bits(tensors) -> list[bytes]:
    return [t.detach().flatten().contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in tensors]


class BruteForce:
    """The update of a dense float64 table, one row at a time, straight from the paper and the rules' definitions, with
    lr = 0.1 and the options of OPTIMIZERS in test_optim.py."""

    def __init__(
        self, rule: str, weight: Tensor, l2: float, counts: Tensor | None, decay: str = "mini_batch_aware"
    ) -> None:
        self.rule, self.weight, self.l2, self.decay = rule, weight.detach().clone(), l2, decay
        self.n = torch.ones(weight.shape[0]).double()
        if counts is not None and decay != "difacto":
            self.n = counts.double()
        self.first = torch.full_like(self.weight, 0.1) if rule == "adagrad" else torch.zeros_like(self.weight)
        self.second = torch.zeros_like(self.weight)
        self.steps = [0] * weight.shape[0]

    def step(self, ids: Tensor, gradient: Tensor) -> None:
        for j in set(ids.flatten().tolist()):
            w, g = self.weight[j], gradient[j]
            if self.decay == "decoupled":
                w = w - 0.1 * self.l2 / self.n[j] * w
            else:
                g = g + self.l2 / self.n[j] * w
            self.weight[j] = w - 0.1 * self._move(j, g)

    def _move(self, j: int, g: Tensor) -> Tensor:
        self.steps[j] += 1
        if self.rule == "sgd":
            return g
        if self.rule == "momentum":
            self.first[j] = 0.9 * self.first[j] + g
            return self.first[j]
        if self.rule in ("adagrad", "rowwise_adagrad"):
            self.first[j] += g**2 if self.rule == "adagrad" else (g**2).mean()
            return g / (self.first[j].sqrt() + 1e-10)
        self.first[j] = 0.8 * self.first[j] + 0.2 * g
        self.second[j] = 0.99 * self.second[j] + 0.01 * g**2
        corrected = self.second[j] / (1 - 0.99 ** self.steps[j])
        return self.first[j] / (1 - 0.8 ** self.steps[j]) / (corrected.sqrt() + 1e-8)


def operator_lists(tables: list[Table], batches: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """The first lists of the rule's operator, up to grads."""
    states = [[table.state[name] for table in tables] for name in STATES[tables[0].rule]]
    if tables[0].rule in ("sgd", "momentum"):
        states = [*(states or [[]]), []]  # momentum_buffers, decayed
    return [[t.weight for t in tables], *states, [ids for ids, _ in batches], [grad for _, grad in batches]]


def call_operator(tables: list[Table], batches, *, counts=(), padding_idx=None, seeds=(), grad_scale=None,
                  found_inf=None, decay="mini_batch_aware", nonfinite="propagate", check_ids=True) -> None:  # fmt: skip
    """One update of all tables."""
    rule = tables[0].rule
    numbers = {"sgd": [0.0], "momentum": [0.9], "adam": [0.9, 0.999, 1e-8]}.get(rule, [1e-10])
    log_decays = [[]] if rule in ("sgd", "momentum") else []
    getattr(torch.ops.dien_ops, function_of(rule))(
        *operator_lists(tables, batches), list(counts), padding_idx or [-1] * len(tables), list(seeds), *log_decays,
        grad_scale, found_inf, decay, nonfinite, check_ids, 0.1, 0.3, *numbers,
    )  # fmt: skip
