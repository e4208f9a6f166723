# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels of Dice have: orders of threads, streams and graphs. The rest of them: test_dice*.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dice_cases import F64, LOW, arguments, results, running
from dien_ops import functional
from helpers import assert_same_bits, captured, spread_lengths, waiting_is_an_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype, set_executor):
    cases = [(arguments(shape, dtype=dtype), shape) for shape in ((70, 16), (130, 5), (9, 7, 24), (3, 4, 1))]

    def run() -> list[Tensor]:
        found = []
        for given, shape in cases:
            lengths = spread_lengths(*shape[:2]).sort().values if len(shape) == 3 else None
            for training in (True, False):
                averages = {} if training else running(shape[-1])
                found += results(functional, given | averages, training=training, lengths=lengths)
        return found

    expected = run()
    for order, seed in [("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]:
        set_executor(order=order, seed=seed, multiprocessors=1)
        assert_same_bits(run(), expected)


# ------------------------------------------------------------------------------------------------- on a device only


def step(given: dict[str, Tensor], averages: dict[str, Tensor], lengths: Tensor | None) -> list[Tensor]:
    output = functional.dice(**given, **averages, lengths=lengths)
    return [output, *torch.autograd.grad(output, list(given.values()), torch.ones_like(output))]


def test_nothing_waits_for_the_device(on_device):
    given, averages, lengths = (
        arguments((9, 7, 24), dtype=torch.float32),
        running(24, torch.float32),
        spread_lengths(9, 7),
    )
    with waiting_is_an_error():
        step(given, averages, lengths), step(given, averages, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_replays_from_a_cuda_graph(on_device, dtype):
    given, averages, lengths = arguments((90, 7, 24), dtype=dtype), running(24, torch.float32), spread_lengths(90, 7)
    graph, replayed = captured(lambda: step(given, averages, lengths))
    other, other_lengths = arguments((90, 7, 24), dtype=dtype), spread_lengths(90, 7)
    with torch.no_grad():
        for name, x in given.items():
            x.copy_(other[name])
        lengths.copy_(other_lengths)
    graph.replay()
    assert_same_bits(replayed, step(other, averages, other_lengths))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_same_inputs_give_the_same_bits(on_device, dtype):
    given = arguments((70_000, 80), dtype=dtype)
    expected = results(functional, given)
    for _ in range(5):
        assert_same_bits(results(functional, given), expected)
