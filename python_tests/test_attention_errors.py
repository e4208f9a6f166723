# SPDX-License-Identifier: Apache-2.0
"""What softmax attention refuses: the message names it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dien_ops
from attention_cases import F64
from dien_ops import functional
from helpers import run_python

INTEGERS, DOUBLES = torch.zeros(2, 4, 3, dtype=torch.long), torch.zeros(3, 5, dtype=F64)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "target must be a Tensor, got NoneType", {"target": None}),
        (ValueError, r"states must be 3-D, got 2-D of shape \[4, 3\]", {"states": torch.zeros(4, 3)}),
        (ValueError, "states must be float32, float64, bfloat16 or float16, got int64", {"states": INTEGERS}),
        (ValueError, "weight must have the dtype of states: expected torch.float32, got", {"weight": DOUBLES}),
        (ValueError, "target must have the dtype of states: expected torch.float32, got", {"target": DOUBLES[:2]}),
        (TypeError, "states must be a Tensor, got NoneType", {"states": None}),
        (TypeError, "weight must be a Tensor, got NoneType", {"weight": None}),
        (ValueError, r"target must be 2-D or 3-D, got 1-D of shape \[5\]", {"target": torch.zeros(5)}),
        (ValueError, r"weight must be 2-D, got 1-D of shape \[3\]", {"weight": torch.zeros(3)}),
        (RuntimeError, r"weight must have shape \[3, 5\] \[H, A\], got \[5, 3\]", {"weight": torch.zeros(5, 3)}),
        (RuntimeError, "target must have the batch size of states, 2, got 3", {"target": torch.zeros(3, 5)}),
        (RuntimeError, r"lengths must have shape \[2\] \[B\], got \[3\]", {"lengths": INTEGERS[0, :3, 0]}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    given = {"states": torch.zeros(2, 4, 3), "target": torch.zeros(2, 5), "weight": torch.zeros(3, 5)}
    given |= {name: x.to(given["states"].device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        functional.bilinear_attention(**given)


@pytest.mark.not_on_cuda(reason="a kernel finds it there, and the process loses the GPU: see the end of this file")
@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_length_outside_of_the_steps_is_named(wrong):
    with pytest.raises(RuntimeError, match=rf"lengths must be in 0..4 \(T\), got {wrong} at row 1"):
        functional.bilinear_attention(
            torch.zeros(2, 4, 3), torch.zeros(2, 5), torch.zeros(3, 5), lengths=torch.tensor([0, wrong])
        )


def test_what_autocast_makes_of_a_wrong_argument_is_named_too():
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="target must be a Tensor, got NoneType"):
            functional.bilinear_attention(torch.zeros(2, 4, 3), None, torch.zeros(3, 5))
        with pytest.raises(
            ValueError, match=r"weight must have the dtype of states: expected torch\.bfloat16 or torch\.float32"
        ):
            functional.bilinear_attention(torch.zeros(2, 4, 3), torch.zeros(2, 5), torch.zeros(3, 5, dtype=F64))


@pytest.mark.parametrize(
    ("error", "message", "sizes"),
    [
        (ValueError, "hidden_size must be greater than zero, got 0", (0, 3)),
        (ValueError, "target_size must be greater than zero, got -1", (3, -1)),
        (TypeError, "hidden_size must be an int, got float", (3.0, 3)),
        (TypeError, "target_size must be an int, got NoneType", (3, None)),
    ],
)
def test_the_module_refuses_a_wrong_size(error, message, sizes):
    with pytest.raises(error, match=message):
        dien_ops.BilinearAttention(*sizes)


def test_a_length_beyond_the_steps_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
attention = dien_ops.BilinearAttention(3, 5).cuda()
attention(torch.zeros(2, 4, 3, device="cuda"), torch.zeros(2, 5, device="cuda"), lengths=torch.tensor([4, 7]).cuda())
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr
