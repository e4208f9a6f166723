# SPDX-License-Identifier: Apache-2.0
"""Double backward for every operator: the derivative of a backward kernel, through ``reference.py``'s equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dien_ops._checks import compute_dtype


def backward_of_backward(
    reference: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``<grad_grads, vjp(primals, grad_outputs)>`` where vjp is the backward of ``reference(*primals)``.

    Args:
        reference: the operator's equations; takes the primals, returns its outputs as a sequence.
        primals: the operator's tensor arguments; None where one was not given.
        grad_outputs: what its backward received; None stands for zeros.
        grad_grads: one for each primal, None where no gradient arrived.

    Returns:
        The gradients for grad_outputs and for primals, None where there is none.
    """
    given = [i for i, x in enumerate(primals) if x is not None]
    received = [i for i, g in enumerate(grad_outputs) if g is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(primals)
        for i, value in zip(given, values, strict=True):
            filled[i] = value
        results = reference(*filled)
        return tuple(results[i] for i in received)

    def backward(values: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.func.vjp(outputs, *values)[1](grads)
        return found

    def wide(x: Tensor) -> Tensor:  # what the operators compute in: their arguments may be of two dtypes
        return x.to(compute_dtype(x.dtype))

    values = tuple(wide(x) for x in primals if x is not None)
    grads = tuple(wide(g) for g in grad_outputs if g is not None)
    cotangents = tuple(
        wide(torch.zeros_like(x) if gg is None else gg)
        for x, gg in zip(primals, grad_grads, strict=False) if x is not None
    )  # fmt: skip
    for_values, for_grads = torch.func.vjp(backward, values, grads)[1](cotangents)

    def spread(found: tuple[Tensor, ...], positions: list[int], of: Sequence[Tensor | None]) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * len(of)
        for i, x in zip(positions, found, strict=True):
            given = of[i]
            result[i] = x if given is None else x.to(given.dtype)
        return result

    return spread(for_grads, received, grad_outputs), spread(for_values, given, primals)
