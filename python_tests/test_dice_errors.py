# SPDX-License-Identifier: Apache-2.0
"""What Dice refuses, with a message that names it, and what it just still takes."""

from __future__ import annotations

import math

import pytest
import torch

import dien_ops
from dice_cases import F64, running
from dien_ops import functional
from helpers import assert_close, here, run_python

SEQUENCES = {"input": torch.zeros(2, 4, 3)}
HALF, DOUBLE = torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, dtype=F64)
INTEGERS = torch.ones(3).long()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be 2-D or 3-D, got 1-D of shape \[3\]", {"input": torch.zeros(3)}),
        (ValueError, "input must be float32, float64, bfloat16 or float16, got int64", {"input": torch.zeros(2, 3).long()}),
        (ValueError, "alpha must have the dtype of input: expected torch.float16 or torch.float32", {"input": HALF, "alpha": DOUBLE}),
        (ValueError, "alpha must have the dtype of input: expected torch.float32", {"alpha": DOUBLE}),
        (RuntimeError, r"alpha must have shape \[3\] \[C\], got \[4\]", {"alpha": torch.zeros(4)}),
        (RuntimeError, r"weight must have shape \[3\] \[C\], got \[1\]", {"weight": torch.ones(1)}),
        (TypeError, "alpha must be a Tensor, got NoneType", {"alpha": None}),
        (ValueError, "running_mean and running_var must be given together", {"running_mean": torch.zeros(3)}),
        (TypeError, "momentum must be a number, got NoneType", {"momentum": None}),
        (ValueError, r"momentum must be in \[0, 1\], got 1.5", {"momentum": 1.5}),
        (ValueError, r"momentum must be in \[0, 1\], got nan", {"momentum": math.nan}),
        (TypeError, "eps must be a number, got str", {"eps": "1e-8"}),
        (ValueError, "eps must be finite and >= 0, got -1", {"eps": -1}),
        (ValueError, "running_mean and running_var are needed where training=False, got None", {"training": False}),
        (ValueError, r"lengths need an input of shape \[B, T, C\]", {"lengths": torch.tensor([1, 1])}),
        (ValueError, "lengths must be int32 or int64, got float32", SEQUENCES | {"lengths": torch.ones(2)}),
        (RuntimeError, r"lengths must have shape \[2\] \[B\], got \[1\]", SEQUENCES | {"lengths": torch.tensor([1])}),
        (RuntimeError, r"lengths must be in 0..4 \(T\), got 5 at row 1", SEQUENCES | {"lengths": torch.tensor([0, 5])}),
        (RuntimeError, "lengths must be in 0..4 .*, got -1 at row 0", SEQUENCES | {"lengths": torch.tensor([-1, 4])}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    if torch.get_default_device().type == "cuda" and "0..4" in message:
        pytest.skip("on a device nobody waits for the lengths' values")
    given = {"input": torch.zeros(2, 3), "alpha": torch.zeros(3)} | {name: here(x) for name, x in change.items()}
    with pytest.raises(error, match=message):
        functional.dice(**given)


@pytest.mark.parametrize(
    ("error", "message", "average"),
    [
        (TypeError, "{} must be a Tensor, got list", [0.0, 0.0, 0.0]),
        (ValueError, "{} must have the dtype of input, torch.float32 or torch.float64, got torch.int64", INTEGERS),
        (ValueError, "{} must have the dtype of input, .* got torch.float16", INTEGERS.half()),
        (RuntimeError, r"{} must have shape \[3\] \[C\], got \[4\]", torch.ones(4)),
        (RuntimeError, "{} must be on the device of input: expected .*, got meta", torch.ones(3, device="meta")),
        (RuntimeError, "{} must not be an expanded tensor", torch.ones(1).expand(3)),
    ],
)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_an_unusable_moving_average_is_named_and_the_other_left_alone(name, error, message, average):
    averages, average = running(3, torch.float32), here(average)
    before = {key: value.clone() for key, value in averages.items() if key != name}
    with pytest.raises(error, match=message.format(name)):
        functional.dice(torch.randn(5, 3), torch.zeros(3), **(averages | {name: average}))
    assert all(torch.equal(averages[key], value) for key, value in before.items())


def test_with_16_bit_input_moving_averages_may_be_float32():
    s, alpha = torch.randn(5, 3).bfloat16(), torch.zeros(3)
    for dtype in (torch.bfloat16, torch.float32, F64):
        functional.dice(s, alpha, **running(3, dtype))
    message = (
        "running_mean must have the dtype of input, torch.bfloat16 or torch.float32 or torch.float64, got torch.float16"
    )
    with pytest.raises(ValueError, match=message):
        functional.dice(s, alpha, **running(3, torch.float16))


def test_moving_averages_may_be_float64_or_strided_and_in_evaluation_expanded():
    s, alpha = torch.randn(5, 3), torch.zeros(3)
    plain, wide = running(3, torch.float32), running(3)
    strided = {name: torch.stack([value, value], -1)[:, 0] for name, value in wide.items()}
    for averages in (plain, wide, strided):
        functional.dice(s, alpha, **averages)
    assert_close(list(strided.values()), list(wide.values()))
    assert_close(list(plain.values()), [x.float() for x in wide.values()], 1e-6)
    zero, one = torch.zeros(1), torch.ones(1)
    expected = functional.dice(s, alpha, zero.repeat(3), one.repeat(3), training=False)
    assert_close([functional.dice(s, alpha, zero.expand(3), one.expand(3), training=False)], [expected])


@pytest.mark.parametrize("momentum", [0, 1])
def test_a_momentum_of_zero_or_one_is_allowed(momentum):
    module, s = dien_ops.Dice(3, momentum=momentum), torch.randn(9, 3) + 1
    module(s)
    assert_close([module.running_mean], [momentum * s.mean(0)], 1e-6)


def test_without_eps_a_constant_channel_and_no_other_is_nan():
    s = torch.randn(5, 2, dtype=F64)
    s[:, 1] = 2
    output = functional.dice(s, torch.zeros(2, dtype=F64), eps=0)
    assert output[:, 0].isfinite().all() and output[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "num_features must be an int, got float", {"num_features": 3.0}),
        (ValueError, "num_features must be greater than zero, got 0", {"num_features": 0}),
        (ValueError, "num_features must be greater than zero, got -2", {"num_features": -2}),
        (TypeError, "eps must be a number, got NoneType", {"eps": None}),
        (TypeError, "eps must be a number, got bool", {"eps": True}),
        (ValueError, "eps must be finite and >= 0, got -1", {"eps": -1}),
        (ValueError, "eps must be finite and >= 0, got inf", {"eps": math.inf}),
        (TypeError, "momentum must be a number, got NoneType", {"momentum": None}),
        (ValueError, r"momentum must be in \[0, 1\], got 5.0", {"momentum": 5.0}),
        (ValueError, r"momentum must be in \[0, 1\], got -0.1", {"momentum": -0.1}),
        (TypeError, "affine must be a bool, got int", {"affine": 1}),
        (TypeError, "track_running_stats must be a bool, got int", {"track_running_stats": 1}),
    ],
)
def test_the_module_refuses_a_wrong_option(error, message, options):
    with pytest.raises(error, match=message):
        dien_ops.Dice(**({"num_features": 3} | options))


@pytest.mark.not_on_cuda(reason="there a wrong length ends the process's use of the device")
def test_after_an_error_nothing_is_half_updated():
    module = dien_ops.Dice(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="lengths"):
        module(torch.zeros(2, 4, 3), lengths=torch.tensor([0, 5]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_wrong_length_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
dien_ops.Dice(3).cuda()(torch.zeros(2, 4, 3, device="cuda"), lengths=torch.tensor([4, 7], device="cuda"))
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr
