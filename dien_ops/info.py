# SPDX-License-Identifier: Apache-2.0
"""What was built and what runs: ``python -m dien_ops.info``, the first thing to paste into a bug report."""

from __future__ import annotations

import platform

import torch

from dien_ops import _C


def collect() -> dict[str, str]:
    """Everything :func:`main` prints, by name.

    Example:
        >>> dien_ops.info.collect()["dien_ops"] == dien_ops.__version__
        True
    """
    operators = sorted(
        name.removeprefix("dien_ops::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("dien_ops::")
    )
    return {
        "dien_ops": _C.version,
        "built with": f"torch {_C.built_with_torch}, {_C.compiler}, stable ABI of torch 2.10",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU kernels built for": ", ".join(_C.cpu_capabilities),
        "CPU kernels run with": _C.cpu_capability(),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": ", ".join(_C.cuda_architectures) or "none: this version computes on the CPU only",
        "operators": ", ".join(operators),
    }


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
