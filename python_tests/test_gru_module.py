# SPDX-License-Identifier: Apache-2.0
"""What the modules have beyond nn.GRU: lengths, and the attentional cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dien_ops
from gru_cases import DEEP, D, twins
from helpers import assert_close, leaf

# ------------------------------------------------------------------------------------------------------------- lengths


def test_lengths_are_packing_without_packing():
    theirs, ours = twins(3, 5, **DEEP, batch_first=True)
    x, lengths = torch.randn(4, 6, 3, dtype=D), torch.tensor([4, 1, 6, 3])
    expected, h_n = theirs(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(expected, batch_first=True)
    assert_close(ours(x, lengths=lengths), [expected, h_n])


def test_empty_histories_give_zeros_and_hand_hx_through():
    gru, hx = dien_ops.GRU(3, 5, **DEEP, batch_first=True), torch.randn(4, 2, 5)
    output, h_n = gru(torch.randn(2, 6, 3), hx, lengths=torch.tensor([0, 6]))
    assert torch.equal(output[0], torch.zeros(6, 10)) and torch.equal(h_n[:, 0], hx[:, 0])


def test_lengths_are_on_the_device_of_the_input():
    gru, lengths = dien_ops.GRU(3, 5, device="meta"), torch.tensor([3, 0])
    x = torch.zeros(6, 2, 3, device="meta")
    assert gru(x, lengths=lengths.to("meta"))[0].shape == (6, 2, 5)
    with pytest.raises(
        RuntimeError, match=f"lengths must be on the device of the input: expected meta, got {lengths.device}"
    ):
        gru(x, lengths=lengths)


def test_lengths_with_packed_or_unbatched_input_are_refused():
    gru, lengths = dien_ops.GRU(3, 5), torch.tensor([2])
    with pytest.raises(ValueError, match="lengths must not be given with a PackedSequence"):
        gru(pack_padded_sequence(torch.zeros(2, 1, 3), [2]), lengths=lengths)
    with pytest.raises(ValueError, match="lengths must not be given with unbatched"):
        gru(torch.zeros(2, 3), lengths=lengths)


def test_an_empty_sequence_is_no_mistake():
    hx = torch.randn(1, 2, 5)
    output, h_n = dien_ops.GRU(3, 5)(torch.zeros(0, 2, 3), hx)
    assert output.shape == (0, 2, 5) and torch.equal(h_n, hx)


# --------------------------------------------------------------------------------------------------- attentional cells

CELLS = {
    "AIGRU": ("input", dien_ops.AIGRU, {}),
    "AGRU": ("replace", dien_ops.AGRU, {}),
    "AUGRU": ("paper", dien_ops.AUGRU, {}),
    "AUGRU_authors": ("authors", dien_ops.AUGRU, {"gate": "authors"}),
}


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("targets", [None, 4], ids=["one_target", "targets"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_run_their_gate(name, targets, reset_after):
    gate, cls, options = CELLS[name]
    cell = cls(3, 5, batch_first=True, dtype=D, reset_after=reset_after, **options)
    rows = [2] if targets is None else [2, targets]
    x, a, hx = leaf(2, 6, 3), leaf(*rows, 6, low=0), leaf(1, *rows, 5)
    output, h_n = cell(x, a, hx, lengths=torch.tensor([6, 2]))
    expected, state = dien_ops.reference.attentional_gru(
        x, a, *cell.parameters(), hx[0], gate=gate, reset_after=reset_after, lengths=torch.tensor([6, 2]),
        batch_first=True,
    )  # fmt: skip
    assert_close([output, h_n], [expected, state.unsqueeze(0)])


def test_time_first_is_the_default_for_cells_as_for_nn_gru():
    cell = dien_ops.AUGRU(3, 5, dtype=D)
    x, a = leaf(6, 2, 3), leaf(6, 2, 4, low=0)
    output, h_n = cell(x, a)
    assert output.shape == (6, 2, 4, 5) and h_n.shape == (1, 2, 4, 5)
    cell.batch_first = True
    assert_close(cell(x.transpose(0, 1), a.movedim(0, -1)), [output.movedim(0, -2), h_n])


def test_a_gru_checkpoint_loads_into_a_cell():
    dien_ops.AUGRU(3, 5).load_state_dict(nn.GRU(3, 5).state_dict())


def test_repr_says_what_is_not_the_default():
    cell = dien_ops.AUGRU(3, 5, batch_first=True, gate="authors")
    assert repr(cell) == "AUGRU(3, 5, batch_first=True, gate='authors')"


@pytest.mark.parametrize("option", ["reset_after", "batch_first"])
def test_options_are_booleans(option):
    for value, came in ((None, "NoneType"), ("False", "str"), (0, "int")):
        with pytest.raises(TypeError, match=f"{option} must be a bool, got {came}"):
            dien_ops.AUGRU(3, 5, **{option: value})
        with pytest.raises(TypeError, match=f"{option} must be a bool, got {came}"):
            dien_ops.functional.gru(torch.zeros(2, 2, 3), *nn.GRU(3, 5).parameters(), **{option: value})


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        (D, r"; convert it with input.to\(torch.float32\), or the module with .to\(torch.float64\)$"),
        (torch.int64, r"; convert it with input.to\(torch.float32\)$"),
    ],
    ids=str,
)
def test_an_input_of_another_dtype_than_the_parameters_is_told_so(given, way_out, hx):
    x, a = torch.zeros(4, 2, 3).to(given), torch.zeros(4, 2)
    state = [torch.zeros(1, 2, 5)] if hx else []
    message = f"^input must have the dtype of the parameters: expected torch.float32, got {given}{way_out}"
    for call in (
        lambda: dien_ops.GRU(3, 5)(x, *state),
        lambda: dien_ops.GRU(3, 5)(pack_padded_sequence(x, [4, 2]), *state),
        lambda: dien_ops.AUGRU(3, 5)(x, a, *state),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_cells_name_bad_input():
    cell = dien_ops.AUGRU(3, 5, batch_first=True)
    x, a = torch.zeros(2, 6, 3), torch.zeros(2, 6)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 5\), got \[2, 5\]"):
        cell(x, a, torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        cell(torch.zeros(2, 6, 4), a)
    with pytest.raises(ValueError, match="gate must be one of 'paper', 'authors', got 'input'"):
        dien_ops.AUGRU(3, 5, gate="input")
    with pytest.raises(TypeError, match="attention must be a Tensor"):
        cell(x, None)
