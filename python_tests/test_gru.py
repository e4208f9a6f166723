# SPDX-License-Identifier: Apache-2.0
"""The recurrent kernels: against reference.py, and every way to call them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dien_ops
from dien_ops import _library, _precision, functional, reference
from gru_cases import (
    CELLS,
    GATES,
    LAYOUTS,
    RESETS,
    Case,
    check_all_16_bit_numbers,
    check_all_cells,
    check_all_partial_vectors,
    check_saturation_and_nan,
)
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    gradients,
    run_python,
    with_threads,
)

# ------------------------------------------------------------------------------------------------- the same numbers


@LAYOUTS
@RESETS
@CELLS
def test_kernel_computes_the_reference_and_its_gradients(cell, reset_after, batch_first):
    case = Case(**cell, reset_after=reset_after, batch_first=batch_first)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("hidden", [1, 3, 7, 8, 12, 16, 33, 50])
@pytest.mark.parametrize("features", [1, 8, 19])
def test_any_size_works_whatever_the_vector_width(hidden, features):
    case = Case("paper", batch=11, hidden=hidden, features=features)
    assert_close(case.results(functional), case.results(reference))


@RESETS
@pytest.mark.parametrize("hidden, features", [(10, 150), (150, 10), (130, 260)])
def test_sizes_beyond_a_panels_depth_are_summed_in_parts(hidden, features, reset_after):
    case = Case("authors", batch=11, hidden=hidden, features=features, reset_after=reset_after)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("lengths, hx, bias", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("gate", ["none", "input"])
def test_optional_arguments_may_be_left_out(gate, lengths, hx, bias):
    case = Case(gate, lengths=lengths, hx=hx, bias=bias)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("batch", [1, 9, 70])
@CELLS
def test_many_rows_are_tiled_and_sorted_without_a_trace(cell, batch):
    case = Case(**cell, batch=batch, steps=6)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize(
    "batch, steps, targets", [(2100, 2, None), (60, 2, 40), (3, 70, None), (40, 3, 20), (1, 5, 200)]
)
@pytest.mark.parametrize("gate", ["authors", "input"])
def test_sums_over_rows_and_time_are_whole_whatever_their_grouping(gate, batch, steps, targets):
    # more tiles than groups; more steps than a chunk holds; sequences whose targets lie in several groups
    case = Case(gate, batch, steps, targets=targets)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@RESETS
@CELLS
def test_low_precision_errs_at_most_twice_as_much_as_torch(cell, reset_after, dtype):
    def draw():
        case = Case(**cell, reset_after=reset_after, batch=9, steps=12, features=7, hidden=18, dtype=dtype)
        return case.results(functional), case.results(reference), case.to(torch.float64).results(reference)

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


@RESETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_and_its_gradient_are_float32_between_steps(dtype, reset_after):
    # AGRU with n = 0 is h' = (1 - a) h. Rounded in every step, it would stand still at 1.
    steps, score = 400, torch.finfo(dtype).eps / 8
    weights = [torch.zeros(9, n, dtype=dtype) for n in (1, 3)]
    hx = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    _, h_n = functional.attentional_gru(
        torch.zeros(steps, 1, 1, dtype=dtype),
        torch.full((steps, 1), score, dtype=dtype),
        *weights,
        hx=hx,
        gate="replace",
        reset_after=reset_after,
    )
    (grad,) = torch.autograd.grad(h_n.sum(), [hx])
    expected = torch.full_like(hx, (1 - score) ** steps)
    assert_close([h_n, grad], [expected, expected], torch.finfo(dtype).eps)


CHECKS = [check_all_cells, check_all_partial_vectors, check_all_16_bit_numbers, check_saturation_and_nan]


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(capability, check):
    if capability not in dien_ops._C.cpu_capabilities:
        pytest.skip(f"{capability} is not part of this build")
    code = f"import dien_ops, gru_cases; gru_cases.{check.__name__}(); print(dien_ops._C.cpu_capability())"
    done = run_python(code, DIEN_OPS_CPU_CAPABILITY=capability, PYTHONPATH="python_tests")
    if "not supported by this processor" in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.stdout.strip() == capability, done.stderr


def test_nan_in_one_row_stays_in_that_row():
    case = Case("paper", lengths=False)
    with torch.no_grad():
        case.input[1, 2, 0] = torch.nan
    output, h_n = case.call(functional)
    assert output[1, 2:].isnan().all() and h_n[1].isnan().all()
    assert not output[[0, 2]].isnan().any() and not output[1, :2].isnan().any()


# --------------------------------------------------------------------------------------------------- what cells are


def augru_and_gru(gate: str, score: float) -> tuple[Tensor, Tensor, Tensor]:
    case = Case(gate)
    with torch.no_grad():
        case.attention.fill_(score)
    output, _ = case.call(functional)
    gru, _ = functional.gru(case.input, *case.weights, case.hx, lengths=case.options["lengths"], batch_first=True)
    return output, gru, case.hx


@pytest.mark.parametrize("gate, score", [("paper", 1.0), ("authors", 0.0), ("input", 1.0)])
def test_augru_is_the_gru_where_its_score_says_so(gate, score):
    output, gru, _ = augru_and_gru(gate, score)
    assert_close([output], [gru])


@pytest.mark.parametrize("gate", ["paper", "replace"])
def test_attention_zero_lets_the_state_stand_still(gate):
    case = Case(gate, lengths=False)
    with torch.no_grad():
        case.attention.zero_()
    output, h_n = case.call(functional)
    assert_close([output, h_n], [case.hx.unsqueeze(1).expand_as(output), case.hx])


def test_several_targets_are_as_many_calls_with_one_each():
    case = Case("paper", targets=4)
    output, h_n = case.call(functional)
    for c in range(4):
        one = case.with_tensors([case.input, case.attention[:, c], case.hx[:, c], *case.weights])
        assert_close([output[:, c], h_n[:, c]], one.call(functional))


# ------------------------------------------------------------------------------------------------------------ edges


@CELLS
def test_length_zero_gives_zeros_and_hands_hx_through(cell):
    case = Case(**cell)
    case.options["lengths"] = torch.zeros(3, dtype=torch.int64)
    output, h_n = case.call(functional)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(h_n, case.hx)
    grads = gradients([output, h_n], [case.input, case.weights[0]])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize(
    "sizes",
    [{"hidden": 0}, {"features": 0}, {"batch": 0}, {"steps": 0}, {"steps": 1}, {"batch": 0, "steps": 0}],
    ids=str,
)
@CELLS
def test_empty_batch_and_short_sequences(cell, sizes):
    case = Case(**cell, **sizes)
    assert_close(case.results(functional), case.results(reference))


def test_no_targets_give_an_empty_result_and_zero_gradients():
    case = Case("paper", targets=0)
    assert_close(case.results(functional), case.results(reference))


def test_int32_lengths_are_int64_lengths():
    case = Case("paper")
    expected = case.call(functional)
    case.options["lengths"] = case.options["lengths"].int()
    assert_close(case.call(functional), expected, 0.0)


def test_strided_arguments_and_expanded_gradients():
    case = Case("paper", targets=4)
    expected = case.results(reference)

    def strided(x: Tensor) -> Tensor:  # the same values, every other element of a larger buffer
        wide = torch.stack([x.detach(), torch.full_like(x, torch.nan)], dim=-1)
        return wide[..., 0].requires_grad_()

    assert_close(case.with_tensors([strided(x) for x in case.tensors]).results(functional), expected)
    output, _ = case.call(functional)
    (expanded,) = torch.autograd.grad(output.sum(), [case.input])  # its gradient has stride 0
    (dense,) = torch.autograd.grad(case.call(functional)[0], [case.input], torch.ones_like(output))
    assert torch.equal(expanded, dense)


def test_each_output_may_be_used_alone():
    case = Case("paper")
    for i in range(2):
        actual, expected = ([gradients([case.call(m)[i]], case.tensors)] for m in (functional, reference))
        assert_close(actual[0], expected[0])


# -------------------------------------------------------------------------------------------------------- gradients


@LAYOUTS
@RESETS
@CELLS
def test_gradcheck(cell, reset_after, batch_first):
    case = Case(**cell, batch=2, steps=3, features=2, hidden=3, reset_after=reset_after, batch_first=batch_first)
    f, tensors = case.as_function()
    assert gradcheck(f, tensors)


@RESETS
@pytest.mark.parametrize("gate", GATES)
def test_gradgradcheck(gate, reset_after):
    case = Case(gate, batch=1, steps=2, features=1, hidden=2, lengths=False, reset_after=reset_after)
    f, tensors = case.as_function()
    assert gradgradcheck(f, tensors)


def test_double_backward_of_an_empty_sequence_is_that_of_the_identity():
    case = Case("none", steps=0)
    output, h_n = case.call(functional)
    (grad,) = torch.autograd.grad((h_n**2).sum() + output.sum(), [case.hx], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), [case.hx])
    assert_close([grad, second], [2 * case.hx, torch.full_like(case.hx, 2.0)])


@pytest.mark.parametrize("gate", ["none", "paper"])
def test_forward_mode_is_refused_rather_than_zero(gate):
    case = Case(gate)
    for i, x in enumerate(case.tensors):
        if x is None:
            continue

        def f(dual, i=i):
            return case.with_tensors([*case.tensors[:i], dual, *case.tensors[i + 1 :]]).call(functional)[1]

        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))


def test_the_operator_refuses_a_reversed_attentional_gru():
    case = Case("paper", hx=False)
    arguments = (*case.tensors, None, "paper", True, True, True, False, False)
    with pytest.raises(RuntimeError, match="reverse must be false for every gate but none"):
        torch.ops.dien_ops.gru(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lengths: lengths.to(torch.int16), "lengths must be int32 or int64"),
        (lambda lengths: torch.cat([lengths, lengths]), r"lengths must have shape \[3\], got \[6\]"),
    ],
)
def test_the_operator_refuses_other_lengths(change, message):
    case = Case("paper")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dien_ops.gru(*case.tensors, change(case.options["lengths"]), "paper", True, True, False, False, False)


def test_the_backward_refuses_gates_of_another_call():
    case = Case("paper")
    arguments = [*case.tensors, None]
    output, h_n, gates = torch.ops.dien_ops.gru(*arguments, "paper", True, True, False, False, True)
    with pytest.raises(RuntimeError, match=r"gates must have shape \[3, 1, 5, 15\], got \[3, 1, 5, 20\]"):
        torch.ops.dien_ops.gru_backward(output, h_n, *arguments, output, gates, "paper", False, True, False, False)


def test_backward_without_saved_gates_computes_them_again():
    case = Case("none")
    arguments = (*case.tensors, case.options["lengths"], "none", True, True, False, False)
    found = []
    for save_gates in (False, True):
        output, h_n, _ = torch.ops.dien_ops.gru(*arguments, save_gates)
        found.append(gradients([output, h_n], case.tensors))
    assert_close(*found, 0.0)


def test_nothing_is_saved_where_no_gradient_is_wanted():
    case = Case("none")
    with torch.no_grad():
        output, _ = case.call(functional)
    assert not output.requires_grad


# ------------------------------------------------------------------------------------------------------ determinism


@CELLS
def test_results_are_bitwise_the_same_for_any_number_of_threads(cell):
    case = Case(**cell, batch=40, steps=12, hidden=20, dtype=torch.float32)
    one, two, again = (with_threads(n, lambda: case.results(functional)) for n in (1, 2, 2))
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_what_is_saved_behind_a_rows_length_is_never_read():
    case = Case("paper", batch=9, steps=12, reset_after=False)
    torch.use_deterministic_algorithms(True)  # memory not written to is filled with NaN
    try:
        results = case.results(functional)
        arguments = (*case.tensors, case.options["lengths"], "paper", False, True, False, False)
        *_, gates = torch.ops.dien_ops.gru(*arguments, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(results, case.results(reference))
    assert gates.isnan().any()


# ------------------------------------------------------------------------------------------------------- bad input


def changed(**arguments):
    """functional.attentional_gru with some arguments replaced, by others on the same device if it is a real one."""
    case = Case("paper", batch=3, steps=5, features=3, hidden=5)
    arguments = {
        k: x.to(case.input.device) if isinstance(x, Tensor) and not x.is_meta else x for k, x in arguments.items()
    }
    given = {"input": case.input, "attention": case.attention, "hx": case.hx, "lengths": case.options["lengths"]}
    given |= dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), case.weights, strict=True))
    return functional.attentional_gru(**(given | {"batch_first": True} | arguments))


DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"input": torch.zeros(5, 3, **DOUBLE)}, ValueError, r"input must be 3-D, got 2-D of shape \[5, 3\]"),
        (
            {"input": torch.zeros(3, 5, 3, dtype=torch.int64)},
            ValueError,
            "input must be float32, float64, bfloat16 or float16, got int64",
        ),
        ({"input": torch.zeros(3, 5, 3)}, ValueError, "attention must have the dtype of input"),
        ({"input": torch.zeros(3, 5, 4, **DOUBLE)}, RuntimeError, r"weight_ih must have shape \[15, 4\]"),
        ({"weight_ih": None}, TypeError, "weight_ih must be a Tensor, got NoneType"),
        ({"weight_hh": torch.zeros(14, 5, **DOUBLE)}, RuntimeError, r"weight_hh must have shape \[15, 5\]"),
        ({"bias_hh": torch.zeros(5, **DOUBLE)}, RuntimeError, r"bias_hh must have shape \[15\] \[3H\], got \[5\]"),
        ({"hx": torch.zeros(3, 4, **DOUBLE)}, RuntimeError, r"hx must have shape \[3, 5\] \[B, H\], got \[3, 4\]"),
        ({"attention": torch.zeros(5, 3, **DOUBLE)}, RuntimeError, r"attention must have shape \[3, 5\] \[B, T\]"),
        ({"attention": torch.zeros(3, **DOUBLE)}, ValueError, "attention must be 2-D or 3-D"),
        ({"attention": None}, TypeError, "attention must be a Tensor, got NoneType"),
        ({"gate": "tf"}, ValueError, "gate must be one of 'paper', 'authors', 'replace', 'input', got 'tf'"),
        ({"lengths": torch.tensor([1, 2])}, RuntimeError, r"lengths must have shape \[3\] \[B\], got \[2\]"),
        ({"lengths": torch.tensor([1.0, 2, 3])}, ValueError, "lengths must be int32 or int64, got float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64, device="meta")}, RuntimeError, "lengths must be on the device"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        changed(**arguments)


@pytest.mark.not_on_cuda(reason="a kernel finds it there, and the process loses the GPU: test_gru_cuda.py has a test")
@pytest.mark.parametrize("lengths, got", [([0, 6, 3], "6 at row 1"), ([0, 5, -1], "-1 at row 2")], ids=str)
def test_a_length_outside_of_the_steps_is_named(lengths, got):
    with pytest.raises(RuntimeError, match=rf"lengths must be in 0..5 \(T\), got {got}"):
        changed(lengths=torch.tensor(lengths))


def on_cuda(dtype=torch.float32, hx=None):
    """Fake tensors: they need neither a GPU nor a torch with CUDA. hx: its dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def empty(*sizes, dtype=dtype):
        return torch.empty(sizes, dtype=dtype, device="cuda")

    with FakeTensorMode():
        state = empty(4, 5, dtype=hx) if hx is not None else None
        return functional.gru(empty(2, 4, 3), empty(15, 3), empty(15, 5), hx=state)


def test_a_cuda_tensor_is_told_why_the_cuda_kernels_are_not_loaded(monkeypatch):
    monkeypatch.setattr(_library, "_cuda_problem", "the reason")
    with pytest.raises(RuntimeError, match=r"input is on cuda:0, and the reason\..*\.cpu\(\)"):
        on_cuda()


def test_a_cuda_tensor_is_told_why_its_gpu_cannot_run_the_kernels(monkeypatch):
    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(_library, "_capability", lambda index: (7, 5))
    with pytest.raises(RuntimeError, match=r"input is on cuda:0, and this GPU has compute capability 7\.5"):
        on_cuda()


@pytest.fixture
def loaded(monkeypatch):
    """As if the CUDA kernels were loaded."""
    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(_library, "_capability", lambda index: None)


def test_where_the_cuda_kernels_are_loaded_a_cuda_tensor_is_taken(loaded):
    output, h_n = on_cuda()
    assert output.device == h_n.device == torch.device("cuda", 0) and output.shape == (2, 4, 5)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "arguments, hx",
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None), (torch.float64, torch.float64)],
    ids=str,
)
def test_on_cuda_autocast_gives_its_own_dtype_and_leaves_float64_alone(arguments, hx, autocast, loaded, monkeypatch):
    monkeypatch.setattr(_precision, "autocast_dtype", lambda input: autocast)  # torch refuses where there is no GPU
    expected = torch.float64 if arguments == torch.float64 else autocast
    assert [y.dtype for y in on_cuda(arguments, hx)] == [expected] * 2
