# SPDX-License-Identifier: Apache-2.0
"""What was built and what runs: ``python -m dien_ops.info``, the first thing to paste into a bug report."""

from __future__ import annotations

import platform

import torch

from dien_ops import _C, _library


def collect() -> dict[str, str]:
    """Everything :func:`main` prints, by name.

    Example:
        >>> dien_ops.info.collect()["dien_ops"] == dien_ops.__version__
        True
    """
    problem = _library.cuda_problem()
    return {
        "dien_ops": _C.version,
        "built with": f"torch {_C.built_with_torch}, {_C.compiler}, stable ABI of torch 2.10",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU kernels built for": ", ".join(_C.cpu_capabilities),
        "CPU kernels run with": _C.cpu_capability(),
        "CPU threads": str(torch.get_num_threads()),
        "operators": _operators("CPU"),
        "CUDA kernels built for": _C.cuda_summary,
        "CUDA kernels loaded": f"no: {problem}" if problem else "yes",
        "CUDA operators": _operators("CUDA") or "none",
        **_gpus(),
    }


def _operators(dispatch_key: str) -> str:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return ", ".join(sorted(x.removeprefix("dien_ops::") for x in registered if x.startswith("dien_ops::")))


def _gpus() -> dict[str, str]:
    facts = {}
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        problem = None if _library.cuda_problem() else _library.gpu_problem(torch.device("cuda", index))
        facts[f"cuda:{index}"] = f"{name}, compute capability {major}.{minor}" + (f": {problem}" if problem else "")
    return facts or {"GPU": "none visible"}


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
