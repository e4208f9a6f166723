# SPDX-License-Identifier: Apache-2.0
"""Who can do the embedding column's work: ours and its rivals.

All update the same tables in place, so that a large one is there once, and take their mini-batches from the same
rotation, so that no call repeats another's, whoever made that. What is compared with float64 is the change of the rows
and states that one mini-batch names, whatever stood there before.
"""

from __future__ import annotations

import gc
import importlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Contestant, Factory, Unavailable
from dien_ops import MBAEmbedding, functional, optim, reference

# As tables call them
COMPOSED, UNIQUE, DENSE = "torch.optim sparse, L2 added", "unique and index_add_", "torch.optim dense, L2 on all rows"
WITHOUT_L2, FBGEMM = "torch.optim sparse, no L2 (less work)", "FBGEMM, no L2 (less work)"
DENSE_ELEMENTS = {
    "cpu": 2e8,
    "cuda": 2e9,
}  # of a table: from there on a dense update takes too long, or too much memory

ZIPF, UNIFORM, ONE_IN_A_THIRD = "Zipf", "uniform", "one in a third"
SGD, MOMENTUM, ADAGRAD, ROWWISE, ADAM = "SGD", "momentum", "Adagrad", "rowwise Adagrad", "Adam"
# Large enough to see in the comparison whether a decay or a gradient is missing.
LR, L2, MOMENTUM_FACTOR = 0.5, 0.1, 0.9
SCATTER = 2654435761  # a prime: multiplication by it scatters 0..rows-1, unless rows is a multiple of it
PIECE = 2**16  # rows that the values of a table repeat after
EULER = 0.5772156649015329


@dataclass(frozen=True)
class Table:
    rows: int
    ids: int = 51200  # of a mini-batch: 1024 histories of 50
    kind: str = ZIPF

    @property
    def name(self) -> str:
        return f"{self.rows:,} rows, {self.ids:,} ids"


@dataclass(frozen=True)
class Update:
    """A mini-batch's update of one or several tables; with ``lookup`` the lookup and its backward come before it, else
    the gradient rows are given."""

    tables: tuple[Table, ...]
    dim: int = 64
    rule: str = SGD
    lookup: bool = False
    stochastic: bool = False  # rounding of 16-bit weights
    batches: int = 16  # after so many calls the first mini-batch comes again
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{'; '.join(t.name for t in self.tables)} D{self.dim}"


# ---------------------------------------------------------------------------------------------------------------- data


def draw(table: Table, generator: torch.Generator) -> Tensor:
    """[N] ids. Zipf's law with exponent 1: H_k is nearly log(k + 0.5) + EULER, whose inverse needs no table (the most
    frequent id comes out 2 % too rare)."""
    if table.kind == UNIFORM:
        return torch.randint(0, table.rows, (table.ids,), generator=generator)
    harmonic = math.log(table.rows + 0.5) + EULER
    u = torch.rand(table.ids, generator=generator, dtype=torch.float64)
    ranks = (torch.exp(u * harmonic - EULER) - 0.5).ceil().long().clamp_(1, table.rows)
    if table.kind == ONE_IN_A_THIRD:
        ranks[torch.rand(table.ids, generator=generator) < 1 / 3] = min(1000, table.rows)
    return ranks * SCATTER % table.rows


@dataclass(frozen=True)
class MiniBatch:
    """Of one table."""

    ids: Tensor  # [N]
    grad: Tensor  # [N, D]


class Data:
    """Tables, counts, and mini-batches in rotation: shared by the contestants of a row, and gone with them."""

    def __init__(self, p: Update) -> None:
        gc.collect()  # an earlier row's tables, where something still refers to them in circles
        generator = torch.Generator().manual_seed(1)
        on_device = torch.Generator(p.device).manual_seed(1)
        self.tables, self.device = p.tables, p.device
        # Small, so that the rounding of 16-bit weights is small beside their change.
        piece = (torch.randn(PIECE, p.dim, generator=on_device, device=p.device) / 4).to(p.dtype)
        self.weights: list[Tensor] = []  # [rows, D], all pages touched
        self.counts: list[Tensor] = []  # [rows]
        for table in p.tables:
            weight = torch.empty(table.rows, p.dim, dtype=p.dtype, device=p.device)
            counts = torch.empty(table.rows, dtype=torch.int64, device=p.device)
            if p.device == "cpu":  # as MBAEmbedding does; to the good of all who work on them
                torch.ops.dien_ops.advise_huge_pages(weight)
                torch.ops.dien_ops.advise_huge_pages(counts)
            for part in weight.split(PIECE):
                part.copy_(piece[: len(part)])
            self.weights.append(weight)
            self.counts.append(torch.arange(table.rows, device=p.device, out=counts).remainder_(97).add_(1))
        self.batches: list[list[MiniBatch]] = []
        distinct = 0
        for _ in range(p.batches):
            some = []
            for table in p.tables:
                rows, inverse, times = draw(table, generator).unique(return_inverse=True, return_counts=True)
                distinct += rows.numel()
                grad = torch.randn(table.ids, p.dim, generator=on_device, device=p.device)
                # All sums are of one size, so that the comparison with float64 sees each.
                grad /= times[inverse].sqrt().unsqueeze(1).to(p.device)
                some.append(MiniBatch(rows[inverse].to(p.device), grad.to(p.dtype)))
            self.batches.append(some)
        self.distinct = distinct / p.batches  # rows of all tables that a mini-batch names
        self.upcoming = 0

    def turn(self) -> list[MiniBatch]:
        """The next mini-batch: one of each table."""
        batch = self.batches[self.upcoming]
        self.upcoming = (self.upcoming + 1) % len(self.batches)
        return batch


_living: weakref.WeakValueDictionary[Update, Data] = weakref.WeakValueDictionary()


def data_of(p: Update) -> Data:
    """The same for all who do this work at the same time."""
    key = replace(p, rule=SGD, lookup=False, stochastic=False)
    data = _living.get(key)
    if data is None:
        data = _living[key] = Data(p)
    return data


def touched_bytes(p: Update, line: int = 64) -> float:
    """What uniform ids touch of tables and counts, in whole cache lines, before the first mini-batch comes again."""
    total = 0.0
    for t in p.tables:
        for row in (p.dim * p.dtype.itemsize, torch.int64.itemsize):
            lines = t.rows * row / line
            total += line * lines * -math.expm1(-p.batches * t.ids * max(1, row / line) / lines)
    return total


# --------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    function: str  # of functional and of reference
    optimizer: type[optim.MBASGD] | type[optim.MBAAdagrad] | type[optim.MBAAdam]
    torchs: type[torch.optim.Optimizer] | None  # takes sparse gradients
    states: tuple[str, ...] = ()  # [rows, D]
    row_states: tuple[str, ...] = ()  # [rows]
    options: dict[str, float] = field(default_factory=dict)


RULES = {
    SGD: Rule("mba_sgd_", optim.MBASGD, torch.optim.SGD),
    MOMENTUM: Rule("mba_sgd_", optim.MBASGD, None, ("momentum_buffer",), options={"momentum": MOMENTUM_FACTOR}),
    ADAGRAD: Rule("mba_adagrad_", optim.MBAAdagrad, torch.optim.Adagrad, ("state_sum",)),
    ROWWISE: Rule("mba_rowwise_adagrad_", optim.MBARowwiseAdagrad, None, row_states=("state_sum",)),
    ADAM: Rule("mba_adam_", optim.MBAAdam, torch.optim.SparseAdam, ("exp_avg", "exp_avg_sq"), ("step",)),
}
START = {"momentum_buffer": 1, "state_sum": 1, "exp_avg": 1, "exp_avg_sq": 1, "step": 1000}
NAMES_IN_OPTIMIZERS = {"state_sum": "sum"}


def bytes_of(p: Update, data: Data) -> float:
    """The fewest that an update of given gradients moves: ids and gradient rows are read; of each distinct row, the
    count is read, and weight and states are read and written."""
    rule = RULES[p.rule]
    compute = max(p.dtype.itemsize, torch.float32.itemsize)
    row_state = sum(torch.int64.itemsize if name == "step" else compute for name in rule.row_states)
    row = p.dim * (p.dtype.itemsize + compute * len(rule.states)) + row_state
    n = sum(t.ids for t in p.tables)
    id_bytes = count_bytes = torch.int64.itemsize
    return n * (id_bytes + p.dim * p.dtype.itemsize) + data.distinct * (count_bytes + 2 * row)


def new_states(p: Update, weight: Tensor) -> dict[str, Tensor]:
    """As after some steps: from zeros, the first Adagrad and Adam updates have the gradient's sign alone."""
    rule, dtype = RULES[p.rule], torch.promote_types(p.dtype, torch.float32)
    states = {name: torch.full_like(weight, START[name], dtype=dtype) for name in rule.states}
    for name in rule.row_states:
        dtype_of_row = torch.int64 if name == "step" else dtype
        states[name] = torch.full([len(weight)], START[name], dtype=dtype_of_row, device=weight.device)
    return states


# What a contestant updates of one table: the weight and the rule's states, by the names of the functions' arguments.
Updated = dict[str, Tensor]


def _contestant(
    p: Update,
    data: Data,
    call: Callable[[list[MiniBatch]], Any],
    updated: Sequence[Updated],
    l2: float = L2,
    with_counts: bool = True,
    steps: Callable[[], int] | None = None,  # where all rows share one count of steps, after the call
) -> Contestant:
    rule = RULES[p.rule]
    seen: list[tuple[Tensor, Tensor, MiniBatch, Updated]] = []  # of each table: rows [S], [N] which, and what was there

    def rows_of(table: Updated, rows: Tensor) -> Updated:
        return {name: x[rows].detach().double() for name, x in table.items()}

    def before() -> None:
        seen.clear()
        for batch, table in zip(data.batches[data.upcoming], updated, strict=True):
            rows, inverse = batch.ids.unique(return_inverse=True)
            seen.append((rows, inverse, batch, rows_of(table, rows)))

    def changes(after: Sequence[Updated]) -> list[Tensor]:
        return [
            now[name] - was for now, (_, _, _, table) in zip(after, seen, strict=True) for name, was in table.items()
        ]

    def read(_: Any) -> list[Tensor]:
        after = [rows_of(table, rows) for table, (rows, *_) in zip(updated, seen, strict=True)]
        return [x.to(p.dtype) for x in changes(after)]

    def exact() -> list[Tensor]:
        after = []
        for (_, inverse, batch, table), counts in zip(seen, data.counts, strict=True):
            now = {name: x.clone() for name, x in table.items()}
            if steps is not None:
                now["step"] = torch.full_like(now["weight"][:, 0], steps() - 1)
            n = counts[seen[len(after)][0]] if with_counts else None
            getattr(reference, rule.function)(
                **now, ids=inverse, grad=batch.grad.double(), lr=LR, l2=l2, counts=n, **rule.options
            )
            after.append(now)
        return changes(after)

    moved = None if p.lookup else bytes_of(p, data)
    return Contestant(lambda: call(data.turn()), read, exact, before=before, bytes=moved)


# ---------------------------------------------------------------------------------------------------------------- ours


def backward(rows: list[Tensor], batches: list[MiniBatch]) -> None:
    """Of what was looked up, which nobody keeps."""
    torch.autograd.backward(rows, [b.grad for b in batches])


def ours(p: Update) -> Contestant:
    """The function; with lookup, or several tables, the optimizer."""
    data = data_of(p)
    return _by_optimizer(p, data) if p.lookup else _by_function(p, data)


def _by_function(p: Update, data: Data) -> Contestant:
    rule = RULES[p.rule]
    function = getattr(functional, rule.function)
    (weight,), (counts,) = data.weights, data.counts
    states = new_states(p, weight)
    rounding = {"seed": 1} if p.stochastic else {}

    def call(batches: list[MiniBatch]) -> None:
        (b,) = batches
        function(weight, **states, ids=b.ids, grad=b.grad, lr=LR, l2=L2, counts=counts, **rule.options, **rounding)

    return _contestant(p, data, call, [{"weight": weight, **states}])


def _by_optimizer(p: Update, data: Data) -> Contestant:
    rule = RULES[p.rule]
    tables = [
        MBAEmbedding.from_pretrained(weight, freeze=False, counts=counts)
        for weight, counts in zip(data.weights, data.counts, strict=True)
    ]
    optimizer = rule.optimizer([t.weight for t in tables], lr=LR, l2=L2, **rule.options)

    def call(batches: list[MiniBatch]) -> None:
        backward([table(b.ids) for table, b in zip(tables, batches, strict=True)], batches)
        optimizer.step()
        optimizer.zero_grad()

    call(data.turn())  # makes the states
    return _contestant(p, data, call, [_states_of(p, optimizer, t.weight) for t in tables])


def _states_of(p: Update, optimizer: torch.optim.Optimizer, weight: Tensor) -> Updated:
    """Those with a number for each row, set to what :func:`new_states` gives."""
    rule, updated = RULES[p.rule], {"weight": weight}
    for name in (*rule.states, *rule.row_states):
        state = optimizer.state[weight][NAMES_IN_OPTIMIZERS.get(name, name)]
        if isinstance(state, Tensor) and state.dim() > 0:
            updated[name] = state.fill_(START[name])
    return updated


def with_rows(factory: Factory, rows: int) -> Factory:
    """The same mini-batches' size on a table of another."""
    return lambda p: factory(replace(p, tables=tuple(replace(t, rows=rows) for t in p.tables)))


def with_ids(factory: Factory, kind: str) -> Factory:
    return lambda p: factory(replace(p, tables=tuple(replace(t, kind=kind) for t in p.tables)))


def with_options(factory: Factory, **options: Any) -> Factory:
    return lambda p: factory(replace(p, **options))


# ------------------------------------------------------------------------------------------------- in torch's operators


class Gradients:
    """Gives parameters their gradients as nn.Embedding does: by a lookup and its backward, or from the given rows."""

    def __init__(self, p: Update, data: Data, sparse: bool) -> None:
        self.parameters = [nn.Parameter(weight) for weight in data.weights]  # the same memory
        self.lookup, self.sparse = p.lookup, sparse

    def set(self, batches: list[MiniBatch]) -> None:
        if self.lookup:
            weights = zip(self.parameters, batches, strict=True)
            backward([F.embedding(b.ids, w, sparse=self.sparse) for w, b in weights], batches)
            return
        for weight, b in zip(self.parameters, batches, strict=True):
            if self.sparse:
                weight.grad = torch.sparse_coo_tensor(b.ids.unsqueeze(0), b.grad, weight.shape, check_invariants=False)
            else:
                weight.grad = torch.ops.aten.embedding_dense_backward(b.grad, b.ids, len(weight), -1, False)


def _sparse(p: Update, l2: float) -> Contestant:
    rule, data = RULES[p.rule], data_of(p)
    if rule.torchs is None:
        raise Unavailable(f"torch.optim has no {p.rule} of a mini-batch's rows")
    gradients = Gradients(p, data, sparse=True)
    optimizer = rule.torchs(gradients.parameters, lr=LR)

    def call(batches: list[MiniBatch]) -> None:
        gradients.set(batches)
        if l2 != 0:
            with torch.no_grad():
                for weight, counts in zip(gradients.parameters, data.counts, strict=True):
                    weight.grad = weight.grad.coalesce()
                    rows, values = weight.grad.indices()[0], weight.grad.values()
                    values.addcmul_(weight[rows], (l2 / counts[rows]).unsqueeze(1).to(values.dtype))
        optimizer.step()
        optimizer.zero_grad()

    call(data.turn())  # makes the states
    updated = [_states_of(p, optimizer, weight) for weight in gradients.parameters]
    steps = (lambda: int(optimizer.state[gradients.parameters[0]]["step"])) if p.rule == ADAM else None
    return _contestant(p, data, call, updated, l2, steps=steps)


def composed(p: Update) -> Contestant:
    """torch.optim, the decay being added to the coalesced gradient."""
    return _sparse(p, L2)


def without_l2(p: Update) -> Contestant:
    return _sparse(p, 0.0)


def dense(p: Update) -> Contestant:
    """nn.Embedding with a dense gradient, and torch.optim's own weight decay."""
    elements = sum(t.rows for t in p.tables) * p.dim
    if elements > DENSE_ELEMENTS[p.device]:
        raise Unavailable(f"left out: a gradient of {elements * p.dtype.itemsize / 2**30:.2g} GiB in each call")
    if p.rule != SGD:
        raise Unavailable("the states of absent rows would change too")
    data = data_of(p)
    gradients = Gradients(p, data, sparse=False)
    optimizer = torch.optim.SGD(gradients.parameters, lr=LR, weight_decay=L2)

    def call(batches: list[MiniBatch]) -> None:
        gradients.set(batches)
        optimizer.step()
        optimizer.zero_grad()

    updated = [{"weight": weight} for weight in gradients.parameters]
    return _contestant(p, data, call, updated, with_counts=False)


@torch.no_grad()
def _update_unique(rule: str, weight: Tensor, s: Updated, b: MiniBatch, counts: Tensor) -> None:
    """Each rule written down for the rows that the mini-batch names, in float32 for 16-bit weights."""
    rows, inverse = b.ids.unique(return_inverse=True)
    compute = torch.promote_types(weight.dtype, torch.float32)
    w = weight.index_select(0, rows).to(compute)
    g = w.new_zeros(w.shape).index_add_(0, inverse, b.grad.to(compute))
    g.addcmul_(w, (L2 / counts[rows]).unsqueeze(1).to(compute))
    now = {name: x.index_select(0, rows) for name, x in s.items()}
    if rule == MOMENTUM:
        g = now["momentum_buffer"].mul_(MOMENTUM_FACTOR).add_(g)
    elif rule == ADAGRAD:
        g.div_(now["state_sum"].addcmul_(g, g).sqrt().add_(1e-10))
    elif rule == ROWWISE:
        g.div_(now["state_sum"].add_(g.square().mean(1)).sqrt().add_(1e-10).unsqueeze(1))
    elif rule == ADAM:
        t = now["step"].add_(1).to(compute).unsqueeze(1)
        m = now["exp_avg"].lerp_(g, 1 - 0.9)
        v = now["exp_avg_sq"].mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        g = m / (1 - 0.9**t) / (v / (1 - 0.999**t)).sqrt_().add_(1e-8)
    for name, x in now.items():
        s[name].index_copy_(0, rows, x)
    weight.index_copy_(0, rows, w.sub_(g, alpha=LR).to(weight.dtype))


def unique(p: Update) -> Contestant:
    """No sparse tensor but the one that the lookup's backward gives; no optimizer."""
    data = data_of(p)
    gradients = Gradients(p, data, sparse=True)
    states = [new_states(p, weight) for weight in data.weights]

    def call(batches: list[MiniBatch]) -> None:
        if p.lookup:
            gradients.set(batches)
            grads = [w.grad for w in gradients.parameters]
            batches = [MiniBatch(g._indices()[0], g._values()) for g in grads]
            for w in gradients.parameters:
                w.grad = None
        for weight, s, b, counts in zip(data.weights, states, batches, data.counts, strict=True):
            _update_unique(p.rule, weight, s, b, counts)

    return _contestant(p, data, call, [{"weight": w, **s} for w, s in zip(data.weights, states, strict=True)])


# -------------------------------------------------------------------------------------------------------------- FBGEMM


def _fbgemm(module: str) -> Any:
    try:
        return importlib.import_module(f"fbgemm_gpu.{module}")
    except ModuleNotFoundError as missing:
        raise Unavailable("not installed here (it needs the fbgemm-gpu-cpu or fbgemm-gpu of this torch)") from missing
    except OSError as mismatch:
        raise Unavailable(f"does not load with torch {torch.__version__}: it needs the version for it") from mismatch


def fbgemm(p: Update) -> Contestant:
    """Its backward is the update. It has tables of its own."""
    training = _fbgemm("split_table_batched_embeddings_ops_training")
    common = _fbgemm("split_table_batched_embeddings_ops_common")
    optimizers = {SGD: "EXACT_SGD", ROWWISE: "EXACT_ROWWISE_ADAGRAD"}
    if p.rule not in optimizers:
        raise Unavailable("has no such rule on the CPU" if p.device == "cpu" else "not compared")
    if p.dim % 4 != 0:
        raise Unavailable("needs D divisible by 4")
    if p.dtype != torch.float32 or len(p.tables) > 1:
        raise Unavailable("not compared")
    data = data_of(p)
    on_gpu = p.device == "cuda"
    place = common.EmbeddingLocation.DEVICE if on_gpu else common.EmbeddingLocation.HOST
    compute = training.ComputeDevice.CUDA if on_gpu else training.ComputeDevice.CPU
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(p.tables[0].rows, p.dim, place, compute)],
        optimizer=getattr(training.OptimType, optimizers[p.rule]),
        learning_rate=LR,
        eps=1e-10,
        pooling_mode=common.PoolingMode.NONE,
    )
    updated = {"weight": module.split_embedding_weights()[0].copy_(data.weights[0])}
    if p.rule == ROWWISE:
        updated["state_sum"] = module.split_optimizer_states()[0][0].fill_(START["state_sum"])
    offsets = torch.arange(p.tables[0].ids + 1, device=p.device)
    looked_up = {} if p.lookup else {id(b): module(b.ids, offsets) for (b,) in data.batches}

    def call(batches: list[MiniBatch]) -> None:
        (b,) = batches
        rows = looked_up.get(id(b))
        (module(b.ids, offsets) if rows is None else rows).backward(b.grad, retain_graph=rows is not None)

    return _contestant(p, data, call, [updated], l2=0.0)
