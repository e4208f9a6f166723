# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on. ``python -m bench.machine`` prints a name for it, to file results under."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dien_ops import info

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
PACKAGES = ("torch", "numpy", "deepctr-torch", "openvino", "fbgemm-gpu-cpu", "pytest-benchmark")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Bytes of the largest cache of a core; None where the machine does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=None)


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def busy_seconds() -> float | None:
    """Core seconds that this machine has worked, or was kept from working, since its start; None where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Bystanders:
    """How much of the machine everybody else uses from now on."""

    def __init__(self) -> None:
        self.begin = self._clocks()

    def _clocks(self) -> tuple[float | None, float, float]:
        return busy_seconds(), sum(os.times()[:4]), time.monotonic()

    def share(self) -> float | None:
        """Their share of all cores, 0 to 1; None where the machine does not say."""
        (busy, own, clock), (busy_0, own_0, clock_0) = self._clocks(), self.begin
        if busy is None or busy_0 is None or clock == clock_0:
            return None
        others = (busy - busy_0) - (own - own_0)
        return max(0.0, others / ((clock - clock_0) * (os.cpu_count() or 1)))


def facts() -> dict[str, Any]:
    built = info.collect()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "dien_ops": built["dien_ops"],
        "kernels": built["CPU kernels run with"],
        "built_with": built["built with"],
        "versions": versions(),
        "environment": {name: os.environ.get(name, "unset") for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")},
    }


def slug() -> str:
    words = f"{cpu_model()} {cores()} cores {info.collect()['CPU kernels run with']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


if __name__ == "__main__":
    print(slug())
