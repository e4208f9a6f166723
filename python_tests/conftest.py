# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

# Before torch starts its threads: on a busy machine, threads that spin while they wait for each other make small
# operators a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

THREAD_ORDERS = ("in_order", "reverse", "shuffled", "skewed")


def pytest_addoption(parser):
    group = parser.getgroup("host executor", "CUDA kernels on the CPU")
    group.addoption("--host-executor", metavar="PATH", help="libdien_ops_cuda_host.so: run the tests of CUDA kernels with it")
    group.addoption("--thread-order", choices=THREAD_ORDERS, default="in_order", help="in which it runs a kernel's threads")
    group.addoption("--thread-seed", type=int, default=0, help="of the orders that are drawn")


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _host_executor_library(request):
    path = request.config.getoption("--host-executor")
    if path is None:
        pytest.skip("needs --host-executor with the path of libdien_ops_cuda_host.so: run `make test-cuda-host`")
    if not Path(path).exists():
        pytest.fail(f"--host-executor: {path} does not exist", pytrace=False)
    import dien_ops  # noqa: F401  its library holds the schemas

    torch.ops.load_library(Path(path).resolve())


@pytest.fixture
def set_executor(request, _host_executor_library):
    """The host executor as this run asks for it, with checks; call it for one test's own options."""

    def set_options(order=None, seed=None, check=True, multiprocessors=4, shared_bytes=232448):
        torch.ops.dien_ops_test.set_executor(
            request.config.getoption("--thread-order") if order is None else order,
            request.config.getoption("--thread-seed") if seed is None else seed,
            check,
            multiprocessors,
            shared_bytes,
        )

    set_options()
    return set_options
