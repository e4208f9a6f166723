# SPDX-License-Identifier: Apache-2.0
"""dien_ops.GRU in the place of torch.nn.GRU, and the attentional cells as modules."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dien_ops
from helpers import assert_close, leaf

D = torch.float64


def twins(*sizes, **options) -> tuple[nn.GRU, dien_ops.GRU]:
    theirs = nn.GRU(*sizes, **options, dtype=D)
    ours = dien_ops.GRU(*sizes, **options, dtype=D)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_results(theirs: nn.GRU, ours: dien_ops.GRU, x, *hx) -> None:
    """Outputs, states, and the gradients of input and parameters."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        output, h_n = module(x, *hx)
        data = output.data if isinstance(output, PackedSequence) else output
        weights = torch.linspace(-1, 1, data.numel(), dtype=D).view_as(data)
        ((data * weights).sum() + (h_n**2).sum()).backward()
        results.append([data.detach(), h_n.detach(), *(p.grad.clone() for p in module.parameters())])
    assert_close(results[1], results[0])


# ------------------------------------------------------------------------------------------------------ nn.GRU's twin


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both_ways", "one_way"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_results_and_gradients_are_nn_grus(num_layers, bias, bidirectional, batch_first):
    theirs, ours = twins(3, 5, num_layers=num_layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(4, 6, 3, dtype=D)
    assert_same_results(theirs, ours, x)
    batch = 4 if batch_first else 6
    assert_same_results(theirs, ours, x, torch.randn(num_layers * (1 + bidirectional), batch, 5, dtype=D))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_unbatched_input_is_a_batch_without_its_axis(hx):
    theirs, ours = twins(3, 5, num_layers=2, batch_first=True)
    assert_same_results(theirs, ours, torch.randn(6, 3, dtype=D), *([torch.randn(2, 5, dtype=D)] if hx else []))


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both_ways", "one_way"])
def test_packed_sequences_go_in_and_come_out(bidirectional, enforce_sorted):
    theirs, ours = twins(3, 5, num_layers=2, bidirectional=bidirectional)
    lengths = torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4])
    packed = pack_padded_sequence(torch.randn(6, 4, 3, dtype=D), lengths, enforce_sorted=enforce_sorted)
    hx = torch.randn(2 * (1 + bidirectional), 4, 5, dtype=D)
    assert_same_results(theirs, ours, packed, hx)
    expected, actual = theirs(packed, hx)[0], ours(packed, hx)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, e = getattr(actual, field), getattr(expected, field)
        assert (a is None and e is None) or torch.equal(a, e), field


def test_lengths_are_packing_without_packing():
    theirs, ours = twins(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 6, 3, dtype=D), torch.tensor([4, 1, 6, 3])
    expected, h_n = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(expected, batch_first=True)
    assert_close(ours(x, lengths=lengths), [expected, h_n])


def test_the_same_seed_gives_the_same_parameters_as_nn_gru():
    torch.manual_seed(3)
    theirs = nn.GRU(3, 5, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = dien_ops.GRU(3, 5, 2, bidirectional=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_state_dicts_load_both_ways():
    theirs, ours = twins(3, 5, bias=False)
    theirs.load_state_dict(ours.state_dict())


def test_constructor_arguments_are_nn_grus_in_nn_grus_order():
    ours = list(inspect.signature(dien_ops.GRU.__init__).parameters)[1:]
    for i, name in enumerate(ours):
        if name not in ("device", "dtype"):  # nn.GRU takes its arguments as *args: read its base class
            assert list(inspect.signature(nn.RNNBase.__init__).parameters)[2 + i] == name


def test_dropout_acts_between_layers_in_training_only():
    gru = dien_ops.GRU(3, 5, num_layers=2, dropout=1.0, dtype=D)
    x = torch.randn(4, 2, 3, dtype=D)
    dropped, _ = gru(x)
    zeroed, _ = dien_ops.functional.gru(
        torch.zeros(4, 2, 5, dtype=D), gru.weight_ih_l1, gru.weight_hh_l1, gru.bias_ih_l1, gru.bias_hh_l1
    )
    assert_close([dropped], [zeroed])
    assert not torch.equal(gru.eval()(x)[0], dropped)


def test_dropout_with_one_layer_warns_that_it_does_nothing():
    with pytest.warns(UserWarning, match=r"dropout=0.5 does nothing with num_layers=1"):
        dien_ops.GRU(3, 5, dropout=0.5)


def test_backward_works_in_eval_mode():
    theirs, ours = twins(3, 5)
    assert_same_results(theirs.eval(), ours.eval(), torch.randn(4, 2, 3, dtype=D))


def test_flatten_parameters_changes_nothing():
    gru = dien_ops.GRU(3, 5)
    before = {name: p.data_ptr() for name, p in gru.named_parameters()}
    gru.flatten_parameters()
    assert before == {name: p.data_ptr() for name, p in gru.named_parameters()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("make", [lambda: dien_ops.GRU(3, 5, 2), lambda: dien_ops.AUGRU(3, 5, gate="authors")])
def test_modules_are_copied_and_pickled(make, duplicate):
    module = make()
    other = duplicate(module)
    assert repr(other) == repr(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_repr_is_nn_grus():
    options = dict(num_layers=2, batch_first=True, dropout=0.5, bidirectional=True)
    assert repr(dien_ops.GRU(3, 5, **options)) == repr(nn.GRU(3, 5, **options))
    assert (
        repr(dien_ops.AUGRU(3, 5, batch_first=True, gate="authors")) == "AUGRU(3, 5, batch_first=True, gate='authors')"
    )


# --------------------------------------------------------------------------------------------------- the same errors


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.zeros(4, 2, 4, dtype=D)),
        lambda m: m(torch.zeros(2, 4, 2, 3, dtype=D)),
        lambda m: m(torch.zeros(4, 2, 3, dtype=D), torch.zeros(1, 3, 5, dtype=D)),
        lambda m: m(torch.zeros(4, 2, 3, dtype=D), torch.zeros(2, 2, 5, dtype=D)),
        lambda m: m(torch.zeros(4, 3, dtype=D), torch.zeros(1, 2, 5, dtype=D)),
        lambda m: m(torch.zeros(4, 2, 3)),
    ],
    ids=["features", "rank", "hx_batch", "hx_layers", "hx_rank", "dtype"],
)
def test_mistakes_raise_nn_grus_exception_types(call):
    theirs, ours = twins(3, 5)
    with pytest.raises(Exception) as expected:  # whatever nn.GRU raises
        call(theirs)
    with pytest.raises(expected.type):
        call(ours)


def test_a_wrong_hidden_size_is_reported_in_nn_grus_words():
    theirs, ours = twins(3, 5)
    messages = []
    for module in (theirs, ours):
        with pytest.raises(RuntimeError) as error:
            module(torch.zeros(4, 2, 3, dtype=D), torch.zeros(1, 3, 5, dtype=D))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"input_size": 0}, ValueError),
        ({"hidden_size": 0}, ValueError),
        ({"hidden_size": 5.0}, TypeError),
        ({"num_layers": 0}, ValueError),
        ({"dropout": 1.5}, ValueError),
        ({"dropout": True}, ValueError),
    ],
    ids=str,
)
def test_constructor_mistakes_raise_nn_grus_exception_types(arguments, error):
    for cls in (nn.GRU, dien_ops.GRU):
        with pytest.raises(error):
            cls(**({"input_size": 3, "hidden_size": 5} | arguments))


def test_lengths_with_packed_or_unbatched_input_are_refused():
    gru, lengths = dien_ops.GRU(3, 5), torch.tensor([2])
    with pytest.raises(ValueError, match="lengths must not be given with a PackedSequence"):
        gru(pack_padded_sequence(torch.zeros(2, 1, 3), lengths), lengths=lengths)
    with pytest.raises(ValueError, match="lengths must not be given with unbatched"):
        gru(torch.zeros(2, 3), lengths=lengths)


# ------------------------------------------------------------------------------------------------- attentional cells


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


# ------------------------------------------------------------------------------------------------- torch's toolbox


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}], ids=["one", "many"])
def test_gru_compiles_to_one_graph_for_all_sizes(options):
    gru = dien_ops.GRU(3, 5, batch_first=True, dtype=D, **options).eval()
    compiled = torch.compile(gru, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in [(3, 5), (4, 7)]:
        x, lengths = leaf(batch, steps, 3), torch.arange(batch) % (steps + 1)
        results = []
        for module in (gru, compiled):
            output, h_n = module(x, lengths=lengths)
            results.append([output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), [x, *gru.parameters()])])
        assert_close(results[1], results[0], 0.0)


def test_gru_exports_with_dynamic_batch_and_time():
    gru = dien_ops.GRU(3, 5, num_layers=2, batch_first=True)
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    sizes = {"input": {0: batch, 1: steps}, "lengths": {0: batch}}
    exported = torch.export.export(
        gru, (torch.randn(3, 4, 3),), kwargs={"lengths": torch.tensor([4, 0, 2])}, dynamic_shapes=sizes
    )
    x, lengths = torch.randn(5, 9, 3), torch.tensor([9, 0, 1, 5, 2])
    assert_close(exported.module()(x, lengths=lengths), gru(x, lengths=lengths), 0.0)
