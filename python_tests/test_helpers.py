# SPDX-License-Identifier: Apache-2.0
"""The helpers can fail: a comparison that accepts everything would make every other test worthless."""

import pytest
import torch

from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    begins_anywhere,
    gradients,
    leaf,
    rounded_to_tf32,
    second_derivatives,
    spread_lengths,
)


def test_assert_close_sees_a_small_difference_and_a_wrong_shape():
    x = torch.ones(3, dtype=torch.float64)
    assert_close([x], [x])
    with pytest.raises(AssertionError, match="differs"):
        assert_close([x + 1e-11], [x])
    with pytest.raises(AssertionError, match="shape"):
        assert_close([x[:2]], [x])


def test_the_low_precision_rule_sees_three_times_torchs_error():
    exact = [torch.ones(3, dtype=torch.float64)]
    plain = [torch.full((3,), 1 + 1e-5)]
    assert_at_most_twice_torchs_error([([torch.full((3,), 1 - 1.9e-5)], plain, exact)])
    with pytest.raises(AssertionError, match="result 0"):
        assert_at_most_twice_torchs_error([([torch.full((3,), 1 - 3e-5)], plain, exact)])
    with pytest.raises(AssertionError, match="no draws"):
        assert_at_most_twice_torchs_error([])


def test_spread_lengths_include_zero_and_all_steps():
    assert {0, 7} <= set(spread_lengths(5, 7).tolist())


def test_gradients_are_those_of_a_projection():
    x = leaf(4)
    (single,) = gradients([2 * x], [x])
    (double,) = gradients([4 * x], [x])
    assert_close([double], [2 * single])


def test_second_derivatives_are_those_of_the_numbers():
    x = leaf(4)
    n = torch.tensor([-3.0, -2, -1, 0], dtype=x.dtype)
    assert_close(second_derivatives([x**3], [x]), [6 * x.detach() * n * n])


def test_tf32_has_eleven_bits():
    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-12, -3 * 2.0**40, 0.0], dtype=torch.float64)
    assert rounded_to_tf32(x).tolist() == [1 + 2.0**-10, 1.0, -3 * 2.0**40, 0.0]


def test_what_begins_anywhere_is_the_same_tensor_one_number_further():
    x = leaf(3, 4)
    moved = begins_anywhere(x)
    assert torch.equal(moved, x) and moved.is_contiguous() and moved.storage_offset() == 1
    assert moved.is_leaf and moved.requires_grad and not begins_anywhere(x.detach()).requires_grad
