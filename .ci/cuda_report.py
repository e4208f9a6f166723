# SPDX-License-Identifier: Apache-2.0
"""The compile gate of the CUDA kernels: ``make cuda-report``.

Prints registers, static shared memory, stack and spills of each kernel for each GPU it was built for, from what ptxas
said in the build (``cmake/keep_ptxas_output.sh``). Fails where a kernel spills registers or has a stack frame besides,
unless a comment above it allows so much, with the reason::

    // spills allowed: 16 bytes (twice per sequence, outside of the loop over time)
    // stack allowed: 40 bytes (the message of require)

A stack frame besides the spills is an array that does not live in registers, or what a message is printed from. Fails
also where a kernel file does what only ``primitives.cuh``, ``launch.cuh`` and ``sort.cu`` may do. All this holds for
the kernels of the primitives' own tests too (``csrc/cuda/test``), but not for those of CUB, which are the toolkit's and
came with ``sort.cu``: the table shows them as they are.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"

# ----------------------------------------------------------------------------------------------- what ptxas said


@dataclass
class Kernel:
    """One kernel for one GPU, or a function that it calls; sizes in bytes."""

    name: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int | None = None  # None: a function, which shares its caller's
    shared: int = 0  # what is not sized at the launch

    @property
    def base_name(self) -> str:
        return self.name.split("<")[0]


def parse(log: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    entry = architecture = function = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            entry, architecture = found.groups()
        elif found := re.search(r"Function properties for (.+)", line):
            function = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels.append(Kernel(function, architecture, *map(int, found.groups())))
        elif found := re.search(r"Used (\d+) registers", line):
            kernel = next(k for k in reversed(kernels) if k.name == entry)
            kernel.registers = int(found[1])
            smem = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(smem[1]) if smem else 0
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        kernel.name = short(name)
    return kernels


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short(name: str) -> str:
    """``void dien_ops::cuda::(anonymous namespace)::sweep<float>(Params)`` is ``sweep<float>``, and a kernel of CUB
    ``cub::Name``."""
    if found := re.match(r"(?:void )?cub::[^<(]*?(\w+)[<(]", name):
        return f"cub::{found[1]}"
    name = re.sub(r"\(anonymous namespace\)::|\b(dien_ops|cuda|test|_INTERNAL_\w+)::", "", name).removeprefix("void ")
    depth = 0
    for i in reversed(range(len(name) if name.endswith(")") else 0)):
        depth += {")": 1, "(": -1}.get(name[i], 0)
        if depth == 0:
            return name[:i]
    return name


def allowances(source: str) -> dict[tuple[str, str], int]:
    """Bytes by (kernel, "spills" or "stack")."""
    pattern = r"// (spills|stack) allowed: (\d+) bytes \(.+\)\n"
    return {
        (following[1], comment[1]): int(comment[2])
        for comment in re.finditer(pattern, source)
        if (following := re.compile(r"\bvoid\s+(\w+)\s*\(").search(source, comment.end()))
    }


def excesses(kernels: Iterable[Kernel], allowed: dict[tuple[str, str], int]) -> list[str]:
    found = []
    for kernel in kernels:
        if kernel.name.startswith("cub::"):
            continue
        spills = max(kernel.spill_stores, kernel.spill_loads)
        besides = max(kernel.stack - kernel.spill_stores, 0)
        for what, size in (("spills", spills), ("stack", besides)):
            limit = allowed.get((kernel.base_name, what), 0)
            if size > limit:
                found.append(f"{kernel.name} for {kernel.architecture}: {what} {size} bytes, allowed {limit}")
    return found


def table(kernels: list[Kernel]) -> str:
    rows = [("kernel", "for", "registers", "shared", "stack", "spill stores", "spill loads")]
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        registers = "caller's" if k.registers is None else k.registers
        rows.append((k.name, k.architecture, *map(str, (registers, k.shared, k.stack, k.spill_stores, k.spill_loads))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


# ----------------------------------------------------------------------------------------------- what kernel files do

DEVICES_OWN = ("primitives.cuh", "launch.cuh", "sort.cu")
ONLY_IN_PRIMITIVES = {
    "inline assembly": r"\basm\b",
    "a launch": r"<<<",
    "a preprocessor condition": r"^\s*#\s*(if|ifdef|ifndef|elif|else)\b",
    "a name of the compiler's (__shared__, an intrinsic)": r"\b__(?!restrict__)\w+",
}


def check_source(path: Path) -> list[str]:
    """Both builds of a kernel file compile the same text, so what differs stands in the files DEVICES_OWN."""
    no_text = re.sub(
        r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\\n])*"', lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.DOTALL
    )
    return [
        f"{path.name}:{number}: {what} belongs into primitives.cuh or launch.cuh: {line.strip()}"
        for number, line in enumerate(no_text.splitlines(), 1)
        for what, pattern in ONLY_IN_PRIMITIVES.items()
        if re.search(pattern, line)
    ]


def kernel_files() -> list[Path]:
    files = [
        path
        for pattern in ("*.cu", "*.cuh", "*.h", "test/*.cu", "test/*.h", "host/*.cu")
        for path in CUDA.glob(pattern)
    ]
    return sorted(path for path in files if path.name not in DEVICES_OWN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "build" / f"{sys.implementation.cache_tag}-sanitize0"
    parser.add_argument("tree", nargs="?", type=Path, default=default, help="build tree, default: %(default)s")
    tree = parser.parse_args().tree

    problems = [problem for path in kernel_files() for problem in check_source(path)]
    kernels: list[Kernel] = []
    allowed: dict[tuple[str, str], int] = {}
    for source in (source for pattern in ("*.cu", "test/*.cu") for source in sorted(CUDA.glob(pattern))):
        target = "dien_ops_cuda_test" if source.parent.name == "test" else "dien_ops_cuda"
        log = tree / "CMakeFiles" / f"{target}.dir" / source.relative_to(ROOT).with_suffix(".cu.o.ptxas")
        if not log.exists():
            problems.append(f"{source.name} was not built in {tree}: build {target} with DIEN_OPS_CUDA=on")
            continue
        kernels += parse(log.read_text())
        allowed |= allowances(source.read_text())
    if kernels:
        print(table(kernels))
    problems += excesses(kernels, allowed)
    for problem in problems:
        print(f"cuda-report: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
