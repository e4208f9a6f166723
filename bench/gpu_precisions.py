# SPDX-License-Identifier: Apache-2.0
"""What the small cases for compute-sanitizer are computed in."""

import torch

# Of the tensors; and whether float32's products may round their factors to tf32.
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
