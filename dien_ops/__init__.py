# SPDX-License-Identifier: Apache-2.0
"""Hand-written kernels for the operators of DIN and DIEN in PyTorch."""

from dien_ops import _library

_library.load()

from dien_ops import _C, functional, optim, reference  # noqa: E402
from dien_ops.activation_unit import LocalActivationUnit  # noqa: E402
from dien_ops.attention import BilinearAttention  # noqa: E402
from dien_ops.aux_loss import AuxiliaryLoss  # noqa: E402
from dien_ops.dice import Dice  # noqa: E402
from dien_ops.embedding_table import MBAEmbedding  # noqa: E402
from dien_ops.gru_modules import AGRU, AIGRU, AUGRU, GRU  # noqa: E402

__version__: str = _C.version
__all__ = [
    "AGRU",
    "AIGRU",
    "AUGRU",
    "GRU",
    "AuxiliaryLoss",
    "BilinearAttention",
    "Dice",
    "LocalActivationUnit",
    "MBAEmbedding",
    "functional",
    "optim",
    "reference",
]
