# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native libraries, and says what to do where one cannot be loaded."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_CPU_LIBRARY = Path(__file__).with_name("libdien_ops_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("libdien_ops_cuda.so")
_OLDEST_TORCH = (2, 10)
_LOWEST_CAPABILITY = (8, 0)
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

_cuda_problem: str | None = None  # what keeps the CUDA kernels from being loaded, and the remedy


def load() -> None:
    """Loads the CPU library, which registers every operator under ``torch.ops.dien_ops``, and where torch has CUDA the
    CUDA library. The import goes on without the latter: :func:`cuda_problem` says why.

    Raises:
        ImportError: torch is too old, the CPU library is missing or does not load, or ``DIEN_OPS_CPU_CAPABILITY`` names
            an instruction set that cannot be used.
    """
    running = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if running < _OLDEST_TORCH:
        raise ImportError(f"dien_ops needs torch >= 2.10, got torch {torch.__version__}")
    if not _CPU_LIBRARY.exists():
        raise ImportError(
            f"dien_ops: {_CPU_LIBRARY} is missing. This is a source tree that was never built, or a broken "
            f"installation: run `pip install .` in the project's folder, and do not import from the source tree"
        )
    from dien_ops import _C

    try:
        _C.cpu_capability()
    except RuntimeError as error:
        raise ImportError(f"dien_ops: {error}") from None
    try:
        torch.ops.load_library(_CPU_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"dien_ops was built with torch {_C.built_with_torch} and cannot be loaded by torch {torch.__version__}: "
            f"{error}. To rebuild it against the torch that runs: {_REBUILD}"
        ) from error
    global _cuda_problem
    _cuda_problem = _load_cuda()


def _load_cuda() -> str | None:
    """Does not ask for a GPU: that would start CUDA in a process that may mean to fork, and needs none to load."""
    from dien_ops import _C

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: install one with CUDA"
    if not _CUDA_LIBRARY.exists():
        return (
            f"dien_ops was built without CUDA kernels ({_C.cuda_summary.removeprefix('none: ')}). To rebuild it where "
            f"the CUDA toolkit (nvcc >= 12.0) is installed, in the project's folder: DIEN_OPS_CUDA=on {_REBUILD}"
        )
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return (
            f"the CUDA kernels of dien_ops cannot be loaded by torch {torch.__version__} (CUDA {torch.version.cuda}): "
            f"{error.__cause__ or error}. To rebuild them, in the project's folder: DIEN_OPS_CUDA=on {_REBUILD}"
        )
    return None


def cuda_problem() -> str | None:
    """Why the CUDA kernels are not loaded, and the remedy; None where they are."""
    return _cuda_problem


@torch.compiler.assume_constant_result  # the compiler need not look into it
def gpu_problem(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this GPU, and the remedy; None where they can."""
    from dien_ops import _C

    capability = _capability(device.index or 0)
    if capability is None or any(runs_on(architecture, capability) for architecture in _C.cuda_architectures):
        return None
    got, lowest = (".".join(map(str, x)) for x in (capability, _LOWEST_CAPABILITY))
    if capability < _LOWEST_CAPABILITY:
        return f"this GPU has compute capability {got}, and the CUDA kernels of dien_ops need {lowest}"
    return (
        f"this GPU has compute capability {got}, and dien_ops was built for {', '.join(_C.cuda_architectures)}. To "
        f"rebuild it, in the project's folder: DIEN_OPS_CUDA=on TORCH_CUDA_ARCH_LIST={got} {_REBUILD}"
    )


@functools.cache
def _capability(index: int) -> tuple[int, int] | None:
    """None where there is no GPU at all: fake tensors need none."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@functools.cache
def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for the architecture runs on a GPU: ``sm_*`` (machine code) from its own capability to the end of
    that generation, ``compute_*`` (PTX, which the driver compiles) on every later one too; with the suffix ``a`` on its
    own only, with ``f`` on its own generation only."""
    kind, number = architecture.split("_")
    own = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
    if number.endswith("a"):
        return capability == own
    same_generation = kind == "sm" or number.endswith("f")
    return capability >= own and (capability[0] == own[0] or not same_generation)
