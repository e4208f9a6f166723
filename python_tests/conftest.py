# SPDX-License-Identifier: Apache-2.0
import functools
import os
from pathlib import Path

# Before torch starts its threads: on a busy machine, threads that spin while they wait for each other make small
# operators a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from helpers import THREAD_ORDERS


def pytest_addoption(parser):
    group = parser.getgroup("host executor", "CUDA kernels on the CPU")
    group.addoption(
        "--host-executor", metavar="PATH", help="libdien_ops_cuda_host.so: run the tests of CUDA kernels with it"
    )
    group.addoption(
        "--thread-order", choices=THREAD_ORDERS, default="in_order", help="in which it runs a kernel's threads"
    )
    group.addoption("--thread-seed", type=int, default=0, help="of the orders that are drawn")
    group = parser.getgroup("device", "CUDA kernels on a GPU")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="on which tests make their tensors")
    group.addoption(
        "--cuda-test-library",
        metavar="PATH",
        help="libdien_ops_cuda_test.so: test the primitives with it on the device",
    )


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(0)


def _set_executor(config, order=None, seed=None, check=True, multiprocessors=4, shared_bytes=232448):
    torch.ops.dien_ops_executor.set_options(
        config.getoption("--thread-order") if order is None else order,
        config.getoption("--thread-seed") if seed is None else seed,
        check,
        multiprocessors,
        shared_bytes,
    )


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        # float32 is float32, nn.GRU's and ours; tf32 has tests of its own
        torch.backends.cudnn.rnn.fp32_precision = "ieee"


def pytest_collection_modifyitems(config, items):
    on_cuda = config.getoption("--device") == "cuda"
    for item in items:
        if item.get_closest_marker("cpu_kernels") and (on_cuda or config.getoption("--host-executor")):
            item.add_marker(pytest.mark.skip(reason="tests the CPU kernels"))
        if on_cuda and (mark := item.get_closest_marker("not_on_cuda")):
            item.add_marker(pytest.mark.skip(reason=mark.kwargs["reason"]))


def pytest_generate_tests(metafunc):
    if "order" in metafunc.fixturenames:
        on_device = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("order", ["device's own"] if on_device else THREAD_ORDERS, indirect=True)


@pytest.fixture(autouse=True)
def _where_kernels_run(request):
    """With --host-executor, the CUDA kernels on the CPU in the place of its own; with --device, everything on that device."""
    if request.config.getoption("--host-executor") is not None:
        request.getfixturevalue("host_executor")
    device = request.config.getoption("--device")
    if device != "cpu":
        torch.set_default_device(device)


@pytest.fixture
def on_device(request):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("needs a GPU: --device cuda")


@pytest.fixture
def without_cudnn(monkeypatch):
    """nn.GRU out of torch's own operators: cuDNN's has no second derivative, no backward in evaluation, no torch.func, and
    computes in float16 whatever dtype autocast names."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)


@pytest.fixture
def cuda_kernels(request):
    """The recurrent operators are the CUDA kernels, on a GPU or in the host executor."""
    if request.config.getoption("--device") != "cuda":
        request.getfixturevalue("host_executor")


@pytest.fixture(scope="session")
def host_executor(request):
    """CUDA kernels run on the CPU, as the options of this run say, with all checks."""
    path = request.config.getoption("--host-executor")
    if path is None:
        pytest.skip("needs --host-executor with the path of libdien_ops_cuda_host.so: run `make test-cuda-host`")
    if not Path(path).exists():
        pytest.fail(f"--host-executor: {path} does not exist", pytrace=False)
    import dien_ops  # noqa: F401  its library holds the schemas

    torch.ops.load_library(Path(path).resolve())
    _set_executor(request.config)


@pytest.fixture
def set_executor(request, host_executor):
    """Sets options of the executor for one test: order, seed, check, multiprocessors, shared_bytes."""
    yield functools.partial(_set_executor, request.config)
    _set_executor(request.config)


@pytest.fixture
def order(request):
    """The order in which a kernel's threads run: each that the executor has; on a device there is one, its own."""
    if request.config.getoption("--device") == "cpu":
        request.getfixturevalue("set_executor")(order=request.param)
    return request.param
