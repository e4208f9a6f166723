# SPDX-License-Identifier: Apache-2.0
"""dien_ops.GRU in the place of torch.nn.GRU: each test names something that users of nn.GRU rely on."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import dien_ops
from dien_ops import reference
from gru_cases import DEEP, D, twins
from helpers import assert_at_most_twice_torchs_error, assert_close, leaf, random_state


def results(module: nn.Module, x, *hx) -> list[Tensor]:
    """Outputs, states, and the gradients of hx and of the parameters."""
    module.zero_grad()
    hx = [h.detach().requires_grad_() for h in hx]
    output, h_n = module(x, *hx)
    data = output.data if isinstance(output, PackedSequence) else output
    weights = torch.linspace(-1, 1, data.numel(), dtype=D).view_as(data)
    ((data * weights).sum() + (h_n**2).sum()).backward()
    return [data.detach(), h_n.detach(), *(h.grad for h in hx), *(p.grad.clone() for p in module.parameters())]


def assert_same_results(theirs: nn.Module, ours: nn.Module, x, *hx) -> None:
    assert_close(results(ours, x, *hx), results(theirs, x, *hx))


# ---------------------------------------------------------------------------------------------------- the constructor


def test_constructor_arguments_are_nn_grus_in_nn_grus_order():
    ours = list(inspect.signature(dien_ops.GRU.__init__).parameters.values())[1:]
    theirs = dict(inspect.signature(nn.RNNBase.__init__).parameters)  # nn.GRU takes its arguments as *args
    del theirs["self"], theirs["mode"], theirs["proj_size"]
    assert [p.name for p in ours] == list(theirs)
    assert [p.default for p in ours] == [p.default for p in theirs.values()]


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


def test_the_same_seed_gives_the_same_parameters_and_leaves_the_same_random_state():
    modules, states = [], []
    for cls in (nn.GRU, dien_ops.GRU):
        torch.manual_seed(3)
        modules.append(cls(3, 5, **DEEP))
        modules[-1].reset_parameters()
        states.append(random_state())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))
    assert torch.equal(*states)


def test_a_module_is_made_on_the_meta_device_and_filled_later():
    theirs = nn.GRU(3, 5, dtype=D)
    ours = dien_ops.GRU(3, 5, device="meta", dtype=D)
    assert ours(torch.empty(4, 2, 3, device="meta", dtype=D))[0].shape == (4, 2, 5)
    assigned = copy.deepcopy(ours)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    emptied = ours.to_empty(device=torch.get_default_device())
    emptied.load_state_dict(theirs.state_dict())
    for filled in (assigned, emptied):
        assert_same_results(theirs, filled, torch.randn(4, 2, 3, dtype=D))


def test_repr_is_nn_grus():
    for options in ({}, {"bias": False}, {**DEEP, "batch_first": True, "dropout": 0.5}):
        assert repr(dien_ops.GRU(3, 5, **options)) == repr(nn.GRU(3, 5, **options))


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.not_on_cuda(reason="cuDNN's GRU draws in its own way")
@pytest.mark.parametrize("dropout", [0.4, 1.0])
@pytest.mark.parametrize("layout", ["batch_first", "time_first", "packed", "unbatched"])
def test_dropout_draws_nn_grus_random_numbers(layout, dropout):
    theirs, ours = twins(3, 5, 3, dropout=dropout, bidirectional=True, batch_first=layout == "batch_first")
    x = torch.randn(*([6] if layout == "unbatched" else [6, 4]), 3, dtype=D)
    if layout == "packed":
        x = pack_padded_sequence(x, [4, 1, 6, 4], enforce_sorted=False)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        found.append([*results(module, x), torch.get_rng_state().double()])
    assert_close(*found)


def test_dropout_acts_in_training_only(without_cudnn):
    theirs, ours = twins(3, 5, 2, dropout=0.4)
    assert_same_results(theirs.eval(), ours.eval(), torch.randn(6, 4, 3, dtype=D))


def test_dropout_with_one_layer_warns_at_the_callers_line():
    for cls in (nn.GRU, dien_ops.GRU):
        with pytest.warns(UserWarning, match="dropout") as caught:
            cls(3, 5, dropout=0.5)
        assert len(caught) == 1
    assert caught[0].filename == __file__


# ----------------------------------------------------------------------------------------------------- input and state


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
def test_unbatched_input_is_a_batch_without_its_axis(batch_first, hx):
    theirs, ours = twins(3, 5, **DEEP, batch_first=batch_first)
    assert_same_results(theirs, ours, torch.randn(6, 3, dtype=D), *([torch.randn(4, 5, dtype=D)] if hx else []))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("options", [{}, DEEP, {"batch_first": True}], ids=["one", "deep", "batch_first"])
def test_packed_sequences_go_in_and_come_out(options, enforce_sorted, hx):
    theirs, ours = twins(3, 5, **options)
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    packed = pack_padded_sequence(torch.randn(6, 4, 3, dtype=D), lengths, enforce_sorted=enforce_sorted)
    given = [torch.randn(4 if options == DEEP else 1, 4, 5, dtype=D)] if hx else []
    assert_same_results(theirs, ours, packed, *given)
    expected, actual = theirs(packed, *given)[0], ours(packed, *given)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, e = getattr(actual, field), getattr(expected, field)
        assert (a is None and e is None) or torch.equal(a, e), field


def test_the_helpers_of_nn_utils_rnn_fit():
    theirs, ours = twins(3, 5, **DEEP, batch_first=True)
    sequences = [torch.randn(n, 3, dtype=D) for n in (2, 6, 1)]
    with torch.device("cpu"):  # where pack_sequence wants the lengths that it makes
        packed = pack_sequence(sequences, enforce_sorted=False)
    padded = [pad_packed_sequence(m(packed)[0], batch_first=True, total_length=8) for m in (ours, theirs)]
    assert_close(*padded)


# ----------------------------------------------------------------------------------------- parameters and checkpoints


def test_state_dicts_have_the_same_keys_in_the_same_order_and_load_both_ways():
    for options in ({}, {"bias": False}, DEEP):
        theirs, ours = twins(3, 5, **options)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_a_saved_state_dict_is_loaded_with_weights_only():
    theirs, ours = twins(3, 5, **DEEP)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert_same_results(theirs, ours, torch.randn(6, 4, 3, dtype=D))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    "make", [lambda: dien_ops.GRU(3, 5, 2), lambda: dien_ops.AUGRU(3, 5, gate="authors")], ids=["GRU", "AUGRU"]
)
def test_modules_are_copied_and_pickled(make, duplicate):
    module = make()
    other = duplicate(module)
    assert repr(other) == repr(module)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_all_weights_are_nn_grus():
    for options in ({}, {"bias": False}, DEEP):
        theirs, ours = twins(3, 5, **options)
        for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
            assert_close(a, b, 0.0)
        assert all(w is p for w, p in zip(sum(ours.all_weights, []), ours.parameters(), strict=True))


def test_flatten_parameters_changes_nothing():
    gru = dien_ops.GRU(3, 5)
    before = {name: p.data_ptr() for name, p in gru.named_parameters()}
    gru.flatten_parameters()
    assert before == {name: p.data_ptr() for name, p in gru.named_parameters()}


def test_parameters_go_through_a_vector_and_gradients_are_clipped():
    theirs, ours = twins(3, 5)
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in (ours, theirs)]
    assert torch.equal(*vectors)
    nn.utils.vector_to_parameters(2 * vectors[0].detach(), ours.parameters())
    nn.utils.vector_to_parameters(2 * vectors[1].detach(), theirs.parameters())
    assert_same_results(theirs, ours, torch.randn(4, 2, 3, dtype=D))
    assert_close(*([nn.utils.clip_grad_norm_(m.parameters(), 0.1)] for m in (ours, theirs)))


def test_a_replaced_parameter_is_used():
    theirs, ours = twins(3, 5)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(torch.eye(5, dtype=D).repeat(3, 1))
    assert_same_results(theirs, ours, torch.randn(4, 2, 3, dtype=D))


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_weight_may_be_parametrized(parametrization):
    theirs, ours = twins(3, 5)
    for module in (theirs, ours):
        torch.manual_seed(3)
        parametrization(module, "weight_hh_l0")
    x = torch.randn(4, 2, 3, dtype=D)
    assert_same_results(theirs, ours, x)
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert_same_results(theirs, ours, x)


def test_two_modules_may_share_a_weight():
    pairs = []
    for first, second in zip(twins(3, 5), twins(3, 5), strict=True):
        second.load_state_dict(first.state_dict())
        second.weight_hh_l0 = first.weight_hh_l0
        x = torch.linspace(-1, 1, 24, dtype=D).view(4, 2, 3)
        (first(x)[0].sum() + second(2 * x)[0].square().sum()).backward()
        assert second.weight_hh_l0 is first.weight_hh_l0
        pairs.append([first.weight_hh_l0.grad, second.weight_ih_l0.grad])
    assert_close(pairs[1], pairs[0])


def test_functional_call_uses_the_parameters_it_is_given():
    theirs, ours = twins(3, 5)
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in ours.named_parameters()}
    x, found = torch.randn(4, 2, 3, dtype=D), []
    for module in (ours, theirs):
        output, h_n = torch.func.functional_call(module, parameters, (x,))
        found.append([output, h_n, *torch.autograd.grad(output.sum(), list(parameters.values()))])
    assert_close(*found)


def test_what_the_docstring_says_is_missing_is_missing():
    gru = dien_ops.GRU(3, 5)
    assert not isinstance(gru, nn.GRU)
    for name in ("proj_size", "mode", "_flat_weights", "check_forward_args", "permute_hidden"):
        assert hasattr(nn.GRU(3, 5), name) and not hasattr(gru, name), name


def test_hooks_see_inputs_and_outputs():
    seen = []
    gru = dien_ops.GRU(3, 5)
    gru.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    gru.register_forward_hook(lambda module, args, outputs: seen.append((args, outputs)))
    gru.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: seen.append((grad_inputs, grad_outputs)))
    x = torch.randn(4, 2, 3, requires_grad=True)
    output, h_n = gru(x)
    output.sum().backward()
    assert torch.equal(seen[0][0][0], 2 * x) and seen[0][1][1].shape == h_n.shape
    assert seen[1][0][0].shape == x.shape and torch.equal(seen[1][1][0], torch.ones_like(output))


def distributed_gradients(rank: int, both_done: Any, folder: str, module: nn.Module, x: Tensor) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(module)
    parallel(x.chunk(2)[rank])[0].square().mean().backward()
    torch.save([p.grad for p in module.parameters()], f"{folder}/{rank}.pt")
    both_done.wait()
    # Torch deadlocks now and then where DDP is the last to hold a process group: to end it, it waits for gloo's threads with
    # Python's lock, which these need to clean up. So it is never ended.
    os._exit(0)


@pytest.mark.not_on_cuda(reason="gloo and the handing over to other processes are of CPU tensors")
def test_distributed_data_parallel_gives_the_gradients_of_the_joined_batch(tmp_path):
    module, x = dien_ops.GRU(3, 5, **DEEP, batch_first=True, dtype=D), torch.randn(6, 4, 3, dtype=D)
    both_done = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(distributed_gradients, (both_done, str(tmp_path), module, x), nprocs=2)
    module(x)[0].square().mean().backward()
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), [p.grad for p in module.parameters()])


# -------------------------------------------------------------------------------------------------- modes and gradients


def test_backward_works_in_eval_mode(without_cudnn):
    theirs, ours = twins(3, 5)
    assert_same_results(theirs.eval(), ours.eval(), torch.randn(4, 2, 3, dtype=D))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_give_the_same_bits_without_a_graph(mode):
    gru = dien_ops.GRU(3, 5, **DEEP)
    x = torch.randn(4, 2, 3)
    expected = gru(x)
    with mode():
        output, h_n = gru(x)
    assert not output.requires_grad and not h_n.requires_grad
    assert output.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(output, expected[0]) and torch.equal(h_n, expected[1])


def test_frozen_parameters_leave_a_gradient_for_the_input():
    theirs, ours = twins(3, 5)
    x = leaf(4, 2, 3)
    grads = [torch.autograd.grad(m.requires_grad_(False)(x)[0].square().sum(), x) for m in (ours, theirs)]
    assert_close(*grads)


def test_double_backward_is_nn_grus(without_cudnn):
    theirs, ours = twins(3, 5, **DEEP)
    x, found = leaf(4, 2, 3), []
    for module in (ours, theirs):
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])])
    assert_close(*found)


# ------------------------------------------------------------------------------------------------- dtypes and autocast


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_module_is_converted_between_dtypes(dtype):
    theirs, ours = twins(3, 5, **DEEP, dtype=torch.float32)
    convert = {D: nn.Module.double, torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half}[dtype]
    for module in (theirs, ours):
        assert {p.dtype for p in convert(module).parameters()} == {dtype}
    x = torch.randn(4, 2, 3, dtype=dtype)
    tolerance = 1e-12 if dtype == D else 0.05
    for actual, expected in zip(ours(x), theirs(x), strict=True):
        assert actual.dtype == dtype
        assert_close([actual], [expected], tolerance)


@pytest.mark.parametrize("cell", ["GRU", "AUGRU"])
def test_bfloat16_errs_at_most_twice_as_much_as_torch(cell):
    def draw():
        rnn = getattr(dien_ops, cell)(7, 18, dtype=torch.bfloat16)
        arguments = [torch.randn(12, 9, 7).bfloat16()]
        if cell == "AUGRU":
            arguments.append(torch.rand(12, 9).bfloat16())
        plain = reference.gru if cell == "GRU" else reference.attentional_gru
        exact = plain(*(x.double() for x in [*arguments, *rnn.parameters()]))
        output, h_n = rnn(*arguments)
        return [output, h_n[0]], plain(*arguments, *rnn.parameters()), exact

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


def test_bfloat16_has_a_double_backward():
    gru = dien_ops.GRU(3, 5, dtype=torch.bfloat16)
    values, found = leaf(4, 2, 3, dtype=torch.bfloat16), []
    for module, dtype in ((gru, torch.bfloat16), (copy.deepcopy(gru).double(), D)):
        x = values.detach().to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()]))
    assert {g.dtype for g in found[0]} == {torch.bfloat16}
    assert_close(*found, 0.05)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_nn_grus_dtypes(input, state, weights, autocast):
    if weights == D:
        input, state = D, D if state is not None else None
    found = []
    with torch.device("cpu"), FakeTensorMode():
        for module in twins(3, 5, **DEEP, dtype=weights):
            with torch.autocast("cpu", dtype=autocast):
                hx = [torch.zeros(4, 2, 5, dtype=state)] if state is not None else []
                found.append([y.dtype for y in module(torch.zeros(4, 2, 3, dtype=input), *hx)])
    assert found[0] == found[1]


def test_autocast_leaves_float64_alone():
    gru, x = dien_ops.GRU(3, 5, **DEEP, dtype=D), torch.randn(4, 2, 3, dtype=D)
    expected = gru(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert_close(gru(x), expected, 0.0)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_errs_at_most_twice_as_much_as_torch(autocast, without_cudnn):
    def draw():
        theirs, ours = twins(7, 18, **DEEP, dtype=torch.float32)
        x = torch.randn(12, 9, 7)
        found = []
        for module in (ours, theirs):
            with torch.autocast(x.device.type, dtype=autocast):
                output, h_n = module(x)
            grads = torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters()))
            found.append([output, h_n, *grads])
        exact = copy.deepcopy(theirs).double()
        output, h_n = exact(x.double())
        grads = torch.autograd.grad(output.square().sum() + h_n.sum(), list(exact.parameters()))
        return *found, [output, h_n, *grads]

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


def test_autocast_casts_the_attention_too():
    augru = dien_ops.AUGRU(3, 5)
    x, attention, hx = torch.randn(4, 2, 3), torch.rand(4, 2), torch.randn(1, 2, 5)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        output, h_n = augru(x, attention, hx)
    assert output.dtype == h_n.dtype == (torch.bfloat16 if x.is_cuda else torch.float32)
    assert_close([output, h_n], augru(x, attention, hx), 0.05)


def test_autocast_is_compiled_without_a_graph_break():
    gru, x = dien_ops.GRU(3, 5), torch.randn(4, 2, 3)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert_close(torch.compile(gru, fullgraph=True, backend="aot_eager")(x), gru(x), 0.0)


# ----------------------------------------------------------------------------------------------------- the same errors


def zeros(*shape) -> Tensor:
    return torch.zeros(shape, dtype=D)


def packed(x: Tensor, *lengths: int) -> PackedSequence:
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


@pytest.mark.parametrize(
    "call",
    {
        "features": lambda m: m(zeros(4, 2, 4)),
        "unbatched_features": lambda m: m(zeros(4, 2)),
        "packed_features": lambda m: m(packed(zeros(4, 2, 4), 2, 4)),
        "too_many_axes": lambda m: m(zeros(2, 4, 2, 3)),
        "too_few_axes": lambda m: m(zeros(3)),
        "packed_ids": lambda m: m(packed(zeros(2, 2), 1, 2)),
        "hx_batch": lambda m: m(zeros(4, 2, 3), zeros(1, 3, 5)),
        "hx_layers": lambda m: m(zeros(4, 2, 3), zeros(2, 2, 5)),
        "hx_without_layers": lambda m: m(zeros(4, 2, 3), zeros(2, 5)),
        "hx_of_a_batch_for_unbatched_input": lambda m: m(zeros(4, 3), zeros(1, 2, 5)),
        "hx_layers_for_unbatched_input": lambda m: m(zeros(4, 3), zeros(2, 5)),
        "hx_smaller_than_the_packed_batch": lambda m: m(packed(zeros(4, 2, 3), 2, 4), zeros(1, 1, 5)),
        "hx_layers_for_packed_input": lambda m: m(packed(zeros(4, 2, 3), 2, 4), zeros(2, 2, 5)),
        "hx_dtype": lambda m: m(zeros(4, 2, 3), zeros(1, 2, 5).float()),
        "hx_device": lambda m: m(zeros(4, 2, 3), zeros(1, 2, 5).to("meta")),
        "dtype": lambda m: m(torch.zeros(4, 2, 3)),
        "packed_dtype": lambda m: m(packed(torch.zeros(4, 2, 3), 2, 4)),
        "integers": lambda m: m(torch.zeros(4, 2, 3, dtype=torch.int64)),
        "device": lambda m: m(zeros(4, 2, 3).to("meta")),
        "no_input": lambda m: m(),
        "unknown_argument": lambda m: m(zeros(4, 2, 3), h_0=None),
    }.items(),
    ids=lambda item: item[0],
)
def test_mistakes_raise_nn_grus_exception_types(call):
    theirs, ours = twins(3, 5)
    with pytest.raises(Exception) as expected:  # whatever nn.GRU raises
        call[1](theirs)
    with pytest.raises(expected.type):
        call[1](ours)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(zeros(4, 2, 4)),
        lambda m: m(zeros(2, 4, 2, 3)),
        lambda m: m(zeros(4, 2, 3), zeros(1, 3, 5)),
        lambda m: m(zeros(4, 2, 3), zeros(2, 5)),
        lambda m: m(zeros(4, 3), zeros(1, 2, 5)),
    ],
    ids=["features", "rank", "hx_size", "hx_rank", "unbatched_hx_rank"],
)
def test_wrong_shapes_are_reported_in_nn_grus_words(call):
    messages = []
    for module in twins(3, 5):
        with pytest.raises((RuntimeError, ValueError)) as error:
            call(module)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 0}, {"input_size": "3"}, {"hidden_size": 0}, {"hidden_size": 5.0},
        {"num_layers": 0}, {"num_layers": 1.5}, {"num_layers": "2"}, {"dropout": 1.5}, {"dropout": -0.1},
        {"dropout": True}, {"dropout": "a"}, {"dropout": None}, {"dropout": 1j}, {"bias": 1}, {"bias": None}, {"batch_first": 1},
        {"batch_first": "x"}, {"device": "nowhere"}, {"dtype": torch.int64}, {"dtype": "float"}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_constructor_mistakes_raise_nn_grus_exception_types(arguments):
    arguments = {"input_size": 3, "hidden_size": 5} | arguments
    try:
        nn.GRU(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        with pytest.raises(type(error)):
            dien_ops.GRU(**arguments)
    else:
        pytest.skip(f"nn.GRU of torch {torch.__version__} accepts this")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": "2"}, "num_layers must be an int, got str"),
        ({"num_layers": 1.5}, "num_layers must be an int, got float"),
        ({"dropout": 1j}, "dropout must be a real number, got complex"),
        ({"dropout": None}, "dropout must be a real number, got NoneType"),
    ],
    ids=str,
)
def test_constructor_mistakes_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        dien_ops.GRU(3, 5, **arguments)


def test_proj_size_is_refused_as_nn_gru_refuses_it():
    for cls, error in ((nn.GRU, ValueError), (dien_ops.GRU, TypeError)):
        with pytest.raises(error, match="proj_size"):
            cls(3, 5, proj_size=2)


def test_things_that_are_no_tensors_are_named():
    gru, x = dien_ops.GRU(3, 5), torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        gru([x])
    for given in (x, packed(x, 2, 4)):
        with pytest.raises(TypeError, match="hx must be a Tensor, got tuple"):
            gru(given, (x, x))


def test_an_hx_with_more_rows_than_the_packed_batch_is_refused():  # nn.GRU drops rows of it
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]"):
        dien_ops.GRU(3, 5)(packed(torch.zeros(4, 2, 3), 2, 4), torch.zeros(1, 3, 5))
