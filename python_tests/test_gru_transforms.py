# SPDX-License-Identifier: Apache-2.0
"""GRU and the attentional cells under torch's transforms: torch.func, torch.compile, export, trace, AOTInductor."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dien_ops
from dien_ops import functional
from gru_cases import DEEP, Case, D, twins
from helpers import assert_close, gradients, leaf, run_python

# --------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    "cell, reset_after",
    [({"gate": "none", "reverse": True}, True), ({"gate": "paper"}, False), ({"gate": "input", "targets": 4}, True)],
)
def test_opcheck(cell, reset_after):
    case = Case(**cell, reset_after=reset_after, batch=2, steps=3)
    case.options["lengths"].fill_(3)  # behind a length the saved gates are not written, and opcheck compares them
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    options = (cell["gate"], reset_after, True, cell.get("reverse", False), False)
    arguments = (*case.tensors, case.options["lengths"])
    torch.library.opcheck(torch.ops.dien_ops.gru.default, (*arguments, *options, True))
    with torch.no_grad():
        output, h_n, gates = torch.ops.dien_ops.gru(*arguments, *options, True)
    grads = (torch.randn_like(output), torch.randn_like(h_n))
    torch.library.opcheck(torch.ops.dien_ops.gru_backward.default, (*grads, *arguments, output, gates, *options))


# ---------------------------------------------------------------------------------------------------------- torch.func


def loss(module: nn.Module):
    return lambda parameters, x: torch.func.functional_call(module, parameters, (x,))[0].square().sum()


def test_torch_func_grad_is_nn_grus(without_cudnn):
    theirs, ours = twins(3, 5, **DEEP)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = torch.randn(4, 2, 3, dtype=D)
    grads = [torch.func.grad(loss(module))(parameters, x) for module in (ours, theirs)]
    assert_close(*(list(g.values()) for g in grads))


def test_torch_func_takes_second_derivatives(without_cudnn):
    theirs, ours = twins(2, 3)
    x = torch.randn(2, 1, 2, dtype=D)
    actual = torch.func.jacrev(torch.func.jacrev(lambda x: ours(x)[0].square().sum()))(x)
    expected = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)
    assert_close([actual], [expected])


def test_forward_mode_is_refused_under_the_compiler_too():
    gru, x = dien_ops.GRU(3, 5, dtype=D), torch.randn(4, 2, 3, dtype=D)
    compiled = torch.compile(lambda x: torch.func.jvp(lambda x: gru(x)[0], (x,), (x,)), backend="eager")
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        compiled(x)
    torch.compiler.reset()  # the compiler gave up and has compiled the functions called on the way one by one


def test_vmap_of_grad_gives_the_gradients_of_each_sample():
    _, ours = twins(3, 5, **DEEP)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    samples = torch.randn(6, 4, 2, 3, dtype=D)
    each = torch.func.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))(parameters, samples)
    alone = [torch.func.grad(loss(ours))(parameters, x) for x in samples]
    for name in parameters:
        assert_close([each[name]], [torch.stack([a[name] for a in alone])])


def test_second_derivatives_go_through_vmap_of_grad():
    _, ours = twins(3, 5)
    parameters = {name: p.detach().requires_grad_() for name, p in ours.named_parameters()}
    samples, grad = leaf(6, 4, 2, 3), torch.func.grad(loss(ours), argnums=(0, 1))
    found = []
    for grads in (
        torch.func.vmap(grad, in_dims=(None, 0))(parameters, samples),
        [grad(parameters, x) for x in samples],
    ):
        total = sum(g.square().sum() for g in torch.utils._pytree.tree_leaves(grads))
        found.append(torch.autograd.grad(total, [samples, *parameters.values()]))
    assert_close(*found)


def test_vmap_runs_an_ensemble_of_modules():
    modules = [dien_ops.GRU(3, 5, **DEEP, dtype=D) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(modules)
    x = torch.randn(4, 2, 3, dtype=D)
    results = torch.func.vmap(lambda p: torch.func.functional_call(modules[0], p, (x,)))(stacked)
    for i, module in enumerate(modules):
        assert_close([r[i] for r in results], module(x))


def test_a_module_under_vmap_is_trained_by_backward():
    gru = dien_ops.GRU(3, 5, dtype=D)
    x = torch.randn(6, 4, 2, 3, dtype=D)
    found = []
    for run in (torch.vmap(lambda x: gru(x)[0]), lambda x: torch.stack([gru(each)[0] for each in x])):
        output = run(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(gru.parameters()))])
    assert_close(*found)


class Calls(TorchDispatchMode):
    """The operators of dien_ops that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dien_ops":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_vmap_over_the_input_is_one_call(grad):
    gru, x = dien_ops.GRU(3, 5), torch.randn(6, 4, 2, 3)
    with torch.set_grad_enabled(grad), Calls() as calls:
        torch.vmap(lambda x: gru(x)[0])(x)
    assert calls.names == ["dien_ops::gru"]


def test_gradients_are_taken_for_a_batch_of_output_gradients():
    gru, x = dien_ops.GRU(3, 5, dtype=D), leaf(4, 2, 3)
    inputs, output = [x, *gru.parameters()], gru(x)[0]
    grads = torch.randn(3, *output.shape, dtype=D)
    together = torch.autograd.grad(output, inputs, grads, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in grads]
    assert_close(together, [torch.stack(same) for same in zip(*each, strict=True)])


MAPPED = ["input", "attention", "hx", "weight_hh", "bias_ih", "lengths"]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("targets", [None, 4], ids=["one_target", "targets"])
@pytest.mark.parametrize("mapped", [["input"], ["attention"], ["hx", "lengths"], ["weight_hh", "input"], MAPPED])
def test_vmap_over_any_of_the_arguments_is_a_loop(mapped, targets, batch_first):
    rows, count = [2] if targets is None else [2, targets], 3
    sizes = {
        "input": [2, 5, 3] if batch_first else [5, 2, 3], "attention": [*rows, 5] if batch_first else [5, *rows],
        "hx": [*rows, 4], "weight_ih": [12, 3], "weight_hh": [12, 4], "bias_ih": [12], "lengths": [2],
    }  # fmt: skip
    arguments, dims = {}, {}
    for name, size in sizes.items():
        dims[name] = len(size) if name in mapped else None  # the last axis
        size = [*size, count] if name in mapped else size
        arguments[name] = torch.randint(0, 6, size) if name == "lengths" else leaf(*size)

    def f(arguments):
        return functional.attentional_gru(**arguments, gate="authors", batch_first=batch_first)

    def select(i):
        return {k: x if dims[k] is None else x.select(dims[k], i) for k, x in arguments.items()}

    found = []
    for run in (
        lambda: torch.vmap(f, in_dims=(dims,))(arguments),
        lambda: [torch.stack(same) for same in zip(*(f(select(i)) for i in range(count)), strict=True)],
    ):
        output, h_n = run()
        leaves = [x for x in arguments.values() if x.requires_grad]
        found.append([output, h_n, *torch.autograd.grad(output.square().sum() + h_n.sum(), leaves)])
        with torch.no_grad():
            assert_close(run(), [output, h_n], 0.0)
    assert_close(*found)


# -------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("gate", ["none", "paper"])
def test_compile_without_a_graph_break_and_with_dynamic_sizes(gate):
    compiled = torch.compile(lambda case: case(), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in [(3, 5), (4, 7), (2, 1)]:
        case = Case(gate, batch=batch, steps=steps)
        expected = case.results(functional)
        outputs = compiled(lambda case=case: case.call(functional))
        assert_close([*outputs, *gradients(outputs, case.tensors)], expected)


@pytest.mark.parametrize("options", [{}, DEEP | {"dropout": 0.5}], ids=["one", "many"])
def test_gru_compiles_to_one_graph_for_all_sizes(options):
    gru = dien_ops.GRU(3, 5, batch_first=True, dtype=D, **options).eval()
    compiled = torch.compile(gru, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in [(3, 5), (4, 7)]:
        x, lengths = leaf(batch, steps, 3), torch.arange(batch) % (steps + 1)
        results = []
        for module in (gru, compiled):
            output, h_n = module(x, lengths=lengths)
            results.append([output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), [x, *gru.parameters()])])
        assert_close(results[1], results[0], 0.0)


def test_a_vmapped_gru_compiles_to_one_graph():
    gru, x = dien_ops.GRU(3, 5, dtype=D), torch.randn(6, 4, 2, 3, dtype=D)
    mapped = torch.vmap(lambda x: gru(x)[0])
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    outputs = [f(x) for f in (compiled, mapped)]
    assert_close(*([y, *torch.autograd.grad(y.sum(), list(gru.parameters()))] for y in outputs))


class Evolution(nn.Module):
    """A GRU and an AUGRU, as in DIEN."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = dien_ops.GRU(3, 5, **DEEP, batch_first=True)
        self.evolution = dien_ops.AUGRU(10, 5, batch_first=True)

    def forward(self, x: Tensor, attention: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.extractor(x, lengths=lengths)
        return self.evolution(states, attention, lengths=lengths)[1]


def evolution_and_inputs(batch: int, steps: int) -> tuple[Evolution, tuple[Tensor, ...]]:
    lengths = torch.arange(batch) % (steps + 1)
    return Evolution(), (torch.randn(batch, steps, 3), torch.rand(batch, steps), lengths)


def exported(module: Evolution, strict: bool = False) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch", min=2, max=4096), 1: torch.export.Dim("steps", min=2, max=4096)}
    _, inputs = evolution_and_inputs(3, 4)
    return torch.export.export(module, inputs, dynamic_shapes=(sizes, sizes, {0: sizes[0]}), strict=strict)


def test_export_with_dynamic_batch_and_time():
    module = dien_ops.AUGRU(3, 5, batch_first=True)
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    exported = torch.export.export(
        module,
        (torch.randn(3, 4, 3), torch.rand(3, 4)),
        kwargs={"lengths": torch.tensor([4, 0, 2])},
        dynamic_shapes={
            "input": {0: batch, 1: steps}, "attention": {0: batch, 1: steps}, "lengths": {0: batch},
        },
    )  # fmt: skip
    x, a, lengths = torch.randn(6, 9, 3), torch.rand(6, 9), torch.tensor([9, 8, 0, 1, 5, 2])
    assert_close(exported.module()(x, a, lengths=lengths), module(x, a, lengths=lengths), 0.0)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_an_exported_graph_saves_nothing_for_backward_and_can_still_be_trained(strict):
    module, inputs = evolution_and_inputs(5, 9)
    program = exported(module, strict)
    saves = [node.args[-1] for node in program.graph.nodes if node.target is torch.ops.dien_ops.gru.default]
    assert saves == [False] * 5
    found = []
    for run in (program.module(), module):
        h_n = run(*inputs)
        found.append([h_n, *torch.autograd.grad(h_n.square().sum(), list(module.parameters()))])
    assert_close(*found, 0.0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of sizes become constants
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_a_traced_module_is_saved_loaded_and_trained_with_other_sizes():
    module, inputs = evolution_and_inputs(3, 4)
    traced, file = torch.jit.trace(module, inputs), io.BytesIO()  # which compares two traces and their results
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    _, inputs = evolution_and_inputs(5, 9)
    found = []
    for run in (loaded, module):
        h_n = run(*inputs)
        found.append([h_n, *torch.autograd.grad(h_n.square().sum(), list(run.parameters()))])
    assert_close(*found, 0.0)


@pytest.mark.cpu_kernels
def test_an_aot_inductor_package_runs_in_a_process_of_its_own(tmp_path):
    module, inputs = evolution_and_inputs(5, 9)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(module), package_path=str(tmp_path / "evolution.pt2"))
        torch.save((inputs, module(*inputs)), tmp_path / "expected.pt")
    done = run_python(
        "import torch, dien_ops\n"
        "import torch._inductor.codecache\n"  # torch 2.10 does not find it otherwise
        "run = torch._inductor.aoti_load_package('evolution.pt2')\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "print(torch.equal(run(*inputs), expected))\n",
        cwd=str(tmp_path),
        PYTHONPATH=str(Path(dien_ops.__file__).parents[1]),
    )
    assert done.stdout.strip() == "True", done.stderr
