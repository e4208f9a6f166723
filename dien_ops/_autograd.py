# SPDX-License-Identifier: Apache-2.0
"""Double backward for every operator: the derivative of a backward kernel, taken through ``reference.py``'s equations."""

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
        present = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        wanted = [i for i, x in enumerate(primals) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in present],
            [primals[i] for i in wanted],
            [g for _, g in present],
            create_graph=True,
            materialize_grads=True,
        )
        terms = [
            (g * grad_grads[i]).sum() for i, g in zip(wanted, grads, strict=True) if grad_grads[i] is not None
        ]
        variables = [x for x in [*grad_outputs, *primals] if x is not None and x.requires_grad]
        if terms:
            found = torch.autograd.grad(
                torch.stack(terms).sum(), variables, create_graph=create_graph, allow_unused=True
            )
        else:
            found = (None,) * len(variables)
    remaining = iter(found)
    result = [
        next(remaining) if x is not None and x.requires_grad else None for x in [*grad_outputs, *primals]
    ]
    return result[: len(grad_outputs)], result[len(grad_outputs) :]
