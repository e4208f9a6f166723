# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of the CUDA kernels over small sizes that fit no tile, once each: ``python -m bench.gpu_small
[DEVICE]``. compute-sanitizer watches it: whether the numbers are right is the tests' affair.

A column's module has ``cases()`` and ``run(case, device)``, which raises FloatingPointError where a result is not
finite.
"""

from __future__ import annotations

import sys

import torch

from bench import (
    gpu_small_activation_unit,
    gpu_small_attention,
    gpu_small_aux_loss,
    gpu_small_dice,
    gpu_small_embedding,
    gpu_small_gru,
)

COLUMNS = (
    gpu_small_gru,
    gpu_small_attention,
    gpu_small_activation_unit,
    gpu_small_dice,
    gpu_small_aux_loss,
    gpu_small_embedding,
)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    torch.manual_seed(0)
    count = 0
    for column in COLUMNS:
        for case in column.cases():
            print(case, flush=True)  # what the sanitizer reports next is of this one
            column.run(case, device)
            count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
