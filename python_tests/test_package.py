# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what it exports, how it loads, what it says of itself."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dien_ops
import dien_ops.info
import dien_ops.selftest
from dien_ops import _library, functional, optim, reference
from helpers import assert_close, run_python

PACKAGE = Path(dien_ops.__file__).parent
PUBLIC_CLASSES = [x for name in dien_ops.__all__ if inspect.isclass(x := getattr(dien_ops, name))]
OPTIMIZERS = [getattr(optim, name) for name in ("MBASGD", "MBAAdagrad", "MBARowwiseAdagrad", "MBAAdam")]


def test_the_public_names_are_the_designed_ones():
    assert set(dien_ops.__all__) == {
        "GRU", "AIGRU", "AGRU", "AUGRU", "BilinearAttention", "LocalActivationUnit", "Dice", "AuxiliaryLoss",
        "MBAEmbedding", "functional", "optim", "reference",
    }  # fmt: skip


NOT_OF_THE_EQUATIONS = {"nonfinite", "check_ids", "seed", "found_inf"}  # whether and how the result is stored


@pytest.mark.parametrize("name", functional.__all__)
def test_reference_has_every_function_with_the_same_signature(name):
    ours, equations = (inspect.signature(getattr(m, name)).parameters for m in (functional, reference))
    assert [x for x in ours if x not in NOT_OF_THE_EQUATIONS] == list(equations)
    for parameter, other in equations.items():
        assert (ours[parameter].kind, ours[parameter].default) == (other.kind, other.default), parameter


def test_every_operator_runs_on_the_cpu_and_has_a_fake_rule():
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dien_ops::")}
    names.remove("dien_ops::gru_residence")  # computes nothing: a question about a GPU
    assert len(names) >= 17
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if not m.name.startswith(("_", "lib"))]
)
def test_docstring_examples_print_what_they_say(module):
    found = importlib.import_module(f"dien_ops.{module}")
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(found, globs={"torch": torch, "dien_ops": dien_ops}):
        runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("thing", [*PUBLIC_CLASSES, *OPTIMIZERS, *(getattr(functional, n) for n in functional.__all__)])
def test_every_public_thing_has_an_example_and_says_what_it_raises(thing):
    assert ">>> " in thing.__doc__ and "Raises:" in thing.__doc__


# ------------------------------------------------------------------------------------------------------------ loading


def test_an_unknown_instruction_set_is_an_import_error_that_lists_the_known_ones():
    done = run_python("import dien_ops", DIEN_OPS_CPU_CAPABILITY="avx1024")
    assert (
        "ImportError: dien_ops: DIEN_OPS_CPU_CAPABILITY must be one of baseline, avx2, avx512; got avx1024"
        in done.stderr
    )


def copy_of_package(tmp_path: Path, without: str) -> str:
    shutil.copytree(PACKAGE, tmp_path / "dien_ops", ignore=shutil.ignore_patterns(without, "__pycache__"))
    return str(tmp_path)


def test_a_tree_that_was_never_built_says_how_to_build_it(tmp_path):
    done = run_python("import dien_ops", cwd=copy_of_package(tmp_path, without="*.so"))
    assert "is missing" in done.stderr and "pip install ." in done.stderr


def test_a_library_that_does_not_load_names_both_torch_versions_and_the_remedy(tmp_path):
    path = copy_of_package(tmp_path, without="libdien_ops_cpu.so")
    (tmp_path / "dien_ops" / "libdien_ops_cpu.so").write_bytes(b"not a library")
    done = run_python("import dien_ops", cwd=path)
    assert f"cannot be loaded by torch {torch.__version__}" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


ON_CUDA = """
import torch, dien_ops
from torch._subclasses.fake_tensor import FakeTensorMode
print(dien_ops.functional.gru(torch.ones(2, 4, 3), torch.ones(15, 3), torch.ones(15, 5))[0].shape)
with FakeTensorMode():
    dien_ops.functional.gru(*(torch.empty(sizes, device="cuda") for sizes in [(2, 4, 3), (15, 3), (15, 5)]))
"""


@pytest.mark.parametrize(
    "torchs_cuda, library, reason",
    [
        (None, b"not a library", r"torch \S+ is a build without CUDA: install one with CUDA"),
        ("13.0", None, r"dien_ops was built without CUDA kernels.*DIEN_OPS_CUDA=on pip install --no-build-isolation"),
        (
            "13.0",
            b"not a library",
            r"cannot be loaded by torch \S+ \(CUDA 13.0\): .*(invalid ELF|too short).*DIEN_OPS_CUDA=on",
        ),
    ],
    ids=["torch without CUDA", "not built", "does not load"],
)
def test_without_its_cuda_library_the_package_computes_on_the_cpu_and_says_what_to_do(
    tmp_path, torchs_cuda, library, reason
):
    path = copy_of_package(tmp_path, without="libdien_ops_cuda.so")
    if library:
        (tmp_path / "dien_ops" / "libdien_ops_cuda.so").write_bytes(library)
    done = run_python(f"import torch; torch.version.cuda = {torchs_cuda!r}" + ON_CUDA, cwd=path)
    assert done.stdout == "torch.Size([2, 4, 5])\n"
    assert re.search(rf"RuntimeError: input is on cuda:0, and .*{reason}.*Or move the tensors.*\.cpu\(\)", done.stderr)


def updated(weight: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    functional.mba_sgd_(weight, ids, grad, lr=0.1)
    return weight


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.dice(x(2, 3), x(3)),
        lambda x: functional.bilinear_attention(x(2, 5, 3), x(2, 3), x(3, 3)),
        lambda x: functional.auxiliary_loss(x(2, 5, 3), x(2, 5, 3), x(2, 5, 3)),
        lambda x: functional.local_activation_unit(x(2, 3), x(2, 5, 3), [x(1, 12)], [x(1)]),
        lambda x: functional.gru(x(5, 2, 3), x(12, 3), x(12, 4)),
        lambda x: updated(x(3, 2), x(4).long(), x(4, 2)),
    ],
    ids=["dice", "attention", "auxiliary_loss", "activation_unit", "gru", "embedding"],
)
def test_every_column_takes_cuda_tensors(monkeypatch, call):
    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(_library, "gpu_problem", lambda device: None)
    with FakeTensorMode():
        result = call(lambda *sizes: torch.empty(sizes, device="cuda"))
    results = result if isinstance(result, tuple) else (result,)
    assert {x.device.type for x in results} == {"cuda"}


@pytest.mark.parametrize(
    "architecture, runs, does_not",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_120", [(12, 0), (12, 1)], [(10, 3)]),
    ],
)
def test_machine_code_runs_on_its_generation_and_ptx_on_all_that_come(architecture, runs, does_not):
    assert all(_library.runs_on(architecture, gpu) for gpu in runs)
    assert not any(_library.runs_on(architecture, gpu) for gpu in does_not)


@pytest.mark.parametrize(
    "gpu, problem",
    [
        ((9, 0), None),
        (None, None),  # a fake tensor where there is no GPU
        ((7, 5), "this GPU has compute capability 7.5, and the CUDA kernels of dien_ops need 8.0"),
        (
            (8, 6),
            "this GPU has compute capability 8.6, and dien_ops was built for sm_90a. To rebuild it, in the project's "
            "folder: DIEN_OPS_CUDA=on TORCH_CUDA_ARCH_LIST=8.6 pip install --no-build-isolation --force-reinstall --no-deps .",
        ),
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for_is_told_how_to_build_for_it(monkeypatch, gpu, problem):
    monkeypatch.setattr(_library, "_capability", lambda index: gpu)
    monkeypatch.setattr(dien_ops._C, "cuda_architectures", ["sm_90a"])
    assert _library.gpu_problem(torch.device("cuda", 1)) == problem


def test_torch_older_than_the_stable_abi_is_refused():
    done = run_python("import torch; torch.__version__ = '2.9.1'; import dien_ops")
    assert "ImportError: dien_ops needs torch >= 2.10, got torch 2.9.1" in done.stderr


# ---------------------------------------------------------------------------------------------- what it says of itself


def test_info_names_versions_capability_and_operators(capsys):
    dien_ops.info.main()
    printed = capsys.readouterr().out
    for fact in (dien_ops.__version__, torch.__version__, dien_ops._C.cpu_capability(), "mba_adam_"):
        assert fact in printed
    assert f"CUDA kernels built for  {dien_ops._C.cuda_summary}" in printed


def test_info_says_whether_the_cuda_kernels_are_loaded_and_why_not(monkeypatch):
    monkeypatch.setattr(_library, "_cuda_problem", None)
    assert dien_ops.info.collect()["CUDA kernels loaded"] == "yes"
    monkeypatch.setattr(_library, "_cuda_problem", "the reason")
    assert dien_ops.info.collect()["CUDA kernels loaded"] == "no: the reason"


def test_info_names_each_gpu_and_what_keeps_it_from_running_the_kernels(monkeypatch):
    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(_library, "_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(dien_ops._C, "cuda_architectures", ["sm_90a"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H100", "Tesla T4"][index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(dien_ops.info, "_resident_sizes", lambda device: "128 in float32")
    facts = dien_ops.info.collect()
    assert facts["cuda:0"] == "NVIDIA H100, compute capability 9.0"
    assert facts["cuda:0, GRU wholly on the chip"] == "H up to 128 in float32; slower beyond"
    assert "cuda:1, GRU wholly on the chip" not in facts
    assert facts["cuda:1"].startswith("Tesla T4, compute capability 7.5: ") and "need 8.0" in facts["cuda:1"]


def test_the_cuda_library_is_there_where_it_was_built():
    assert (PACKAGE / "libdien_ops_cuda.so").exists() == bool(dien_ops._C.cuda_architectures)


def test_selftest_passes_here(capsys):
    assert dien_ops.selftest.main() == 0
    assert "all operators agree" in capsys.readouterr().out


def test_selftest_covers_every_function(monkeypatch):
    called = set()
    for name in functional.__all__:
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, _n=name, _f=original, **k: called.add(_n) or _f(*a, **k))
    dien_ops.selftest.main()
    assert called == set(functional.__all__)


def test_selftest_names_a_wrong_operator_and_exits_with_one(monkeypatch, capsys):
    right = functional.dice
    monkeypatch.setattr(functional, "dice", lambda *a, **k: right(*a, **k) * 1.001)
    assert dien_ops.selftest.main() == 1
    assert "dice(training=True); dice(training=False)" in capsys.readouterr().err


def test_selftest_checks_what_has_cuda_kernels_on_every_gpu_too(monkeypatch, capsys):
    monkeypatch.setattr(dien_ops.selftest, "_gpus", lambda: [torch.device("cpu")])
    assert dien_ops.selftest.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("on cpu ") == 27 and "gru, reset after, on cpu" in printed


def test_selftest_sees_nan(monkeypatch):
    right = functional.bilinear_attention
    monkeypatch.setattr(functional, "bilinear_attention", lambda *a, **k: right(*a, **k) * torch.nan)
    assert dien_ops.selftest.main() == 1


@pytest.mark.parametrize("library", sorted(PACKAGE.glob("lib*.so")), ids=lambda path: path.stem)
def test_the_libraries_hold_no_python(library):
    """So that a C++ server can load them."""
    content = library.read_bytes()
    assert b"libtorch_cpu.so" in content
    assert b"libtorch_python" not in content and b"libpython" not in content and b"PyObject" not in content


@pytest.mark.skipif(not dien_ops._C.cuda_architectures, reason="built without CUDA kernels")
def test_the_cuda_library_needs_torchs_cuda_library_and_brings_its_own_cuda_runtime():
    """By name, or the loader would not look there for torch's streams; and the runtime need not be of torch's version."""
    content = (PACKAGE / "libdien_ops_cuda.so").read_bytes()
    assert b"libtorch_cuda.so" in content and b"libcudart.so" not in content


def test_the_readmes_examples_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 5
    names = {"training_set": [torch.tensor([[3, 7, 3]]), torch.tensor([[7, 0, 0]])]}
    for block in blocks:
        exec(
            block.replace("torch.compile(fast, fullgraph=True)", "fast"), names
        )  # compiled elsewhere, in no compiler's time
    assert names["output"].shape == (128, 50, 36) and names["interest"].shape == (1, 1, 200, 36)
    assert names["pooled"].shape == (128, 36) and names["activation"].num_features == 200
    assert torch.equal(names["unit"].layers[2].weight, names["layers"][2].weight)
    assert names["evolution"].gate == "authors" and names["inputs"]["W"].shape == (108, 36)
    assert names["items"].counts[[0, 3, 7]].tolist() == [0, 1, 2]


class WholeModel(torch.nn.Module):
    """Every module in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = dien_ops.GRU(8, 8, batch_first=True)
        self.attention = dien_ops.BilinearAttention(8, 8)
        self.evolution = dien_ops.AUGRU(8, 8, batch_first=True)
        self.unit = dien_ops.LocalActivationUnit(8, activation="dice")
        self.dice = dien_ops.Dice(16)
        self.auxiliary_loss = dien_ops.AuxiliaryLoss()

    def forward(self, history, targets, sampled, lengths):
        states, _ = self.extractor(history, lengths=lengths)
        scores = self.attention(states, targets, lengths=lengths)
        _, interest = self.evolution(states, scores, lengths=lengths)
        pooled = self.unit(targets, history, lengths=lengths)
        loss = self.auxiliary_loss(states, history, sampled, lengths=lengths)
        return self.dice(torch.cat([interest[0], pooled], dim=-1)).sum() + loss


def test_a_whole_model_compiles_to_one_graph_and_trains_as_uncompiled():
    model = WholeModel()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    compiled = torch.compile(model, fullgraph=True, dynamic=True)  # the default backend: what users run
    for batch, steps in [(5, 7), (6, 9)]:
        history, targets, sampled = torch.randn(batch, steps, 8), torch.randn(batch, 3, 8), torch.randn(batch, steps, 8)
        lengths = torch.arange(batch) * steps // (batch - 1)
        results = []
        for run in (model, compiled):
            model.load_state_dict(start)  # Dice's moving averages move
            loss = run(history, targets, sampled, lengths)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            results.append([loss, *grads, *(x.clone() for x in model.buffers())])
        assert_close(results[1], results[0], 1e-5)  # float32, and the compiler may order sums otherwise
