# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native libraries, and says what to do where one cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

_CPU_LIBRARY = Path(__file__).with_name("libdien_ops_cpu.so")
_OLDEST_TORCH = (2, 10)


def load() -> None:
    """Loads the CPU library, which registers every operator under ``torch.ops.dien_ops``.

    Raises:
        ImportError: torch is too old, the library is missing or does not load, or ``DIEN_OPS_CPU_CAPABILITY`` names
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
            f"{error}. To rebuild it against the torch that runs: "
            f"pip install --no-build-isolation --force-reinstall --no-deps ."
        ) from error
