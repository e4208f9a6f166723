# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels of softmax attention have: tf32, the chip's memory, orders of threads, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attention_cases import arguments, results
from dien_ops import _precision, functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    captured,
    rounded_to_tf32,
    spread_lengths,
    waiting_is_an_error,
)

ON_CUDA = pytest.mark.usefixtures("cuda_kernels")


class Tf32Product(torch.autograd.Function):
    """x y of float64 as a matrix unit makes it, and its gradients: operands of 11 bits, sums as good as float64's."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return rounded_to_tf32(x) @ rounded_to_tf32(y)

    @staticmethod
    def backward(ctx, grad):
        x, y = map(rounded_to_tf32, ctx.saved_tensors)
        grad = rounded_to_tf32(grad)
        return grad @ y.transpose(-1, -2), x.transpose(-1, -2) @ grad


@ON_CUDA
@pytest.mark.parametrize("sizes", [(5, None, 20, 36, 18), (4, 9, 30, 20, 12), (3, 40, 9, 33, 7)])
def test_tf32_errs_at_most_twice_as_much_as_its_rounding(sizes, monkeypatch):
    monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend: input.dtype == torch.float32)
    batch, size = sizes[0], sizes[4]

    class Rounded:
        @staticmethod
        def bilinear_attention(states, target, weight, lengths):
            several = target.view(batch, -1, size)
            projected = Tf32Product.apply(several.flatten(0, 1), weight.T).view(batch, -1, weight.size(0))
            scores = torch.softmax(Tf32Product.apply(projected, states.transpose(1, 2)), -1)
            return scores if target.dim() == 3 else scores.squeeze(1)

    def draw():
        low = arguments(sizes, torch.float32)
        exact = [x.detach().double().requires_grad_() for x in low]
        rounded = [x.float() for x in results(Rounded, exact, None)]
        return results(functional, low, None), rounded, results(reference, exact, None)

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


@ON_CUDA
@pytest.mark.parametrize("sizes", [(5, None, 20, 36, 18), (4, 9, 30, 20, 12)])
def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(sizes, monkeypatch):
    given = arguments(sizes, torch.float32)
    exact = results(reference, [x.detach().double().requires_grad_() for x in given], None)
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend, allowed=allowed: allowed)
        pairs = zip(results(functional, given, None), exact, strict=True)
        errors.append(max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs))
    assert errors[0] < 5e-6 and 20 * errors[0] < errors[1]


@pytest.mark.parametrize(
    "sizes, shared_bytes",
    [
        ((2, 3, 1600, 4, 3), 24 << 10),  # too many steps
        ((2, 40, 120, 6, 3), 24 << 10),
        ((2, 9, 400, 6, 3), 24 << 10),
        ((2, 3, 5, 3000, 3), 32 << 10),  # too large a state
    ],
)
def test_what_does_not_fit_on_the_chip_is_in_global_memory(sizes, shared_bytes, set_executor):
    given, lengths = arguments(sizes, torch.float32), spread_lengths(sizes[0], sizes[2])
    set_executor(check=False)
    expected = results(functional, given, lengths)
    set_executor(shared_bytes=shared_bytes)  # finds blocks that share their part of it, too
    found = results(functional, given, lengths)
    if sizes[3] < 3000:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    else:  # as products of tiles
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("targets", [1, 6])
def test_blocks_that_run_together_do_not_share_their_part_of_global_memory(targets, on_device):
    # 240 KB of logits for each target, which no GPU of today has on the chip; the executor runs one block after the other
    given, lengths = arguments((150, targets, 30_000, 4, 3)), torch.arange(150) * 200
    assert_close(results(functional, given, lengths), results(reference, given, lengths))


ORDERED_SIZES = [(3, None, 9, 10, 6), (3, 4, 9, 140, 5), (2, 7, 70, 9, 5), (2, 34, 9, 9, 5), (130, 1, 2, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(dtype, set_executor, monkeypatch):
    monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend: input.dtype == torch.float32)
    every = [(arguments(sizes, dtype), spread_lengths(sizes[0], sizes[2])) for sizes in ORDERED_SIZES]
    expected = [results(functional, *one) for one in every]
    for order, seed in [("in_order", 0), ("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]:
        set_executor(order=order, seed=seed)
        for one, same in zip(every, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results(functional, *one), same, strict=True))


@ON_CUDA
@pytest.mark.parametrize("sizes", [(3, None, 9, 10, 6), (7, 40, 9, 10, 5), (7, 40, 10, 9, 5), (7, 5, 70, 8, 4)])
def test_memory_that_nobody_wrote_is_never_read(sizes):
    given, lengths = arguments(sizes), spread_lengths(sizes[0], sizes[2])
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = results(functional, given, lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, results(reference, given, lengths))


def step(given: list[Tensor], lengths: Tensor) -> list[Tensor]:
    """As results gives it, but without anything from the CPU."""
    scores = functional.bilinear_attention(*given, lengths=lengths)
    return [scores, *torch.autograd.grad(scores, given, torch.ones_like(scores))]


@pytest.mark.parametrize("targets", [1, 40])
def test_a_training_step_replays_from_a_cuda_graph(on_device, targets):
    sizes = (40, targets, 9, 36, 18)
    given, lengths = arguments(sizes, torch.float32), spread_lengths(40, 9)
    graph, replayed = captured(lambda: step(given, lengths))
    other, other_lengths = arguments(sizes, torch.float32), spread_lengths(40, 9)
    with torch.no_grad():
        for to, x in zip([*given, lengths], [*other, other_lengths], strict=True):
            to.copy_(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(other, other_lengths), strict=True))


def test_nothing_waits_for_the_device(on_device):
    given, lengths = arguments((9, 6, 9, 36, 18), torch.float32), spread_lengths(9, 9)
    with waiting_is_an_error():
        step(given, lengths)
