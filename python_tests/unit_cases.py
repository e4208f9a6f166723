# SPDX-License-Identifier: Apache-2.0
"""A call of the local activation unit: what its tests share."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor

from dien_ops import functional
from helpers import gradients, leaf, spread_lengths

F64 = torch.float64


class Case:
    """Tensors for one call, and the call."""

    def __init__(self, sizes, activation: str, dtype: torch.dtype = F64, with_lengths: bool = True, **options) -> None:
        B, C, T, D, hidden = sizes
        widths = [4 * D, *hidden, 1]
        self.query = leaf(B, *([] if C is None else [C]), D, dtype=dtype)
        self.keys = leaf(B, T, D, dtype=dtype)
        self.weights = [leaf(o, i, dtype=dtype) for i, o in pairwise(widths)]
        self.biases = [leaf(o, dtype=dtype) for o in widths[1:]]
        self.alphas = [leaf(h, dtype=dtype) for h in hidden] if activation != "sigmoid" else []
        dice = activation == "dice"
        self.running_means = [torch.linspace(-1, 1, h, dtype=dtype) for h in hidden] if dice else []
        self.running_vars = [torch.linspace(0.5, 2, h, dtype=dtype) for h in hidden] if dice else []
        self.lengths = spread_lengths(B, T) if with_lengths else None
        self.options = {"activation": activation, "eps": 1e-3, **options}

    def to(self, dtype: torch.dtype) -> Case:
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in value])
        other.query, other.keys = (x.detach().to(dtype).requires_grad_() for x in (self.query, self.keys))
        return other

    @property
    def inputs(self) -> list[Tensor]:
        return [self.query, self.keys, *self.weights, *self.biases, *self.alphas]

    def call(self, module=functional, **changes) -> tuple[Tensor, Tensor]:
        options = {
            "alphas": self.alphas, "running_means": self.running_means, "running_vars": self.running_vars,
            "lengths": self.lengths, **self.options, **changes,
        }  # fmt: skip
        return module.local_activation_unit(
            self.query, self.keys, self.weights, self.biases, return_scores=True, **options
        )

    def results(self, module=functional) -> list[Tensor]:
        """Outputs, all gradients, and the moving averages after one call that starts from this case's."""
        averages = {n: [x.clone() for x in getattr(self, n)] for n in ("running_means", "running_vars")}
        outputs = self.call(module, **averages)
        return [
            *(x.detach() for x in outputs),
            *gradients(outputs, self.inputs),
            *[x for xs in averages.values() for x in xs],
        ]
