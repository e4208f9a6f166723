# SPDX-License-Identifier: Apache-2.0
"""The GPU that is measured, as it is found: ``python -m bench.gpu`` prints what it is, as JSON. Nothing is ever set.

Needs torch and not dien_ops, since gpu_check.py asks before it builds.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import torch

NVIDIA_SMI_SECONDS = 20.0


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What the driver says of the first visible GPU, in its own units; "unknown" where it says nothing."""
    unknown = dict.fromkeys(fields, "unknown")
    if shutil.which("nvidia-smi") is None:
        return unknown
    command = ["nvidia-smi", f"--query-gpu=uuid,{','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return unknown
    lines = [[value.strip() for value in line.split(",")] for line in done.stdout.strip().splitlines()]
    if len(lines) > 1:  # this machine has several
        lines = [line for line in lines if line[0].endswith(str(torch.cuda.get_device_properties(0).uuid))]
    if done.returncode != 0 or len(lines) != 1 or len(lines[0]) != 1 + len(fields):
        return unknown
    return dict(zip(fields, lines[0][1:], strict=True))


def clocks() -> str:
    said = nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu")
    return f"{said['clocks.sm']} (SM), {said['clocks.mem']} (memory), {said['temperature.gpu']} °C"


def architecture(major: int, minor: int) -> str:
    """As TORCH_CUDA_ARCH_LIST names it: with the instructions that this generation alone has, where there are such."""
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def facts() -> dict[str, str]:
    device = torch.cuda.get_device_properties(0)
    driver = nvidia_smi("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "utilization.gpu")
    cudnn = torch.backends.cudnn.version()
    return {
        "name": device.name,
        "architecture": architecture(device.major, device.minor),
        "multiprocessors": str(device.multi_processor_count),
        "memory": f"{device.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{device.L2_cache_size / 2**20:.0f} MiB",
        "driver": driver["driver_version"],
        "CUDA": str(torch.version.cuda),
        "cuDNN": "none" if cudnn is None else str(cudnn),
        "power limit": driver["power.limit"],
        "highest clocks": f"{driver['clocks.max.sm']} (SM), {driver['clocks.max.mem']} (memory)",
        "clocks before the run": clocks(),
        "busy before the run": driver["utilization.gpu"],
    }


def slug(name: str) -> str:
    """A name of a file for results of this GPU."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU that it can use")
    print(json.dumps(facts()))
