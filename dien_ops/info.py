# SPDX-License-Identifier: Apache-2.0
"""What was built and what runs: ``python -m dien_ops.info``, the first thing to paste into a bug report."""

from __future__ import annotations

import bisect
import platform
from typing import NamedTuple

import torch

from dien_ops import _C, _checks, _library, _precision


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


class GRUResidence(NamedTuple):
    """What of a recurrent CUDA kernel's memory stays on the chip for all steps.

    A kernel is at its best where all its weights do; the others it reads from the L2 cache in every step. It is slow
    where there is no room for the state, and right everywhere.
    """

    forward_weights: float  #: the share of weight_hh, 0 to 1
    forward_state: bool
    backward_weights: float
    backward_state: bool


def gru_residence(
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    reset_after: bool = True,
    device: torch.device | str = "cuda",
) -> GRUResidence:
    """How the CUDA kernels of the recurrent operators run with this hidden size on this GPU.

    float32 means tf32 where ``torch.backends.cudnn.rnn.fp32_precision`` allows it.

    Raises:
        RuntimeError: the CUDA kernels are not loaded, or do not run on the device.

    Example:
        >>> dien_ops.info.gru_residence(36)  # doctest: +SKIP
        GRUResidence(forward_weights=1.0, forward_state=True, backward_weights=1.0, backward_state=True)
    """
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"device must be a CUDA device, got {device}")
    like = torch.empty(0, dtype=dtype, device=device)
    _checks.supported("device", like)
    return _residence(like, hidden_size, reset_after)


def _residence(like: torch.Tensor, hidden_size: int, reset_after: bool = True) -> GRUResidence:
    return GRUResidence(
        *torch.ops.dien_ops.gru_residence(like, hidden_size, reset_after, _precision.allow_tf32(like, "rnn"))
    )


def _largest_resident_size(like: torch.Tensor) -> int:
    """The largest H of which all is on the chip, forward and backward."""
    streamed = lambda hidden: _residence(like, hidden) != (1.0, True, 1.0, True)  # noqa: E731
    return bisect.bisect_left(range(4096), True, lo=1, key=streamed) - 1


def _resident_sizes(device: torch.device) -> str:
    likes = (torch.empty(0, dtype=dtype, device=device) for dtype in _checks.ANY_PRECISION)
    return ", ".join(f"{_largest_resident_size(x)} in {str(x.dtype).removeprefix('torch.')}" for x in likes)


def _operators(dispatch_key: str) -> str:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return ", ".join(sorted(x.removeprefix("dien_ops::") for x in registered if x.startswith("dien_ops::")))


def _gpus() -> dict[str, str]:
    facts = {}
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        device = torch.device("cuda", index)
        problem = None if _library.cuda_problem() else _library.gpu_problem(device)
        facts[f"cuda:{index}"] = f"{name}, compute capability {major}.{minor}" + (f": {problem}" if problem else "")
        if not problem and not _library.cuda_problem():
            facts[f"cuda:{index}, GRU wholly on the chip"] = f"H up to {_resident_sizes(device)}; slower beyond"
    return facts or {"GPU": "none visible"}


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
