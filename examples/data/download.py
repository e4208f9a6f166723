# SPDX-License-Identifier: Apache-2.0
"""Fetches MovieLens-100K once and keeps it: the data set lies inside a small wheel on the Python package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENT = "recbole==1.2.1"
WHEEL_NAME = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
CACHE_VARIABLE = "DIEN_OPS_CACHE"

Downloader = Callable[[Path], None]  # puts WHEEL_NAME into the folder that it is given


class DownloadError(RuntimeError):
    """The data set could not be fetched; the message says what to do."""


def cache_folder() -> Path:
    """$DIEN_OPS_CACHE, else $XDG_CACHE_HOME/dien_ops, else ~/.cache/dien_ops."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dien_ops"


def pip_download(folder: Path) -> None:
    """Downloads the wheel with pip, so that the machine's own index and proxy settings hold; installs nothing."""
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DownloadError(lines[-1] if lines else f"pip ended with {result.returncode}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_wheel(
    cache: Path | None = None, download: Downloader = pip_download, expected_sha256: str = WHEEL_SHA256
) -> Path:
    """Returns the path of the wheel in the cache; downloads it where it is absent or damaged.

    Raises:
        DownloadError: nothing could be downloaded, or what came is not the file whose SHA-256 is pinned here.
    """
    cache = cache_folder() if cache is None else cache
    wheel = cache / WHEEL_NAME
    if wheel.is_file() and sha256(wheel) == expected_sha256:
        return wheel
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the final rename stays on one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            download(Path(folder))
            fresh = Path(folder) / WHEEL_NAME
            if not fresh.is_file():
                raise DownloadError(f"the download did not bring {WHEEL_NAME}")
            got = sha256(fresh)
            if got != expected_sha256:
                raise DownloadError(f"{WHEEL_NAME} has SHA-256 {got}, expected {expected_sha256}")
            os.replace(fresh, wheel)
    except (DownloadError, OSError) as error:
        raise DownloadError(
            f"MovieLens-100K (part of {REQUIREMENT}) is not in {cache} and could not be downloaded: {error}\n"
            f"`--dataset synthetic` needs no download. Or put {WHEEL_NAME} into that folder yourself; {CACHE_VARIABLE} "
            f"names another one."
        ) from error
    return wheel
