#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the sdist, and from it the wheel, in pip's isolation; looks at what is in them; installs the wheel in a fresh
# environment with OTHER_TORCH (default: TORCH) and runs the self-test there, away from the source tree.
set -euo pipefail
: "${PYTHON:=python3}" "${TORCH:=torch>=2.10}" "${OTHER_TORCH:=}"
top=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The isolated build takes the newest torch that pyproject.toml admits, unless it is constrained to the one asked for.
echo "$TORCH" > "$work/constraints.txt"
export PIP_CONSTRAINT="$work/constraints.txt" PIP_BUILD_CONSTRAINT="$work/constraints.txt"
"$PYTHON" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build
"$work/build/bin/python" -m build --outdir "$work/dist" "$top"
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT

"$PYTHON" - "$work"/dist/* <<'PY'
import sys, tarfile, zipfile

sdist = next(p for p in sys.argv[1:] if p.endswith(".tar.gz"))
wheel = next(p for p in sys.argv[1:] if p.endswith(".whl"))
with tarfile.open(sdist) as tar:
    in_sdist = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
in_wheel = set(zipfile.ZipFile(wheel).namelist())

def missing(wanted, present, where):
    lacking = [w for w in wanted if not any(p == w or p.startswith(w) for p in present)]
    assert not lacking, f"{where} lacks {lacking}"

sources = ["csrc/library.cpp", "csrc/cpu/simd.h", "csrc/cuda/gru_forward.cu", "csrc/cuda/primitives.cuh", "csrc/cuda/host/"]
missing(["CMakeLists.txt", "cmake/cuda.cmake", "LICENSE", "README.md", "python_tests/", "bench/", *sources], in_sdist, sdist)
missing(["dien_ops/__init__.py", "dien_ops/py.typed", "dien_ops/libdien_ops_cpu.so", "dien_ops/_C."], in_wheel, wheel)
strangers = [p for p in in_wheel if not p.startswith(("dien_ops/", "dien_ops-"))]
assert not strangers, f"{wheel} holds {strangers}"
binaries = [p for p in in_sdist if p.endswith((".so", ".o", ".pyc"))]
assert not binaries, f"{sdist} holds {binaries}"
print(f"contents are right: {len(in_sdist)} paths in the sdist, {len(in_wheel)} in the wheel")
PY

"$PYTHON" -m venv "$work/run"
"$work/run/bin/python" -m pip install --quiet "${OTHER_TORCH:-$TORCH}" numpy
"$work/run/bin/python" -m pip install --quiet "$work"/dist/*.whl
cd "$work"
"$work/run/bin/python" - <<'PY'
import os
from pathlib import Path

import dien_ops

there = (Path(dien_ops.__file__).parent / "libdien_ops_cuda.so").exists()
said = dien_ops._C.cuda_summary
assert there == bool(dien_ops._C.cuda_architectures), f"libdien_ops_cuda.so is {'' if there else 'not '}in the wheel: {said}"
assert there or os.environ.get("DIEN_OPS_CUDA") != "on", f"DIEN_OPS_CUDA=on, and the wheel has no CUDA kernels: {said}"
PY
"$work/run/bin/python" -m dien_ops.info
"$work/run/bin/python" -m dien_ops.selftest
