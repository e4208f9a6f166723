# SPDX-License-Identifier: Apache-2.0
"""Dice as a module: other libraries' state, moving averages, what BatchNorm1d does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dice_cases import F64, LOW
from helpers import assert_close, gradients, leaf


class OverBatchNorm(nn.Module):
    """Dice as public libraries build it, of torch's own modules: DeepCTR-Torch (affine, eps 1e-8) and FuxiCTR (not
    affine, eps 1e-9, momentum 0.01)."""

    def __init__(self, channels: int, **options):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, **options)
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, s: Tensor) -> Tensor:
        p = torch.sigmoid(self.bn(s))
        return p * s + self.alpha * (1 - p) * s


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"eps": 1e-8}, {"eps": 0, "variance_eps": 1e-8, "affine": True}),
        ({"eps": 1e-9, "momentum": 0.01, "affine": False}, {"eps": 0, "variance_eps": 1e-9, "momentum": 0.01}),
    ],
    ids=["deepctr_torch", "fuxictr"],
)
def test_the_state_of_a_public_dice_loads_and_computes_the_same(theirs, ours):
    public, module = OverBatchNorm(7, **theirs), dien_ops.Dice(7, **ours)
    for parameter in public.parameters():
        nn.init.uniform_(parameter)
    public(torch.randn(50, 7) + 1)
    module.load_state_dict({name.removeprefix("bn."): value for name, value in public.state_dict().items()})
    for training in (True, False, True):
        public.train(training), module.train(training)
        s = leaf(40, 7, dtype=torch.float32)
        outputs = [module(s), public(s)]
        found, expected = ([y, *torch.autograd.grad(y.square().sum(), s)] for y in outputs)
        assert_close(found, expected, 1e-5)
    assert_close([module.running_mean, module.running_var], [public.bn.running_mean, public.bn.running_var], 1e-6)
    assert module.num_batches_tracked == public.bn.num_batches_tracked == 3


def test_without_moving_averages_the_statistics_are_the_batchs_in_evaluation_too():
    module = dien_ops.Dice(5, eps=1e-9, variance_eps=1e-9, track_running_stats=False)
    assert list(module.state_dict()) == ["alpha"]
    assert module.running_mean is module.running_var is module.num_batches_tracked is None
    s = torch.randn(20, 5) + 1
    # as DIEN's authors compute it
    mean = s.mean(0)
    normed = (s - mean) / (((s - mean).square().mean(0) + 1e-9).sqrt() + 1e-9)
    p = torch.sigmoid(normed)
    for training in (True, False):
        assert_close([module.train(training)(s)], [p * s], 1e-6)
    assert "track_running_stats=False" in repr(module) and "track_running_stats" not in repr(dien_ops.Dice(5))
    module.reset_parameters()


def test_the_form_of_dins_authors_never_leaves_mean_zero_and_variance_one():
    module = dien_ops.Dice(5, eps=0, variance_eps=1e-3, affine=True).eval()
    nn.init.uniform_(module.weight)
    s = torch.randn(20, 5)
    p = torch.sigmoid(module.weight * s / math.sqrt(1 + 1e-3))
    assert_close([module(s)], [p * s], 1e-6)


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_a_float32_module_takes_16_bit_input_and_keeps_float32_averages(dtype):
    module, wide = dien_ops.Dice(5, affine=True), dien_ops.Dice(5, affine=True)
    s = (torch.randn(3000, 5) * 0.1 + 3).to(dtype)
    output, expected = module(s), wide(s.float())
    assert output.dtype == dtype and module.running_mean.dtype == torch.float32
    assert_close([output], [expected.to(dtype)], torch.finfo(dtype).eps)
    assert_close([module.running_mean, module.running_var], [wide.running_mean, wide.running_var], 1e-6)
    output.sum().backward()
    assert module.alpha.grad.dtype == module.weight.grad.dtype == torch.float32


def test_autocast_leaves_the_input_as_it_is():
    module, s = dien_ops.Dice(5), torch.randn(8, 5)
    with torch.autocast(s.device.type, dtype=torch.bfloat16):
        assert module(s).dtype == torch.float32
        assert module(s.bfloat16()).dtype == torch.bfloat16


def test_moving_averages_follow_batch_norm():
    ours, theirs = dien_ops.Dice(5, momentum=0.3), nn.BatchNorm1d(5, momentum=0.3, affine=False)
    for _ in range(3):
        s = torch.randn(8, 5) * 2 + 1
        ours(s), theirs(s)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_it_is_dice_over_batch_norm():
    ours, theirs = dien_ops.Dice(5, affine=True, dtype=F64), nn.BatchNorm1d(5, eps=1e-12, dtype=F64)
    nn.init.uniform_(ours.alpha)
    for module in (ours, theirs):
        nn.init.constant_(module.weight, 0.7), nn.init.constant_(module.bias, -0.2)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        s = leaf(16, 5)
        p = torch.sigmoid(theirs(s))
        expected = p * s + (1 - p) * ours.alpha * s
        output = ours(s)
        assert_close([output, *gradients([output], [s])], [expected, *gradients([expected], [s])], 1e-7)


def test_an_empty_batch_leaves_the_moving_averages_alone():
    module = dien_ops.Dice(3)
    module(torch.randn(0, 3)), module(torch.randn(2, 4, 3), lengths=torch.tensor([0, 0]))
    assert (module.running_mean == 0).all() and (module.running_var == 1).all()


def test_in_evaluation_a_row_does_not_depend_on_its_batch():
    module = dien_ops.Dice(6)
    module(torch.randn(50, 6) + 1)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    s = torch.randn(7, 6)
    assert torch.equal(module(s)[3:4], module(s[3:4]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parameters_and_buffers_have_batch_norms_names():
    assert list(dien_ops.Dice(4, affine=True).state_dict()) == [
        "alpha", "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    ]  # fmt: skip
    assert [name for name, _ in dien_ops.Dice(4).named_parameters()] == ["alpha"]
