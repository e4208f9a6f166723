# SPDX-License-Identifier: Apache-2.0
"""The executable specification against numbers worked by hand and against torch's own modules."""

import math

import pytest
import torch
from torch import nn

from dien_ops import reference

D = torch.float64


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One step, one unit: input 0.5, state 0.2, weights below in the order r, z, n.
W_IH = torch.tensor([[0.1], [-0.3], [0.7]], dtype=D)
W_HH = torch.tensor([[0.4], [0.6], [-0.5]], dtype=D)
B_IH = torch.tensor([0.01, 0.02, 0.03], dtype=D)
B_HH = torch.tensor([-0.04, 0.05, 0.06], dtype=D)
X, H = 0.5, 0.2
R = sigmoid(0.1 * X + 0.01 + 0.4 * H - 0.04)
Z = sigmoid(-0.3 * X + 0.02 + 0.6 * H + 0.05)
N_AFTER = math.tanh(0.7 * X + 0.03 + R * (-0.5 * H + 0.06))
N_BEFORE = math.tanh(0.7 * X + 0.03 - 0.5 * (R * H) + 0.06)


def one_step(gate: str | None, a: float = 0.3, reset_after: bool = True) -> float:
    x, hx = torch.full((1, 1, 1), X, dtype=D), torch.full((1, 1), H, dtype=D)
    if gate is None:
        _, h = reference.gru(x, W_IH, W_HH, B_IH, B_HH, hx, reset_after=reset_after)
    else:
        score = torch.full((1, 1), a, dtype=D)
        _, h = reference.attentional_gru(x, score, W_IH, W_HH, B_IH, B_HH, hx, gate=gate, reset_after=reset_after)
    return float(h)


def test_gru_with_the_reset_after_the_product_by_hand():
    assert one_step(None) == pytest.approx((1 - Z) * N_AFTER + Z * H, abs=1e-15)


def test_gru_with_the_reset_before_the_product_by_hand():
    assert one_step(None, reset_after=False) == pytest.approx((1 - Z) * N_BEFORE + Z * H, abs=1e-15)


def test_augru_scales_the_papers_update_gate_by_hand():
    update = 0.3 * (1 - Z)
    assert one_step("paper") == pytest.approx((1 - update) * H + update * N_AFTER, abs=1e-15)


def test_the_authors_augru_scales_the_keep_gate_by_hand():
    keep = (1 - 0.3) * Z
    assert one_step("authors") == pytest.approx(keep * H + (1 - keep) * N_AFTER, abs=1e-15)


def test_agru_replaces_the_update_gate_by_hand():
    assert one_step("replace") == pytest.approx((1 - 0.3) * H + 0.3 * N_AFTER, abs=1e-15)


def test_aigru_scales_the_input_by_hand():
    x = 0.3 * X
    r = sigmoid(0.1 * x + 0.01 + 0.4 * H - 0.04)
    z = sigmoid(-0.3 * x + 0.02 + 0.6 * H + 0.05)
    n = math.tanh(0.7 * x + 0.03 + r * (-0.5 * H + 0.06))
    assert one_step("input") == pytest.approx((1 - z) * n + z * H, abs=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
def test_gru_is_torchs_on_packed_sequences(reverse):
    torch_gru = nn.GRU(5, 7, bidirectional=True, dtype=D)
    x, lengths = torch.randn(6, 3, 5, dtype=D), torch.tensor([6, 1, 4])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, h_n = torch_gru(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected)
    suffix = "_reverse" if reverse else ""
    weights = [getattr(torch_gru, f"{kind}_l0{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    output, h = reference.gru(x, *weights, lengths=lengths, reverse=reverse)
    torch.testing.assert_close(output, expected[..., 7:] if reverse else expected[..., :7])
    torch.testing.assert_close(h, h_n[int(reverse)])


def test_bilinear_attention_by_hand():
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]], dtype=D)
    target, weight = torch.tensor([[1.0, -1.0]], dtype=D), torch.tensor([[0.5, 0.0], [0.0, 0.25]], dtype=D)
    # h W e: 0.5, -0.5; the third step is padding
    first = math.exp(0.5) / (math.exp(0.5) + math.exp(-0.5))
    scores = reference.bilinear_attention(states, target, weight, lengths=torch.tensor([2]))
    torch.testing.assert_close(scores, torch.tensor([[first, 1 - first, 0.0]], dtype=D))


def test_attention_over_an_empty_history_is_zero():
    states, target, weight = torch.randn(1, 3, 2, dtype=D), torch.randn(1, 2, dtype=D), torch.randn(2, 2, dtype=D)
    scores = reference.bilinear_attention(states, target, weight, lengths=torch.tensor([0]))
    assert torch.equal(scores, torch.zeros(1, 3, dtype=D))


def test_local_activation_unit_by_hand():
    query, keys = torch.tensor([[2.0]], dtype=D), torch.tensor([[[3.0], [-1.0]]], dtype=D)
    weights = [torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=D), torch.tensor([[2.0]], dtype=D)]
    biases = [torch.tensor([0.5], dtype=D), torch.tensor([-1.0], dtype=D)]
    # [q, k, q - k, q k] = [2, 3, -1, 6] and [2, -1, 3, -2]
    s = [2 * sigmoid(0.2 + 0.6 - 0.3 + 2.4 + 0.5) - 1, 2 * sigmoid(0.2 - 0.2 + 0.9 - 0.8 + 0.5) - 1]
    pooled, scores = reference.local_activation_unit(query, keys, weights, biases, return_scores=True)
    torch.testing.assert_close(scores, torch.tensor([s], dtype=D))
    torch.testing.assert_close(pooled, torch.tensor([[3 * s[0] - s[1]]], dtype=D))


def test_dice_by_hand():
    s = torch.tensor([[1.0], [3.0]], dtype=D)  # mean 2, biased variance 1
    mean, var = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)
    out = reference.dice(s, torch.tensor([0.25], dtype=D), mean, var, eps=0.0)
    low, high = sigmoid(-1.0), sigmoid(1.0)
    expected = [low * 1 + (1 - low) * 0.25 * 1, high * 3 + (1 - high) * 0.25 * 3]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=D).unsqueeze(1))
    assert float(mean) == pytest.approx(0.2)  # 0.9 * 0 + 0.1 * 2
    assert float(var) == pytest.approx(0.9 + 0.1 * 2.0)  # the moving variance is the unbiased one


def test_dice_normalises_as_batch_norm_does():
    s, norm = torch.randn(64, 5, dtype=D), nn.BatchNorm1d(5, eps=1e-30, affine=False, dtype=D)
    alpha = torch.rand(5, dtype=D)
    p = torch.sigmoid(norm(s))
    torch.testing.assert_close(reference.dice(s, alpha, eps=0.0), p * s + (1 - p) * alpha * s)


def test_auxiliary_loss_by_hand():
    h = torch.tensor([[[0.5], [0.25], [9.0]]], dtype=D)
    e = torch.tensor([[[7.0], [2.0], [4.0]]], dtype=D)
    e_hat = torch.tensor([[[8.0], [-1.0], [3.0]]], dtype=D)
    pairs = [
        -math.log(sigmoid(0.5 * 2)) - math.log(1 - sigmoid(0.5 * -1)),
        -math.log(sigmoid(0.25 * 4)) - math.log(1 - sigmoid(0.25 * 3)),
    ]
    loss = {r: float(reference.auxiliary_loss(h, e, e_hat, reduction=r)) for r in ("paper", "mean", "authors")}
    assert loss["paper"] == pytest.approx(sum(pairs))
    assert loss["mean"] == pytest.approx(sum(pairs) / 2)
    shorter = float(reference.auxiliary_loss(h, e, e_hat, lengths=torch.tensor([2]), reduction="authors"))
    assert shorter == pytest.approx(pairs[0] / 2)  # the authors divide by every slot, padding too


def test_mini_batch_aware_sgd_by_hand():
    weight = torch.tensor([[1.0], [2.0], [3.0]], dtype=D)
    ids, grad, counts = torch.tensor([2, 0, 2]), torch.tensor([[0.1], [0.2], [0.3]], dtype=D), torch.tensor([4, 9, 2])
    reference.mba_sgd_(weight, ids, grad, lr=0.5, l2=0.1, counts=counts)
    expected = [1 - 0.5 * (0.2 + 0.1 / 4 * 1), 2.0, 3 - 0.5 * (0.1 + 0.3 + 0.1 / 2 * 3)]
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=D).unsqueeze(1))
