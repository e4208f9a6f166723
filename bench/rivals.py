# SPDX-License-Identifier: Apache-2.0
"""Who can do the recurrent column's work: ours and its rivals.

Each is given the same tensors, laid out as it likes best; putting them so, converting weights and compiling are not
timed. All give the states of all steps, and in training the gradients of inputs, scores and parameters for one given
gradient of the states.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bench.compiling import compiled
from bench.harness import Contestant, Unavailable
from dien_ops import functional, gru_weights, reference

LOOP, COMPILED = "Python loop", "torch.compile of it"  # as tables call them
COMPILED_STEPS = 10
GRAPH_WARM_UP_CALLS = 3
PARAMETERS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@dataclass(frozen=True)
class Recurrence:
    """A GRU over [B, T, I], or with attention an AUGRU, with ``targets`` of C targets for each sequence."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    attention: bool = False
    targets: int | None = None
    train: bool = False
    dtype: torch.dtype = torch.float32
    uniform_lengths: bool = False  # in 0..T; else all are T
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"

    @property
    def lengths(self) -> Tensor | None:
        """[B], or None where all are T."""
        if not self.uniform_lengths:
            return None
        lengths = torch.randint(0, self.steps + 1, (self.batch,), generator=torch.Generator().manual_seed(2))
        return lengths.to(self.device)

    @property
    def valid_steps(self) -> int:
        return self.batch * self.steps if self.lengths is None else int(self.lengths.sum())

    @property
    def flops(self) -> float:
        """Of the matrix products, two to a multiplication and addition; the input's share once per sequence."""
        forward = (
            2.0 * self.valid_steps * 3 * self.hidden_size * (self.input_size + (self.targets or 1) * self.hidden_size)
        )
        return 3 * forward if self.train else forward

    @property
    def bytes(self) -> float:
        """The fewest that must be moved: each input read and each state written once; in training all of them are read
        again, the states' gradients are read, and the inputs' are written."""
        rows = self.batch * (self.targets or 1)
        inputs = self.batch * self.steps * self.input_size + rows * self.steps * self.attention
        parameters = 3 * self.hidden_size * (self.input_size + self.hidden_size + 2)
        output = rows * self.steps * self.hidden_size
        once = inputs + parameters + output
        return float((3 * once if self.train else once) * self.dtype.itemsize)


@dataclass(frozen=True)
class Tensors:
    input: Tensor  # [B, T, I]
    attention: Tensor | None  # [B, T] or [B, C, T]
    parameters: tuple[Tensor, ...]  # weight_ih [3H, I], weight_hh [3H, H], bias_ih [3H], bias_hh [3H]; gates r, z, n
    lengths: Tensor | None  # [B]
    grad_output: Tensor  # as the output: [B, T, H] or [B, C, T, H]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.input, *([self.attention] if self.attention is not None else []), *self.parameters]


def tensors(p: Recurrence, dtype: torch.dtype | None = None) -> Tensors:
    """The same numbers each time, rounded to the problem's dtype; leaves that require grad in training."""
    generator = torch.Generator(p.device).manual_seed(1)
    steps, hidden = p.steps, p.hidden_size
    rows = [p.batch] if p.targets is None else [p.batch, p.targets]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.empty(shape, device=p.device).uniform_(low, high, generator=generator)
        return values.to(p.dtype).to(dtype or p.dtype).requires_grad_(p.train)

    shapes = ([3 * hidden, p.input_size], [3 * hidden, hidden], [3 * hidden], [3 * hidden])
    bound = hidden**-0.5  # nn.GRU's
    x = uniform(-1, 1, p.batch, steps, p.input_size)
    scores = uniform(0, 1, *rows, steps) if p.attention else None
    parameters = tuple(uniform(-bound, bound, *shape) for shape in shapes)
    return Tensors(x, scores, parameters, p.lengths, uniform(-1, 1, *rows, steps, hidden).detach())


def compute(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, train: bool
) -> Callable[[], list[Tensor]]:
    """One call: the forward, and in training the gradients of the leaves."""

    def both() -> list[Tensor]:
        output = forward()
        return [output, *torch.autograd.grad(output, leaves, grad)]

    def alone() -> list[Tensor]:
        with torch.inference_mode():
            return [forward()]

    return both if train else alone


def _recurrence(module: Any, t: Tensors) -> Tensor:
    """Through dien_ops.functional or dien_ops.reference."""
    options = {"lengths": t.lengths, "batch_first": True}
    if t.attention is None:
        return module.gru(t.input, *t.parameters, **options)[0]
    return module.attentional_gru(t.input, t.attention, *t.parameters, **options)[0]


@lru_cache(maxsize=2)
def exact(p: Recurrence) -> list[Tensor]:
    """The reference equations in float64."""
    t = tensors(p, torch.float64)
    return [x.detach() for x in compute(lambda: _recurrence(reference, t), t.leaves, t.grad_output.double(), p.train)()]


def _contestant(
    p: Recurrence, call: Callable[[], Any], read: Callable[[Any], Sequence[Tensor]] = list, **more: Any
) -> Contestant:
    on_gpu = p.device == "cuda"
    flops = p.flops if on_gpu or p.dtype == torch.float32 else None  # a CPU's CEILING is float32's
    return Contestant(call, read, lambda: exact(p), flops=flops, bytes=p.bytes if on_gpu else None, **more)


# ---------------------------------------------------------------------------------------------------------------- ours


def ours(p: Recurrence) -> Contestant:
    t = tensors(p)
    try:
        _recurrence(functional, tensors(replace(p, batch=1, steps=1)))
    except ValueError as refusal:
        raise Unavailable(f"dien_ops refuses: {refusal}") from refusal
    return _contestant(p, compute(lambda: _recurrence(functional, t), t.leaves, t.grad_output, p.train))


def with_threads(factory: Callable[[Recurrence], Contestant], threads: int) -> Callable[[Recurrence], Contestant]:
    return lambda p: replace(factory(p), threads=threads)


def in_dtype(factory: Callable[[Any], Contestant], dtype: torch.dtype) -> Callable[[Any], Contestant]:
    return lambda p: factory(replace(p, dtype=dtype))


def per_valid_step(factory: Callable[[Recurrence], Contestant]) -> Callable[[Recurrence], Contestant]:
    return lambda p: replace(factory(p), work=float(p.valid_steps))


def without_attention(factory: Callable[[Recurrence], Contestant]) -> Callable[[Recurrence], Contestant]:
    """The GRU over the same input: less work."""
    return lambda p: factory(replace(p, attention=False))


def at_full_length(factory: Callable[[Recurrence], Contestant]) -> Callable[[Recurrence], Contestant]:
    return lambda p: factory(replace(p, uniform_lengths=False))


def from_a_graph(factory: Callable[[Any], Contestant]) -> Callable[[Any], Contestant]:
    """The same kernels, replayed from a CUDA graph: no work for the host between them."""

    def make(p: Any) -> Contestant:
        contestant = factory(p)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is set up at a first call cannot be captured
            for _ in range(GRAPH_WARM_UP_CALLS):
                contestant.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = contestant.call()

        def call() -> Any:
            graph.replay()
            return results

        return replace(contestant, call=call)

    return make


# ------------------------------------------------------------------------------------------------------------- nn.GRU


def nn_gru(p: Recurrence) -> Contestant:
    t = tensors(p)
    module = nn.GRU(p.input_size, p.hidden_size, batch_first=True, dtype=p.dtype, device=p.device).train(p.train)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), t.parameters, strict=True):
            parameter.copy_(value)
    leaves = [t.input, *module.parameters()]
    return _contestant(p, compute(lambda: module(t.input)[0], leaves, t.grad_output, p.train))


# ------------------------------------------------------------------------------------------------- loops over the time


def one_copy_per_target(
    p: Recurrence, t: Tensors
) -> tuple[Recurrence, Tensors, Callable[[list[Tensor]], list[Tensor]]]:
    """The same work for somebody who knows one target per sequence, and how to read the result."""
    if p.targets is None:
        return p, t, list
    if p.train:
        raise Unavailable("in training each target has a history of its own")
    assert t.attention is not None
    rows = p.batch * p.targets
    copies = Tensors(
        t.input.repeat_interleave(p.targets, 0),
        t.attention.flatten(0, 1),
        t.parameters,
        None if t.lengths is None else t.lengths.repeat_interleave(p.targets),
        t.grad_output.flatten(0, 1),
    )
    shape = (p.batch, p.targets, p.steps, p.hidden_size)
    return replace(p, batch=rows, targets=None), copies, lambda results: [results[0].view(shape)]


def ours_on_copies(p: Recurrence) -> Contestant:
    _, t, read = one_copy_per_target(p, tensors(p))
    return _contestant(p, compute(lambda: _recurrence(functional, t), t.leaves, t.grad_output, p.train), read)


def augru_steps(
    x: Tensor, a: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """AUGRU as public libraries write it: a loop, two products and a row of pointwise operations for each step.

    x [B, T, I], a [B, T], h [B, H]; returns the states [B, T, H] and the last one.
    """
    states = []
    for step in range(x.shape[1]):
        from_x = F.linear(x[:, step], w_ih, b_ih)
        from_h = F.linear(h, w_hh, b_hh)
        x_r, x_z, x_n = from_x.chunk(3, 1)
        h_r, h_z, h_n = from_h.chunk(3, 1)
        r = torch.sigmoid(x_r + h_r)
        u = a[:, step : step + 1] * (1 - torch.sigmoid(x_z + h_z))
        n = torch.tanh(x_n + r * h_n)
        h = (1 - u) * h + u * n
        states.append(h)
    return torch.stack(states, 1), h


def python_loop(p: Recurrence) -> Contestant:
    q, t, read = one_copy_per_target(p, tensors(p))

    def forward() -> Tensor:
        h = t.input.new_zeros(q.batch, q.hidden_size)
        return augru_steps(t.input, t.attention, h, *t.parameters)[0]

    return _contestant(p, compute(forward, t.leaves, t.grad_output, p.train), read)


def compiled_loop(p: Recurrence) -> Contestant:
    """torch.compile of the loop, COMPILED_STEPS steps at a time: all 100 steps in one graph take minutes to compile and
    run no faster. The compilation is in the note."""
    q, t, read = one_copy_per_target(p, tensors(p))

    def make() -> Contestant:
        steps = torch.compile(augru_steps, fullgraph=True, dynamic=False)
        parts = list(zip(t.input.split(COMPILED_STEPS, 1), t.attention.split(COMPILED_STEPS, 1), strict=True))

        def forward() -> Tensor:
            h = t.input.new_zeros(q.batch, q.hidden_size)
            states = []
            for x, a in parts:
                some, h = steps(x, a, h, *t.parameters)
                states.append(some)
            return torch.cat(states, 1)

        return _contestant(p, compute(forward, t.leaves, t.grad_output, p.train), read)

    return compiled(make, f", {COMPILED_STEPS} steps at a time")


def import_deepctr_torch() -> ModuleType:
    """Its module of recurrent layers. When imported it asks the network for its latest version, through `requests`,
    which it does not declare: it is given an empty module of that name, and gives up."""
    absent = object()
    before = sys.modules.get("requests", absent)
    sys.modules["requests"] = ModuleType("requests")
    try:
        return importlib.import_module("deepctr_torch.layers.sequence")
    except ImportError as missing:
        raise Unavailable(f"cannot be imported: {missing}") from missing
    finally:
        del sys.modules["requests"]
        if before is not absent:
            sys.modules["requests"] = before


def deepctr_torch(p: Recurrence) -> Contestant:
    """DynamicGRU of deepctr-torch."""
    DynamicGRU = import_deepctr_torch().DynamicGRU
    q, t, read = one_copy_per_target(p, tensors(p))
    module = DynamicGRU(p.input_size, p.hidden_size, gru_type="AUGRU")
    # The released class registers b_hh as b_ih too; here each has its own, as its equations say.
    theirs = gru_weights.to_library("deepctr_torch", dict(zip(PARAMETERS, t.parameters, strict=True)))
    for name, value in theirs.items():
        setattr(module.rnn, name, nn.Parameter(value))
    batch_sizes = torch.full((p.steps,), q.batch)

    def packed(padded: Tensor) -> Tensor:  # [B, T, ...] to [T * B, ...]
        return padded.detach().transpose(0, 1).flatten(0, 1).requires_grad_(p.train)

    def padded(flat: Tensor) -> Tensor:
        return flat.unflatten(0, (p.steps, q.batch)).transpose(0, 1)

    x, a = packed(t.input), packed(t.attention)
    parameters = [getattr(module.rnn, name) for name in theirs]

    def forward() -> Tensor:
        return module(PackedSequence(x, batch_sizes), PackedSequence(a, batch_sizes)).data

    def converted_back(results: list[Tensor]) -> list[Tensor]:
        output, *grads = results
        if not p.train:
            return read([padded(output)])
        grad_x, grad_a, *grad_parameters = grads
        # The conversion exchanges rows and changes signs, for gradients as for weights.
        ours = gru_weights.from_library("deepctr_torch", dict(zip(theirs, grad_parameters, strict=True)))
        return [padded(output), padded(grad_x), padded(grad_a), *ours.values()]

    call = compute(forward, [x, a, *parameters], packed(t.grad_output).detach(), p.train)
    return _contestant(p, call, converted_back)


# ------------------------------------------------------------------------------------------------------------ OpenVINO


def openvino_gru(p: Recurrence) -> Contestant:
    """OpenVINO's GRUSequence on the CPU, in float32 and with torch's number of threads; inference only.

    Its AUGRU cannot take part: the operator is internal and has no public constructor, and a loop over its equations,
    built from public operators, is not recognised as one (tried with 2026.4).
    """
    try:
        import numpy
        import openvino
        from openvino import opset14 as ops
    except ImportError as missing:
        raise Unavailable(f"cannot be imported: {missing}") from missing
    t = tensors(p)

    def z_first(gates: Tensor) -> Tensor:  # its order is z, r, n
        r, z, n = gates.chunk(3)
        return torch.cat([z, r, n])

    w_ih, w_hh, b_ih, b_hh = (z_first(parameter.detach()) for parameter in t.parameters)
    H = p.hidden_size
    bias = torch.cat([(b_ih + b_hh)[: 2 * H], b_ih[2 * H :], b_hh[2 * H :]])  # z and r, then n's two
    x = ops.parameter(list(t.input.shape), numpy.float32)
    h = ops.constant(torch.zeros(p.batch, 1, H).numpy())
    lengths = ops.constant(torch.full((p.batch,), p.steps, dtype=torch.int32).numpy())
    weights = [ops.constant(tensor[None].numpy()) for tensor in (w_ih, w_hh, bias)]
    node = ops.gru_sequence(x, h, lengths, *weights, H, "forward", linear_before_reset=True)
    model = openvino.compile_model(
        openvino.Model([node.output(0)], [x], "gru"),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    request = model.create_infer_request()
    x_shared = t.input.numpy()
    request.set_input_tensor(openvino.Tensor(x_shared, shared_memory=True))

    def call(_: Any = x_shared) -> Tensor:  # [B, 1, T, H], the request's own memory; _ keeps the input alive
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return _contestant(p, call, lambda output: [output.squeeze(1)])
