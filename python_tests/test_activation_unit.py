# SPDX-License-Identifier: Apache-2.0
"""The local activation unit (DIN eq. 3): the kernel against reference.py, its module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    gradients,
    leaf,
    second_derivatives,
    spread_lengths,
    with_threads,
)
from unit_cases import F64, Case

ACTIVATIONS = ["sigmoid", "prelu", "dice"]
# B, C (None: one target without an axis of its own), T, D, hidden sizes
SIZES = [
    (9, None, 50, 36, (80, 40)), (4, 3, 7, 5, (6,)), (3, 2, 5, 4, ()), (2, None, 1, 17, (3, 5, 2)),
    (0, None, 4, 3, (2,)), (0, 2, 4, 3, (2,)), (2, 3, 0, 3, (2,)), (2, 0, 3, 3, (2,)), (30, 7, 9, 50, (49, 1)),
]  # fmt: skip


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_gradients_and_moving_averages_are_those_of_the_equations(
    sizes, activation, training, softmax, with_lengths
):
    case = Case(sizes, activation, with_lengths=with_lengths, training=training, softmax=softmax)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("variance_eps", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_dice_takes_the_eps_of_the_variance_and_that_of_the_deviation(training, variance_eps):
    case = Case((4, 2, 7, 5, (6, 3)), "dice", training=training, variance_eps=variance_eps)
    found = case.results(functional)
    assert_close(found, case.results(reference))
    case.options["variance_eps"] = 0.1
    assert not torch.allclose(case.results(reference)[0], found[0])


@pytest.mark.parametrize("sizes", [(4, 2, 7, 5, (6, 3)), (4, None, 7, 5, ())])
@pytest.mark.parametrize("softmax", [False, True])
def test_scale_multiplies_the_scores_before_the_softmax(softmax, sizes):
    case = Case(sizes, "prelu", softmax=softmax, scale=0.25)
    assert_close(case.results(functional), case.results(reference))
    plain = case.call(softmax=False, scale=1.0)[1]
    expected = reference._masked_softmax(plain / 4, plain != 0) if softmax else plain / 4
    assert_close([case.call()[1]], [expected])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_no_more_than_twice_as_torch_does(dtype, activation, training, softmax):
    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        single = Case((20, None, 50, 36, (80, 40)), activation, dtype, training=training, softmax=softmax)
        for x in single.weights:
            x.data /= x.shape[1] ** 0.5
        return single.results(functional), single.results(reference), single.to(F64).results(reference)

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_go_with_16_bit_sequences(dtype, training):
    case = Case((5, 3, 9, 6, (7, 3)), "dice", dtype, training=training, softmax=True)
    parameters = ("weights", "biases", "alphas", "running_means", "running_vars")
    mixed = copy.copy(case)
    for name in parameters:
        setattr(mixed, name, [x.detach().float().requires_grad_(x.requires_grad) for x in getattr(case, name)])
    found, expected = mixed.results(), case.results()
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32] * 12
    # The numbers are the same, and so is what is computed with them; only the results are rounded otherwise.
    assert_close([x.to(dtype) for x in found[:12]], expected[:12], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_query_and_keys_and_keeps_the_parameters(dtype):
    case = Case((5, 3, 9, 6, (7, 3)), "prelu", torch.float32, softmax=True)
    with torch.autocast(case.keys.device.type, dtype=dtype):
        found = case.call()
    grads = gradients(found, case.inputs)
    assert [x.dtype for x in (*found, *grads)] == [dtype] * 2 + [torch.float32] * len(case.inputs)
    case.query, case.keys = case.query.to(dtype), case.keys.to(dtype)
    assert_close(found, case.call(), 0)
    with torch.autocast(case.keys.device.type, dtype=dtype):
        assert Case((5, None, 9, 6, (7, 3)), "prelu").call()[0].dtype == F64


def test_hand_worked_values():
    # q = 2, k = 3, 5; the only layer takes 1 q + 10 k + 100 (q - k) + 1000 q k + 7
    weight, bias = torch.tensor([[1.0, 10, 100, 1000]], dtype=F64), torch.tensor([7.0], dtype=F64)
    query, keys = torch.tensor([[2.0]], dtype=F64), torch.tensor([[[3.0], [5.0]]], dtype=F64)
    first, second = 2 + 30 - 100 + 6000 + 7, 2 + 50 - 300 + 10000 + 7
    pooled, scores = functional.local_activation_unit(query, keys, [weight], [bias], return_scores=True)
    assert scores.tolist() == [[first, second]]
    assert pooled.tolist() == [[3.0 * first + 5 * second]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("softmax", [False, True])
def test_padding_is_never_read_and_an_empty_history_gives_zeros(activation, softmax):
    case = Case((4, 3, 6, 5, (7, 2)), activation, softmax=softmax)
    case.lengths = torch.tensor([6, 0, 2, 5])
    clean = case.results()
    keys = case.keys.detach().clone()
    for b, length in enumerate(case.lengths):
        keys[b, length:] = torch.nan
    case.keys = keys.requires_grad_()
    found = case.results()
    assert_close(found, clean)
    pooled, scores, grad_keys = found[0], found[1], found[3]
    assert (pooled[1] == 0).all()
    for b, length in enumerate(case.lengths):
        assert (scores[b, :, length:] == 0).all() and (grad_keys[b, length:] == 0).all()


def test_softmax_scores_sum_to_one():
    case = Case((4, 3, 6, 5, (7, 2)), "sigmoid", softmax=True)
    sums = case.call()[1].sum(-1)
    assert_close([sums], [(case.lengths > 0).double().unsqueeze(1).expand(4, 3)])


@pytest.mark.parametrize("sizes", [(9, 3, 20, 6, (7, 2)), (9, None, 20, 6, (7,))])
def test_softmax_takes_no_notice_of_the_outputs_bias(sizes):
    case = Case(sizes, "sigmoid", torch.float32, softmax=True)
    (found,) = gradients(case.call(), [case.biases[-1]])
    assert found == 0  # and not what rounding leaves of a sum of zero


@pytest.mark.parametrize("activation", ["sigmoid", "prelu"])
def test_several_targets_pool_as_one_at_a_time(activation):
    case = Case((5, 40, 9, 6, (7, 3)), activation)
    together = case.call()
    queries = case.query
    alone = []
    for c in range(40):
        case.query = queries[:, c]
        alone.append(case.call())
    assert_close(together, [torch.stack([x[i] for x in alone], dim=1) for i in (0, 1)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(1, 90, 25, 3, (5,)), (3, 50, 31, 2, (4, 3))])
def test_the_gradients_of_many_targets_add_up_in_the_keys_that_they_share(activation, sizes):
    """More rows than one thread takes: some sequences are begun by one and continued by others."""
    case = Case(sizes, activation, softmax=True)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_output_can_be_differentiated_alone(activation):
    case = Case((3, 2, 4, 3, (5,)), activation)
    for i in (0, 1):
        found, expected = ([m[i]] for m in (case.call(), case.call(reference)))
        assert_close(gradients(found, case.inputs), gradients(expected, case.inputs))


def test_any_strides_are_accepted():
    case = Case((3, 2, 4, 6, (5, 3)), "prelu")
    dense = case.results()
    strided = copy.copy(case)
    for name in ("query", "keys"):
        setattr(strided, name, torch.stack([getattr(case, name)] * 2, dim=-1)[..., 0])
    for name in ("weights", "biases", "alphas"):
        setattr(strided, name, [torch.stack([x, x], dim=-1)[..., 0] for x in getattr(case, name)])
    assert not strided.weights[0].is_contiguous()
    assert_close(strided.results(), dense)
    pooled, scores = case.call()
    expanded = torch.autograd.grad(pooled.sum() + scores.sum(), case.inputs, retain_graph=True)
    ones = [torch.ones_like(pooled), torch.ones_like(scores)]
    assert_close(expanded, torch.autograd.grad([pooled, scores], case.inputs, ones))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("activation", "training"), [("sigmoid", True), ("prelu", True), ("dice", True), ("dice", False)]
)
def test_first_and_second_derivatives_agree_with_finite_differences(activation, training, softmax):
    case = Case((2, 2, 2, 1, (2, 1)), activation, training=training, softmax=softmax, variance_eps=0.1)
    averages = {} if not training else {"running_means": [], "running_vars": []}

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        other = copy.copy(case)
        other.query, other.keys = tensors[:2]
        other.weights, other.biases, other.alphas = list(tensors[2:5]), list(tensors[5:8]), list(tensors[8:])
        return other.call(**averages)

    torch.autograd.gradcheck(f, case.inputs)
    torch.autograd.gradgradcheck(f, case.inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_of_16_bit_sequences_are_computed_in_float32(dtype):
    wide = Case((3, 2, 5, 4, (6,)), "prelu", torch.float32)
    low = copy.copy(wide)
    low.query, low.keys = (leaf(*x.shape, dtype=dtype) for x in (wide.query, wide.keys))
    wide.query, wide.keys = (x.detach().float().requires_grad_() for x in (low.query, low.keys))
    found, expected = (second_derivatives(case.call(), case.inputs) for case in (low, wide))
    assert [x.dtype for x in found] == [dtype, dtype, *[torch.float32] * 5]
    assert_close(found[:2], [x.to(dtype) for x in expected[:2]], torch.finfo(dtype).eps)
    assert_close(found[2:], expected[2:], 1e-5)


@pytest.mark.parametrize(("activation", "training"), [("sigmoid", True), ("dice", True), ("dice", False)])
def test_the_operators_pass_opcheck(activation, training):
    case = Case((3, 2, 5, 4, (6, 3)), activation, torch.float32)
    averages = ([], []) if training else (case.running_means, case.running_vars)
    parameters = (case.weights, case.biases, case.alphas)
    forward = (case.query, case.keys, *parameters, *averages, case.lengths, activation, 1e-3, 1e-2, True, False)
    torch.library.opcheck(torch.ops.dien_ops.local_activation_unit.default, forward)
    pooled, scores, statistics, hidden = torch.ops.dien_ops.local_activation_unit(*forward)
    batch_statistics = activation == "dice" and training
    backward = (
        leaf(*pooled.shape, dtype=torch.float32), None, case.query, case.keys, *parameters, statistics, hidden,
        scores.detach(), case.lengths, activation, batch_statistics, 1e-3, 1e-2, True, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dien_ops.local_activation_unit_backward.default, backward)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize(
    ("activation", "sizes"),
    [
        ("sigmoid", (300, None, 20, 18, (80, 40))),
        ("prelu", (9, 30, 20, 7, (20, 5))),
        ("dice", (300, 2, 9, 5, (33,))),
        ("sigmoid", (1, 200, 20, 6, (7,))),
    ],
)
def test_the_number_of_threads_changes_no_bit(activation, sizes):
    case = Case(sizes, activation, torch.float32)
    for one, two in zip(with_threads(1, case.results), with_threads(2, case.results), strict=True):
        assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------------------- module


def composed(unit: dien_ops.LocalActivationUnit, query: Tensor, keys: Tensor) -> Tensor:
    """The unit from its own submodules, for one target and without padding."""
    q = query.unsqueeze(1).expand_as(keys)
    hidden = torch.cat([q, keys, q - keys, q * keys], dim=-1)
    for layer, activation in zip(unit.layers[:-1], unit.activations, strict=True):
        hidden = layer(hidden)
        flat = hidden.flatten(0, 1)  # where nn.PReLU, too, has the channels second
        hidden = activation(flat).view_as(hidden)
    scores = unit.layers[-1](hidden).squeeze(-1)
    if unit.softmax:
        scores = scores.softmax(-1)
    return torch.einsum("bt,btd->bd", scores, keys)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_module_computes_what_its_submodules_do(activation, softmax, training):
    unit = dien_ops.LocalActivationUnit(6, (8, 5), activation, softmax, dtype=F64).train(training)
    twin = copy.deepcopy(unit)
    query, keys = leaf(4, 6), leaf(4, 7, 6)
    found, expected = unit(query, keys), composed(twin, query, keys)
    assert_close([found], [expected])
    inputs = [query, keys]
    found_gradients = gradients([found], [*inputs, *unit.parameters()])
    assert_close(found_gradients, gradients([expected], [*inputs, *twin.parameters()]), 1e-11)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(unit.state_dict()[name], value)


def test_weights_of_plain_linear_layers_load():
    layers = nn.ModuleList([nn.Linear(24, 80), nn.Linear(80, 40), nn.Linear(40, 1)])
    unit = dien_ops.LocalActivationUnit(6)
    unit.layers.load_state_dict(layers.state_dict())
    assert list(unit.state_dict()) == [f"layers.{name}" for name in layers.state_dict()]


@pytest.mark.parametrize("targets", [None, 3])
def test_the_released_diens_query_projection(targets):
    unit = dien_ops.LocalActivationUnit(6, (8,), softmax=True, query_size=9, dtype=F64)
    linear, prelu = unit.query_projection
    assert prelu.weight.tolist() == [0.1] * 6
    with torch.no_grad():
        prelu.weight.copy_(torch.linspace(0.1, 0.6, 6))  # a slope for each channel, not for each target
    query, keys, lengths = leaf(4, *([] if targets is None else [targets]), 9), leaf(4, 7, 6), spread_lengths(4, 7)
    projected = query @ linear.weight.mT + linear.bias
    projected = torch.where(projected > 0, projected, prelu.weight * projected)
    twin = dien_ops.LocalActivationUnit(6, (8,), softmax=True, dtype=F64)
    twin.load_state_dict(unit.state_dict(), strict=False)
    found, expected = unit(query, keys, lengths=lengths), twin(projected, keys, lengths=lengths)
    assert_close([found], [expected])
    parameters = [linear.weight, prelu.weight, query]
    assert_close(gradients([found], parameters), gradients([expected], parameters))
    with pytest.raises(RuntimeError, match=r"query must have shape \[2, 9\] \[B, A\], got \[2, 6\]"):
        unit(torch.zeros(2, 6, dtype=F64), torch.zeros(2, 4, 6, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_query_projection_takes_16_bit_queries(dtype):
    unit = dien_ops.LocalActivationUnit(6, (8,), query_size=9)
    query, keys = torch.randn(4, 3, 9).to(dtype), torch.randn(4, 7, 6).to(dtype)
    twin = dien_ops.LocalActivationUnit(6, (8,))
    twin.load_state_dict(unit.state_dict(), strict=False)
    assert_close(
        [unit(query, keys)], [twin(unit.query_projection(query.float().view(12, 9)).view(4, 3, 6).to(dtype), keys)], 0
    )
    message = r"query_projection\[0\].weight must have the dtype of query: expected torch.float64, got torch.float32"
    with pytest.raises(ValueError, match=message):
        unit(query.double(), keys.double())


def test_the_modules_scale_is_that_of_the_equations():
    unit = dien_ops.LocalActivationUnit(4, (5,), softmax=True, scale=0.5, dtype=F64)
    twin = dien_ops.LocalActivationUnit(4, (5,), softmax=True, dtype=F64)
    twin.load_state_dict(unit.state_dict())
    with torch.no_grad():
        twin.layers[-1].weight /= 2
        twin.layers[-1].bias /= 2
    query, keys = torch.randn(2, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    assert_close([unit(query, keys)], [twin(query, keys)])


def test_an_empty_history_leaves_the_moving_averages_alone():
    unit = dien_ops.LocalActivationUnit(3, (4,), "dice")
    unit(torch.randn(2, 3), torch.randn(2, 5, 3), lengths=torch.tensor([0, 0]))
    assert (unit.activations[0].running_mean == 0).all() and (unit.activations[0].running_var == 1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_compiles_as_a_whole_with_dynamic_shapes(activation):
    unit = dien_ops.LocalActivationUnit(6, (8, 5), activation)
    twin = copy.deepcopy(unit)
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((3, 4), (5, 7)):
        query, keys = leaf(batch, 6, dtype=torch.float32), leaf(batch, steps, 6, dtype=torch.float32)
        lengths = spread_lengths(batch, steps)
        found = compiled(query, keys, lengths=lengths, return_scores=True)
        expected = twin(query, keys, lengths=lengths, return_scores=True)
        assert_close(found, expected, 1e-5)
        inputs = [query, keys]
        assert_close(
            gradients(found, [*inputs, *unit.parameters()]), gradients(expected, [*inputs, *twin.parameters()]), 1e-5
        )
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(unit.state_dict()[name], value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_exports(activation):
    unit = dien_ops.LocalActivationUnit(6, (8, 5), activation).eval()
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1)
    shapes = {"query": {0: batch}, "keys": {0: batch, 1: steps}}
    program = torch.export.export(unit, (torch.randn(4, 6), torch.randn(4, 5, 6)), dynamic_shapes=shapes)
    query, keys = torch.randn(2, 6), torch.randn(2, 9, 6)
    assert_close([program.module()(query, keys)], [unit(query, keys)])


# ------------------------------------------------------------------------------------------------------------- errors

W = [torch.zeros(5, 12), torch.zeros(1, 5)]
B = [torch.zeros(5), torch.zeros(1)]
DICE = {"activation": "dice", "alphas": B[:1]}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a Tensor, got int", {"query": 3}),
        (ValueError, r"keys must be 3-D, got 2-D of shape \[4, 3\]", {"keys": torch.zeros(4, 3)}),
        (ValueError, "query must have the dtype of keys", {"query": torch.zeros(2, 3, dtype=F64)}),
        (RuntimeError, r"query must have shape \[2, 3\] \[B, D\], got \[2, 4\]", {"query": torch.zeros(2, 4)}),
        (RuntimeError, r"query must have shape \[2, 7, 3\] \[B, C, D\]", {"query": torch.zeros(1, 7, 3)}),
        (ValueError, "activation must be one of 'sigmoid', 'prelu', 'dice', got 'relu'", {"activation": "relu"}),
        (TypeError, "weights must be a sequence of Tensors, got NoneType", {"weights": None}),
        (TypeError, "weights must be a sequence of Tensors, got Tensor", {"weights": W[0]}),
        (TypeError, "biases must be a sequence of Tensors, got NoneType", {"biases": None}),
        (TypeError, "alphas must be a sequence of Tensors, got NoneType", {"alphas": None}),
        (TypeError, "running_means must be a sequence of Tensors, got NoneType", {"running_means": None}),
        (TypeError, "running_vars must be a sequence of Tensors, got NoneType", {"running_vars": None}),
        (TypeError, r"weights\[1\] must be a Tensor, got NoneType", {"weights": [W[0], None]}),
        (TypeError, r"biases\[0\] must be a Tensor, got list", {"biases": [[0.0] * 5, B[1]]}),
        (TypeError, "momentum must be a number, got NoneType", {"momentum": None}),
        (ValueError, r"momentum must be in \[0, 1\], got 5.0", {"momentum": 5.0}),
        (ValueError, "eps must be finite and >= 0, got -1", {"eps": -1}),
        (ValueError, "variance_eps must be finite and >= 0, got -1", {"variance_eps": -1}),
        (TypeError, "scale must be a number, got str", {"scale": "1"}),
        (TypeError, "softmax must be a bool, got str", {"softmax": "yes"}),
        (ValueError, r"query must have the dtype of keys", {"query": torch.zeros(2, 3).half()}),
        (ValueError, "weights must have at least one tensor", {"weights": [], "biases": []}),
        (ValueError, "biases must have 2 tensors with 2 weights .*, got 1", {"biases": B[:1]}),
        (ValueError, "alphas must have 1 tensors .* activation='prelu', got 0", {"activation": "prelu"}),
        (ValueError, "alphas must have 0 tensors .* activation='sigmoid', got 1", {"alphas": B[:1]}),
        (RuntimeError, r"weights.0. must have shape \[1, 12\] .*, got \[1, 5\]", {"weights": [W[1], W[1]]}),
        (RuntimeError, r"weights.1. must have shape \[1, 5\] .*, got \[5, 12\]", {"weights": [W[0], W[0]]}),
        (RuntimeError, r"biases\[0\] must have shape \[5\] \[outputs\], got \[1\]", {"biases": [B[1], B[1]]}),
        (ValueError, r"biases\[1\] must have the dtype of keys", {"biases": [B[0], B[1].double()]}),
        (RuntimeError, r"alphas\[0\] must have shape \[5\]", {"alphas": B[1:], "activation": "prelu"}),
        (ValueError, "running_vars must have 1 tensors", DICE | {"running_means": B[:1]}),
        (ValueError, "running_means and running_vars are needed", DICE | {"training": False}),
        (RuntimeError, r"lengths must be in 0..4 \(T\), got 5 at row 1", {"lengths": torch.tensor([0, 5])}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    given = {"query": torch.zeros(2, 3), "keys": torch.zeros(2, 4, 3), "weights": W, "biases": B}
    with pytest.raises(error, match=message):
        functional.local_activation_unit(**(given | change))


@pytest.mark.parametrize(
    ("error", "message", "average"),
    [
        (TypeError, r"{}\[1\] must be a Tensor, got list", [1.0, 1.0]),
        (
            ValueError,
            r"{}\[1\] must have the dtype of keys, torch.float32 or torch.float64, got torch.int64",
            torch.ones(2).long(),
        ),
        (RuntimeError, r"{}\[1\] must have shape \[2\] \[C\], got \[3\]", torch.ones(3)),
        (RuntimeError, r"{}\[1\] must not be an expanded tensor", torch.ones(1).expand(2)),
    ],
)
@pytest.mark.parametrize("name", ["running_means", "running_vars"])
def test_an_unusable_moving_average_is_named_and_no_layers_are_moved(name, error, message, average):
    case = Case((4, None, 6, 3, (5, 2)), "dice", torch.float32)
    given = {
        x: getattr(case, x)
        for x in ("query", "keys", "weights", "biases", "alphas", "lengths", "running_means", "running_vars")
    }
    given[name] = [given[name][0], average]
    averages = [given["running_means"][0], given["running_vars"][0]]
    before = [x.clone() for x in averages]
    with pytest.raises(error, match=message.format(name)):
        functional.local_activation_unit(**given, activation="dice")
    assert all(torch.equal(x, y) for x, y in zip(averages, before, strict=True))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_a_dice_in_evaluation_mode_freezes_the_statistics_of_a_unit_in_training(frozen):
    unit = dien_ops.LocalActivationUnit(3, (4, 2), "dice")
    unit(torch.randn(5, 3), torch.randn(5, 6, 3))
    for i in frozen:
        unit.activations[i].eval()
    before, query, keys = state(unit), torch.randn(5, 3), torch.randn(5, 6, 3)
    found = unit(query, keys)
    assert all(torch.equal(value, before[name]) for name, value in unit.state_dict().items())
    assert torch.equal(found, unit.eval()(query, keys))


@pytest.mark.parametrize(
    ("activation", "name", "index", "module", "message"),
    [
        ("sigmoid", "activations", 0, nn.ReLU(), r"activations\[0\] must be a Sigmoid .*'sigmoid', got ReLU"),
        ("prelu", "activations", 1, nn.Sigmoid(), r"activations\[1\] must be a PReLU .*, got Sigmoid"),
        ("dice", "activations", 1, nn.PReLU(2), r"activations\[1\] must be a Dice .*, got PReLU"),
        ("dice", "activations", 1, dien_ops.Dice(2, eps=1e-3), r"have the eps of activations\[0\], 1e-08, got 0.001"),
        ("dice", "activations", 1, dien_ops.Dice(2, momentum=0.2), r"the momentum of activations\[0\], 0.1, got 0.2"),
        ("dice", "activations", 1, dien_ops.Dice(2, variance_eps=1), r"the variance_eps of .*, 0.0, got 1"),
        ("dice", "activations", 1, dien_ops.Dice(2, affine=True), r"activations\[1\] must be a Dice with affine=False"),
        ("sigmoid", "layers", 2, nn.Identity(), r"layers\[2\] must be a Linear .*, got Identity"),
    ],
)  # fmt: skip
def test_a_submodule_that_the_unit_does_not_compute_is_refused(activation, name, index, module, message):
    unit = dien_ops.LocalActivationUnit(3, (4, 2), activation)
    getattr(unit, name)[index] = module
    before = state(unit)
    with pytest.raises(ValueError, match=message):
        unit(torch.randn(5, 3), torch.randn(5, 6, 3))
    assert all(torch.equal(value, before[x]) for x, value in unit.state_dict().items())


@pytest.mark.parametrize(("name", "number"), [("activations", 2), ("layers", 3)])
def test_a_missing_submodule_is_refused(name, number):
    unit = dien_ops.LocalActivationUnit(3, (4, 2))
    del getattr(unit, name)[0]
    with pytest.raises(ValueError, match=f"{name} must have {number} modules, got {number - 1}"):
        unit(torch.randn(5, 3), torch.randn(5, 6, 3))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "activation must be one of", {"activation": "relu"}),
        (ValueError, "embedding_dim must be greater than zero, got 0", {"embedding_dim": 0}),
        (TypeError, "embedding_dim must be an int, got float", {"embedding_dim": 3.0}),
        (ValueError, r"hidden_sizes\[1\] must be greater than zero, got 0", {"hidden_sizes": (4, 0)}),
        (ValueError, r"hidden_sizes\[0\] must be greater than zero, got -4", {"hidden_sizes": (-4,)}),
        (TypeError, r"hidden_sizes\[0\] must be an int, got str", {"hidden_sizes": ("4",)}),
        (TypeError, "hidden_sizes must be a sequence of ints, got int", {"hidden_sizes": 80}),
        (TypeError, "scale must be a number, got NoneType", {"scale": None}),
        (TypeError, "softmax must be a bool, got int", {"softmax": 1}),
        (ValueError, "query_size must be greater than zero, got 0", {"query_size": 0}),
    ],
)
def test_the_module_refuses_a_wrong_option(error, message, options):
    with pytest.raises(error, match=message):
        dien_ops.LocalActivationUnit(**({"embedding_dim": 3} | options))
