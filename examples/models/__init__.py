# SPDX-License-Identifier: Apache-2.0
"""The models of the papers over shared blocks, smallest first."""

from examples.models.base import BaseModel
from examples.models.blocks import Vocabulary
from examples.models.dien import DIEN
from examples.models.din import DIN

MODELS: dict[str, type[BaseModel]] = {"base": BaseModel, "din": DIN, "dien": DIEN}

__all__ = ["DIEN", "DIN", "MODELS", "BaseModel", "Vocabulary"]
