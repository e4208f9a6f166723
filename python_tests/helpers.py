# SPDX-License-Identifier: Apache-2.0
"""What the tests of several columns share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

THREAD_ORDERS = ("in_order", "reverse", "shuffled", "skewed")  # of the host executor


def leaf(*shape: int, dtype: torch.dtype = torch.float64, low: float = -1.0, high: float = 1.0) -> Tensor:
    """A uniform random tensor that requires grad."""
    return torch.empty(shape, dtype=dtype).uniform_(low, high).requires_grad_()


def here(x: object) -> object:
    """What was made when a file was read, on the device of the tests."""
    return x.to(torch.get_default_device()) if isinstance(x, Tensor) and x.device.type == "cpu" else x


def spread_lengths(batch: int, steps: int) -> Tensor:
    """Lengths in no order that include 0 and T as soon as there are two rows."""
    lengths = torch.arange(batch) * (steps + 1) // max(batch, 1)
    lengths[-1:] = steps
    return lengths[torch.randperm(batch)]


def gradients(outputs: Sequence[Tensor], inputs: Iterable[Tensor | None]) -> list[Tensor]:
    """Gradients of a fixed random projection of all outputs, zeros where an input is not used."""
    generator = torch.Generator("cpu").manual_seed(1)
    present = [x for x in inputs if x is not None]
    projections = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y.device, y.dtype)
        for y in outputs
    ]
    used = [(y, p) for y, p in zip(outputs, projections, strict=True) if y.requires_grad]
    return list(
        torch.autograd.grad(
            [y for y, _ in used], present, [p for _, p in used], materialize_grads=True, allow_unused=True
        )
    )


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Largest difference, relative to the largest expected value where that is above 1."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = a.detach(), e.detach()
        assert a.shape == e.shape, f"result {i}: shape {list(a.shape)}, expected {list(e.shape)}"
        if e.numel() == 0:
            continue
        scale = max(1.0, float(e.abs().max()))
        error = float((a - e).abs().max()) / scale
        assert error <= tolerance, f"result {i} differs by {error:.2e}, allowed {tolerance:.0e}"


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"result {i}"


def assert_at_most_twice_torchs_error(
    draws: Iterable[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]],
) -> None:
    """The low-precision rule: error <= 2 x the error of plain torch in the same precision, both against float64.

    Each draw holds the kernel's, torch's and the exact results for the same random arguments. The error is the root
    mean square over all draws: the largest error of one draw is a matter of luck and moves by factors of 3 between
    draws for two implementations that are equally good. One unit in the last place of the largest value is the floor,
    for results that torch happens to compute exactly.
    """
    totals: list[list[float]] = []
    for kernel, plain, exact in draws:
        totals = totals or [[0.0, 0.0, 0.0] for _ in exact]
        for total, k, t, e in zip(totals, kernel, plain, exact, strict=True):
            assert k.dtype == t.dtype and e.dtype == torch.float64
            if e.numel() == 0:
                continue
            total[0] += float((k.detach() - e.detach()).square().mean())
            total[1] += float((t.detach() - e.detach()).square().mean())
            total[2] = max(total[2], torch.finfo(k.dtype).eps * float(e.detach().abs().max()))
    assert totals, "no draws"
    for i, (ours, torchs, floor) in enumerate(totals):
        assert ours**0.5 <= 2 * torchs**0.5 + floor, f"result {i}: error {ours**0.5:.2e}, torch's {torchs**0.5:.2e}"


def random_state() -> Tensor:
    """Of the generator from which tensors of the default device are drawn."""
    return (torch.cuda if torch.get_default_device().type == "cuda" else torch).get_rng_state()


def with_threads(count: int, f: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return [x.clone() for x in f()]
    finally:
        torch.set_num_threads(before)


T = TypeVar("T")


def captured(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of the call, and what a replay writes its results to. The call takes place once before, for allocations
    and modules."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """For a CUDA device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_python(code: str, cwd: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, as a user would; modules in cwd come first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def second_derivatives(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of the inputs, through a backward that is given the same numbers in any dtype."""

    def numbers(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [(torch.arange(x.numel()) % 7 - 3).view_as(x).to(x.dtype) for x in tensors]

    grads = torch.autograd.grad(outputs, inputs, numbers(outputs), create_graph=True)
    return list(torch.autograd.grad(grads, inputs, numbers(grads), materialize_grads=True))


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float64 numbers, of tf32's 11 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def begins_anywhere(x: Tensor) -> Tensor:
    """x as a contiguous tensor that begins one number into its memory: no two of its numbers are aligned."""
    return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view_as(x).requires_grad_(x.requires_grad)
