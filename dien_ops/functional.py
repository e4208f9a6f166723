# SPDX-License-Identifier: Apache-2.0
"""The operators as functions. :mod:`dien_ops.reference` has the same names and signatures in plain PyTorch."""

from dien_ops.activation_unit import local_activation_unit
from dien_ops.attention import bilinear_attention
from dien_ops.dice import dice
from dien_ops.gru import attentional_gru, gru

__all__ = ["attentional_gru", "bilinear_attention", "dice", "gru", "local_activation_unit"]
