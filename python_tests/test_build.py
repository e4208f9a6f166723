# SPDX-License-Identifier: Apache-2.0
"""What cmake/cuda.cmake decides, with an nvcc and an nvidia-smi that only print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

SEARCHED = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
CMAKE = shutil.which("cmake", path=SEARCHED)
MODULE = Path(__file__).parents[1] / "cmake" / "cuda.cmake"

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


class Decision(NamedTuple):
    architectures: str = ""
    summary: str = ""
    error: str = ""


def decide(
    folder: Path,
    wanted: str,
    arch_list: str = "",
    nvcc: str | None = "13.0",
    gpus: str | None = None,
    cub: bool = True,
) -> Decision:
    """Includes the module in a script, where enabling a language does nothing. nvcc: its version; gpus: what nvidia-smi
    prints; None: there is none. cub: whether nvcc preprocesses what includes CUB."""
    without_cub = "" if cub else "if [ \"$1\" = -E ]; then echo 'cub.cu: error: #error no CUB' >&2; exit 1; fi\n"
    for name, prints in [("nvcc", f"release {nvcc}, V{nvcc}.88"), ("nvidia-smi", gpus)]:
        says = "exit 9" if prints is None else f"{without_cub}echo '{prints}'"
        (folder / name).write_text(f"#!/bin/sh\n{says}\n")
        (folder / name).chmod(0o755)
    script = folder / "script.cmake"
    script.write_text(f"""
        macro(enable_language)
        endmacro()
        set(CMAKE_CUDA_COMPILER "{folder}/nvcc")
        set(DIEN_OPS_CUDA "{wanted}")
        set(TORCH_CUDA_ARCH_LIST "{arch_list}")
        include("{MODULE}")
        message(NOTICE "${{CUDA_ARCHITECTURES}}|${{CUDA_SUMMARY}}")
    """)
    environment = {
        **os.environ,
        "CUDACXX": f"{folder}/{'nvcc' if nvcc else 'missing'}",
        "PATH": f"{folder}{os.pathsep}{SEARCHED}",
    }
    done = subprocess.run([str(CMAKE), "-P", str(script)], env=environment, capture_output=True, text=True)
    if done.returncode:
        return Decision(error=" ".join(done.stderr.split()))
    return Decision(*done.stderr.splitlines()[-1].split("|"))


@pytest.mark.parametrize(
    "given, architectures",
    [
        ("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        ("8.0 9.0", "80-real;90-real"),
        ("8.0, 8.6+PTX", "80-real;86-real;86-virtual"),
        ("Ampere", "80-real;86-real;86-virtual"),
        ("8.0 Hopper", "80-real;90-real;90-virtual"),
        ("10.0f;12.0a", "100f-real;120a-real"),
        ("8.0;8.0", "80-real"),
        ("7.0;7.5;8.0", "80-real"),  # some machines set it for all packages
    ],
)
def test_torch_cuda_arch_list_is_read_as_torch_reads_it(tmp_path, given, architectures):
    # Whatever GPU there is: the list says it.
    assert decide(tmp_path, "on", given, gpus="8.9").architectures == architectures


@pytest.mark.parametrize("given", ["sm_80", "8", "8.0-PTX", "Volta", "native 8.0"])
def test_an_entry_that_is_no_capability_is_named(tmp_path, given):
    error = decide(tmp_path, "auto", given).error
    assert "TORCH_CUDA_ARCH_LIST must hold compute capabilities" in error and f'got "{given.split()[0]}"' in error


@pytest.mark.parametrize("given", ["", "native"])
@pytest.mark.parametrize(
    "gpus, architectures",
    [("9.0", "90a-real"), ("8.0\n9.0\n8.0", "80-real;90a-real"), ("7.5\n8.6", "86-real"), ("12.0", "120-real")],
)
def test_where_there_is_a_gpu_the_kernels_are_built_for_it_alone(tmp_path, given, gpus, architectures):
    assert decide(tmp_path, "auto", given, gpus=gpus).architectures == architectures


@pytest.mark.parametrize("gpus", [None, "", "[N/A]", "7.5"])
def test_without_a_usable_gpu_they_are_built_for_ampere_hopper_and_what_comes(tmp_path, gpus):
    made = decide(tmp_path, "auto", gpus=gpus)
    assert made.architectures == "80-real;90a-real;90-virtual"
    assert made.summary == "sm_80, sm_90a, compute_90 by nvcc 13.0.88"


def test_off_builds_none_and_looks_at_nothing(tmp_path):
    made = decide(tmp_path, "off", "nonsense", nvcc=None)
    assert (made.architectures, made.summary) == ("", "none: DIEN_OPS_CUDA=off")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"nvcc": None}, "missing, which is not there"),
        ({"nvcc": "11.8"}, "is version 11.8.88, and the CUDA kernels need 12.0"),
        ({"cub": False}, "comes without the headers of CUB"),
        ({"arch_list": "native"}, "TORCH_CUDA_ARCH_LIST=native, and nvidia-smi shows no GPU of compute capability 8.0"),
        ({"arch_list": "7.0 7.5"}, "has no compute capability of 8.0 or above"),
    ],
)
def test_what_is_missing_stops_the_build_where_cuda_is_on_and_is_said_where_it_is_auto(tmp_path, options, reason):
    made = decide(tmp_path, "auto", **options)
    assert made.architectures == "" and made.summary.startswith("none: ") and reason in made.summary
    error = decide(tmp_path, "on", **options).error
    assert "DIEN_OPS_CUDA=on, but" in error and reason in error


def test_only_auto_on_and_off_are_known(tmp_path):
    assert 'DIEN_OPS_CUDA must be auto, on or off; got "maybe"' in decide(tmp_path, "maybe").error
