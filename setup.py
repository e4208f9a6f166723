# SPDX-License-Identifier: Apache-2.0
"""Drives CMake: configure, build with Ninja, install the native files into the package. Metadata: pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def package_version() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found, "pyproject.toml has no version"
    return found[1]


class CMakeBuild(build_ext):
    """One CMake build makes all native files; they are installed as a whole, into the wheel or into the source tree."""

    tree = ROOT / "build" / f"{sys.implementation.cache_tag}-sanitize{os.environ.get('DIEN_OPS_SANITIZE', '0')}"

    # cmake and ninja are Python packages too: they may lie beside an interpreter whose environment is not activated
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    def run_cmake(self, *arguments: str) -> None:
        cmake = shutil.which("cmake", path=self.path)
        if cmake is None:
            raise RuntimeError("building dien_ops needs cmake: pip install cmake")
        subprocess.run([cmake, *arguments], check=True, env={**os.environ, "PATH": self.path})

    def build_extension(self, ext: Extension) -> None:
        ninja = shutil.which("ninja", path=self.path)
        if ninja is None:
            raise RuntimeError("building dien_ops needs ninja: pip install ninja")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        self.run_cmake(
            "-S", str(ROOT), "-B", str(self.tree), "-G", "Ninja", "--log-level=STATUS",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # named anew each time: pip's isolated environments come and go
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDIEN_OPS_VERSION={package_version()}",
            f"-DDIEN_OPS_SANITIZE={'ON' if os.environ.get('DIEN_OPS_SANITIZE') == '1' else 'OFF'}",
            f"-DDIEN_OPS_CUDA={os.environ.get('DIEN_OPS_CUDA', 'auto')}",
            f"-DTORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
        )  # fmt: skip
        targets = os.environ.get("DIEN_OPS_TARGETS", "all").split()  # dien_ops_cuda_test is not installed
        self.run_cmake("--build", str(self.tree), "--parallel", jobs, "--target", *targets)
        self.install_into(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:  # editable installs and build_ext --inplace
        self.install_into(ROOT / "dien_ops")

    def install_into(self, package: Path) -> None:
        (package / "libdien_ops_cuda.so").unlink(missing_ok=True)  # of an earlier build: this one may be without CUDA
        self.run_cmake("--install", str(self.tree), "--prefix", str(package.resolve()))


setup(ext_modules=[Extension("dien_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
