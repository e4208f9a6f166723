# SPDX-License-Identifier: Apache-2.0
"""DIN and DIEN, trained and compared on real behaviour sequences with `dien_ops`: `python -m examples.demo`."""

import os

# Has to be set before torch starts its threads: on a busy machine, threads that spin while they wait for each other
# make small operators a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
