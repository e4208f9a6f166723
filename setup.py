# SPDX-License-Identifier: Apache-2.0
"""Drives CMake: configure, build with Ninja, install the native files into the package. Metadata: pyproject.toml."""

import os
import re
import subprocess
import sys
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

    def build_extension(self, ext: Extension) -> None:
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(self.tree), "-G", "Ninja", "--log-level=STATUS",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDIEN_OPS_VERSION={package_version()}",
            f"-DDIEN_OPS_SANITIZE={'ON' if os.environ.get('DIEN_OPS_SANITIZE') == '1' else 'OFF'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(self.tree), "--parallel", jobs], check=True)
        self.install_into(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:  # editable installs and build_ext --inplace
        self.install_into(ROOT / "dien_ops")

    def install_into(self, package: Path) -> None:
        subprocess.run(["cmake", "--install", str(self.tree), "--prefix", str(package.resolve())], check=True)


setup(ext_modules=[Extension("dien_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
