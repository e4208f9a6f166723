# SPDX-License-Identifier: Apache-2.0
"""Double backward for every operator: the derivative of a backward kernel, through ``reference.py``'s equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():

        def tracked(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x.view_as(x) if x.requires_grad else x.detach().requires_grad_(x.is_floating_point())

        primals = [tracked(x) for x in primals]
        grad_outputs = [tracked(g) for g in grad_outputs]
        outputs = reference(*primals)
        # an output without elements may depend on nothing
        present = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and y.requires_grad]
        wanted = [(x, gg) for x, gg in zip(primals, grad_grads, strict=True) if x is not None and x.requires_grad]
        grads: Sequence[Tensor] = ()
        if present:
            grads = torch.autograd.grad(
                [y for y, _ in present],
                [x for x, _ in wanted],
                [g for _, g in present],
                create_graph=True,
                materialize_grads=True,
            )
        terms = [
            (g * gg).sum() for g, (_, gg) in zip(grads, wanted, strict=False) if gg is not None and g.requires_grad
        ]
        variables = [x for x in [*grad_outputs, *primals] if x is not None and x.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(variables)
        if terms:
            total = torch.stack(terms).sum()
            found = torch.autograd.grad(total, variables, create_graph=create_graph, allow_unused=True)
    remaining = iter(found)
    result = [next(remaining) if x is not None and x.requires_grad else None for x in [*grad_outputs, *primals]]
    return result[: len(grad_outputs)], result[len(grad_outputs) :]
