# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels of the local activation unit have: tf32, tiles and parts of the work, the chip's memory, orders
of threads.

Everything else of them is tested by test_activation_unit.py, with `--host-executor` or `--device cuda`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dien_ops import _precision, functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    assert_same_bits,
    begins_anywhere,
    rounded_to_tf32,
)
from unit_cases import F64, Case

pytestmark = pytest.mark.usefixtures("cuda_kernels")

LOW = [torch.float32, torch.bfloat16, torch.float16]
# How a call goes through the kernels: activation, training, softmax
KINDS = [("sigmoid", True, True), ("prelu", True, False), ("dice", False, False), ("dice", True, True)]
EVERY_KIND = pytest.mark.parametrize(("activation", "training", "softmax"), KINDS)


@pytest.fixture
def tf32(monkeypatch):
    """float32 means tf32."""
    monkeypatch.setattr(_precision, "allow_tf32", lambda tensor, backend: tensor.dtype == torch.float32)


def small_weights(case: Case) -> Case:
    """Of a size that keeps the hidden values about as large as the inputs."""
    for x in case.weights:
        x.data /= x.shape[1] ** 0.5
    return case


# --------------------------------------------------------------------------------------------------------------- tf32


class Tf32Linear(torch.autograd.Function):
    """What a matrix unit makes of x W^T + b and its gradients: operands of 11 bits, sums as good as float64's."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return rounded_to_tf32(x) @ rounded_to_tf32(weight).T + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = map(rounded_to_tf32, ctx.saved_tensors)
        exact, grad = grad.flatten(0, -2), rounded_to_tf32(grad)
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), exact.sum(0)


@EVERY_KIND
def test_tf32_errs_at_most_twice_as_much_as_its_rounding(activation, training, softmax, tf32, monkeypatch):
    def draw():
        sizes = (9, 3, 12, 18, (20, 9))
        case = small_weights(Case(sizes, activation, torch.float32, training=training, softmax=softmax))
        double = case.to(F64)
        exact = double.results(reference)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", Tf32Linear.apply)
            rounded = [x.float() for x in double.results(reference)]
        return case.results(functional), rounded, exact

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(monkeypatch):
    case = small_weights(Case((9, 3, 12, 18, (20, 9)), "sigmoid", torch.float32))
    exact = case.to(F64).results(reference)
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(_precision, "allow_tf32", lambda tensor, backend, allowed=allowed: allowed)
        results = [x.detach() for x in case.results(functional)]
        errors.append(
            max(float((a - e.detach()).abs().max() / e.abs().max()) for a, e in zip(results, exact, strict=True))
        )
    assert errors[0] < 1e-5 and 20 * errors[0] < errors[1]


# ------------------------------------------------------------------------------------------- tiles and parts of the work

# B, C, T, D, hidden sizes
LARGE = [
    (3, None, 300, 7, (5,)),  # several tiles for one sequence
    (300, None, 2, 3, (4, 3)),  # many sequences in one tile
    (1, 70, 5, 3, (6,)),  # more targets than there are parts of the work for one tile
    (2, 3, 66, 21, (17, 41, 9)),  # rows, columns and layers that fill no tile
    (2, 2, 9, 130, (160, 81)),  # several items of a warp in every product
    (5, 300, 70, 1, (1,)),  # parts of targets that are not alike
]


@EVERY_KIND
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_and_odd_sizes(sizes, activation, training, softmax):
    case = small_weights(Case(sizes, activation, training=training, softmax=softmax))
    assert_close(case.results(functional), case.results(reference))


@EVERY_KIND
def test_more_tiles_than_the_backward_has_blocks(activation, training, softmax, set_executor):
    # with so little shared memory a tile is 16 steps, and 264 blocks take some 300 tiles
    set_executor(shared_bytes=20480)
    case = Case((600, 2, 9, 17, (3,)), activation, training=training, softmax=softmax)
    case.lengths = 7 + torch.arange(600) % 3
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("activation", "training"), [("sigmoid", True), ("dice", True)])
def test_large_layers_in_low_precision(activation, training, dtype, tf32):
    def draw():
        case = small_weights(Case((3, 2, 40, 70, (90, 50)), activation, dtype, training=training))
        plain = case.to(torch.bfloat16) if dtype == torch.float32 else case  # tf32 errs less than bfloat16 does
        return (
            [x.to(plain.keys.dtype) for x in case.results(functional)],
            plain.results(reference),
            case.to(F64).results(reference),
        )

    assert_at_most_twice_torchs_error(draw() for _ in range(2))


@EVERY_KIND
def test_all_histories_may_be_empty(activation, training, softmax):
    case = Case((4, 3, 6, 5, (7, 2)), activation, training=training, softmax=softmax)
    case.lengths = torch.zeros(4, dtype=torch.int64)
    assert all((x == 0).all() for x in case.results(functional)[: 2 + len(case.inputs)])


def test_int32_lengths_are_as_good():
    case = Case((40, 2, 9, 5, (7,)), "sigmoid")
    expected = case.results(functional)
    case.lengths = case.lengths.int()
    assert_same_bits(case.results(functional), expected)


def test_lengths_of_more_sequences_than_a_block_has_threads():
    case = Case((2500, None, 3, 2, (3,)), "prelu")
    assert_close(case.results(functional), case.results(reference))


def test_33_layers_are_computed_and_34_refused():
    case = small_weights(Case((2, None, 3, 2, (3,) * 32), "prelu"))
    assert_close(case.results(functional), case.results(reference))
    with pytest.raises(RuntimeError, match="weights must have at most 33 tensors on CUDA, got 34"):
        Case((2, None, 3, 2, (3,) * 33), "prelu").call()


# ------------------------------------------------------------------------------------------------ the chip's memory


@EVERY_KIND
@pytest.mark.parametrize("shared_bytes", [101376, 49152, 20480])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_what_does_not_fit_on_the_chip_is_computed_all_the_same(
    activation, training, softmax, shared_bytes, dtype, set_executor
):
    # 16 rows of the first layer's inputs in float64: 26 KB
    case = small_weights(Case((4, 6, 7, 66, (50, 20)), activation, dtype, training=training, softmax=softmax))
    set_executor(shared_bytes=shared_bytes, multiprocessors=1)  # so few that a block takes several targets
    if dtype == F64:
        return assert_close(case.results(functional), case.results(reference))
    draw = case.results(functional), case.results(reference), case.to(F64).results(reference)
    assert_at_most_twice_torchs_error([draw])


@EVERY_KIND
@pytest.mark.parametrize("shared_bytes", [232448, 20480])
def test_memory_that_nobody_wrote_is_never_read(activation, training, softmax, shared_bytes, set_executor):
    set_executor(shared_bytes=shared_bytes)
    case = Case((4, 3, 7, 66, (50, 20)), activation, training=training, softmax=softmax)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        results = case.results(functional)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(results, case.results(reference))


def test_what_the_forward_keeps_is_zero_where_no_row_is():
    case = Case((4, 3, 7, 5, (9, 2)), "dice", torch.float32)
    given = case.query, case.keys, case.weights, case.biases, case.alphas, [], [], case.lengths
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    try:
        *_, hidden = torch.ops.dien_ops.local_activation_unit(*given, "dice", 1e-3, 0.0, False, False)
    finally:
        torch.use_deterministic_algorithms(False)
    rows = 3 * int(case.lengths.sum())
    assert hidden.isfinite().all() and hidden.count_nonzero() == rows * (9 + 2)


# ------------------------------------------------------------------------------------------ in whatever order threads run


ORDERS = [("in_order", 1), ("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@EVERY_KIND
def test_bits_do_not_depend_on_the_order_of_threads(activation, training, softmax, dtype, set_executor, tf32):
    case = Case((7, 2, 11, 5, (9, 6)), activation, dtype, training=training, softmax=softmax)
    expected = case.results(functional)
    for order, seed in ORDERS:
        set_executor(order=order, seed=seed)
        assert_same_bits(case.results(functional), expected)


@EVERY_KIND
def test_the_same_inputs_give_the_same_bits(activation, training, softmax):
    case = Case((40, 3, 20, 36, (80, 40)), activation, torch.float32, training=training, softmax=softmax)
    assert_same_bits(case.results(functional), case.results(functional))


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_contiguous_tensors_may_begin_anywhere(dtype):
    case = Case((5, 3, 7, 6, (8, 3)), "prelu", dtype)
    expected = case.results(functional)

    case.query, case.keys = begins_anywhere(case.query), begins_anywhere(case.keys)
    case.weights, case.biases, case.alphas = (
        [begins_anywhere(x) for x in xs] for xs in (case.weights, case.biases, case.alphas)
    )
    assert_same_bits(case.results(functional), expected)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_logits_of_any_size_and_gates_at_their_ends(activation, training, softmax, dtype, tf32):
    case = small_weights(Case((5, 2, 7, 6, (8, 3)), activation, dtype, training=training, softmax=softmax, eps=0.1))
    with torch.no_grad():
        case.keys.mul_(200)
        case.weights[-1].mul_(20)
    found, expected = case.results(functional), case.results(reference)
    assert all(x.isfinite().all() for x in found[:2]) and all(x.isfinite().all() for x in expected[:2])
    if dtype == F64:
        assert_close(found, expected, 1e-9)


def test_an_infinite_key_is_its_own_rows_affair():
    # hidden 5 of 8 columns: those of zeros must not turn infinity into NaN; the other rows of the tile see nothing of it
    case = Case((3, None, 4, 2, (5, 3)), "prelu", with_lengths=False)
    with torch.no_grad():
        for x in (case.query, *case.weights):
            x.abs_()
        case.weights[0][:, 4:6].neg_()  # of q - k
        finite = case.call()[1].clone()
        case.keys[1, 0] = torch.inf
    scores = case.call()[1]
    assert scores[1, 0] == torch.inf
    finite[1, 0] = torch.inf
    assert torch.equal(scores, finite)
