# SPDX-License-Identifier: Apache-2.0
"""The operators as functions. :mod:`dien_ops.reference` has the same names and signatures in plain PyTorch."""

from dien_ops.activation_unit import local_activation_unit
from dien_ops.attention import bilinear_attention
from dien_ops.aux_loss import auxiliary_loss
from dien_ops.dice import dice
from dien_ops.embedding import mba_adagrad_, mba_adam_, mba_rowwise_adagrad_, mba_sgd_
from dien_ops.gru import attentional_gru, gru

__all__ = [
    "attentional_gru",
    "auxiliary_loss",
    "bilinear_attention",
    "dice",
    "gru",
    "local_activation_unit",
    "mba_adagrad_",
    "mba_adam_",
    "mba_rowwise_adagrad_",
    "mba_sgd_",
]
