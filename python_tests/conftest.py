# SPDX-License-Identifier: Apache-2.0
import os

# Before torch starts its threads: on a busy machine, threads that spin while they wait for each other make small
# operators a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(0)
