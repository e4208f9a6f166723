# SPDX-License-Identifier: Apache-2.0
"""From files or a generator to the batches that the models take."""

from examples.data.behaviours import BehaviourLog, RejectedLines
from examples.data.movielens import load_movielens
from examples.data.protocol import Batch, Examples, Protocol
from examples.data.synthetic import generate_synthetic

__all__ = [
    "Batch",
    "BehaviourLog",
    "Examples",
    "Protocol",
    "RejectedLines",
    "generate_synthetic",
    "load_movielens",
]
