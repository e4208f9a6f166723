# SPDX-License-Identifier: Apache-2.0
"""Every operator against the reference equations on this machine: ``python -m dien_ops.selftest``.

Run it on new hardware or after a new build; the CUDA kernels are checked on each GPU. It prints one line per operator
and exits with code 1, naming the operators, where a result or a gradient is wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dien_ops import _library, functional, reference

# Allowed error relative to the largest value. The kernels' own error is about 1e-6 and 1e-14 at these sizes.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}

# A check runs an operator of the given module (functional or reference) on fixed arguments.
Check = Callable[[ModuleType, torch.dtype], list[Tensor]]


def _uniform(*shape: int, dtype: torch.dtype, low: float = -1.0) -> Tensor:
    # drawn in float32, so that every precision sees the same numbers
    return torch.empty(shape, dtype=torch.float32).uniform_(low, 1.0).to(dtype).requires_grad_()


def _with_gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights, materialize_grads=True, allow_unused=True)]


def _gru(gate: str | None, reset_after: bool) -> Check:
    batch, targets, steps, features, hidden = 9, 3, 7, 11, 13

    def check(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        x = _uniform(batch, steps, features, dtype=dtype)
        weights = [_uniform(3 * hidden, n, dtype=dtype) for n in (features, hidden)]
        biases = [_uniform(3 * hidden, dtype=dtype) for _ in range(2)]
        lengths = torch.arange(batch) % (steps + 1)
        options = {"reset_after": reset_after, "lengths": lengths, "batch_first": True}
        if gate is None:
            hx = _uniform(batch, hidden, dtype=dtype)
            outputs = module.gru(x, *weights, *biases, hx, **options)
            return _with_gradients(outputs, [x, hx, *weights, *biases])
        a = _uniform(batch, targets, steps, dtype=dtype, low=0.0)
        hx = _uniform(batch, targets, hidden, dtype=dtype)
        outputs = module.attentional_gru(x, a, *weights, *biases, hx, gate=gate, **options)
        return _with_gradients(outputs, [x, a, hx, *weights, *biases])

    return check


def _bilinear_attention(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
    states, target = _uniform(9, 7, 13, dtype=dtype), _uniform(9, 3, 5, dtype=dtype)
    weight = _uniform(13, 5, dtype=dtype)
    scores = module.bilinear_attention(states, target, weight, lengths=torch.arange(9) % 8)
    return _with_gradients((scores,), [states, target, weight])


def _local_activation_unit(activation: str, softmax: bool) -> Check:
    def check(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        dim, sizes = 5, (11, 6)
        query, keys = _uniform(9, 3, dim, dtype=dtype), _uniform(9, 7, dim, dtype=dtype)
        widths = [4 * dim, *sizes, 1]
        weights = [_uniform(n, m, dtype=dtype) for m, n in itertools.pairwise(widths)]
        biases = [_uniform(n, dtype=dtype) for n in widths[1:]]
        alphas = [_uniform(n, dtype=dtype) for n in sizes] if activation != "sigmoid" else []
        outputs = module.local_activation_unit(
            query, keys, weights, biases, activation=activation, alphas=alphas, softmax=softmax,
            lengths=torch.arange(9) % 8, return_scores=True,
        )  # fmt: skip
        return _with_gradients(outputs, [query, keys, *weights, *biases, *alphas])

    return check


def _dice(training: bool) -> Check:
    def check(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        s, alpha, weight, bias = _uniform(9, 7, 13, dtype=dtype), *(_uniform(13, dtype=dtype) for _ in range(3))
        mean, var = torch.zeros(13, dtype=dtype), torch.ones(13, dtype=dtype)
        output = module.dice(s, alpha, mean, var, weight, bias, training=training, lengths=torch.arange(9) % 8)
        return [*_with_gradients((output,), [s, alpha, weight, bias]), mean, var]

    return check


def _auxiliary_loss(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
    tensors = [_uniform(9, 7, 13, dtype=dtype) for _ in range(3)]
    loss = module.auxiliary_loss(*tensors, lengths=torch.arange(9) % 8)
    return _with_gradients((loss,), tensors)


def _mba(name: str, decay: str) -> Check:
    rows, dim = 50, 13

    def check(module: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        weight = _uniform(rows, dim, dtype=dtype).detach()
        per_element, per_row = ([torch.zeros(*shape, dtype=dtype) for _ in range(2)] for shape in ([rows, dim], [rows]))
        step = torch.zeros(rows, dtype=torch.int64)
        states = {
            "mba_sgd_": [],
            "mba_adagrad_": per_element[:1],
            "mba_rowwise_adagrad_": per_row[:1],
            "mba_adam_": [*per_element, step],
        }[name]
        decayed = torch.zeros(rows, dtype=torch.float64)
        for i in range(3):
            ids = torch.randint(rows, (40,))
            grad = _uniform(40, dim, dtype=dtype).detach()
            options: dict[str, Any] = {"counts": torch.arange(rows) + 1}
            if decay == "lazy":
                options = {"decayed": decayed, "log_decay": -0.1 * (i + 1)}
            getattr(module, name)(weight, *states, ids, grad, lr=0.1, l2=0.5, decay=decay, **options)
        return [weight, *(s.to(dtype) for s in states)]

    return check


def checks() -> Iterator[tuple[str, Check]]:
    """The name and the check of every operator and option."""
    for reset_after in (True, False):
        for gate in (None, "paper", "authors", "replace", "input"):
            name = "gru" if gate is None else f"attentional_gru(gate={gate!r})"
            yield f"{name}, reset {'after' if reset_after else 'before'}", _gru(gate, reset_after)
    yield "bilinear_attention", _bilinear_attention
    for activation in ("sigmoid", "prelu", "dice"):
        yield f"local_activation_unit({activation!r})", _local_activation_unit(activation, softmax=False)
    yield "local_activation_unit(softmax=True)", _local_activation_unit("sigmoid", softmax=True)
    yield "dice(training=True)", _dice(True)
    yield "dice(training=False)", _dice(False)
    yield "auxiliary_loss", _auxiliary_loss
    for name in ("mba_sgd_", "mba_adagrad_", "mba_rowwise_adagrad_", "mba_adam_"):
        for decay in ("mini_batch_aware", "decoupled"):
            yield f"{name}(decay={decay!r})", _mba(name, decay)
    yield "mba_sgd_(decay='lazy')", _mba("mba_sgd_", "lazy")


def _gpus() -> list[torch.device]:
    """Those that the CUDA kernels run on."""
    if _library.cuda_problem():
        return []
    devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return [device for device in devices if not _library.gpu_problem(device)]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    settings: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [x.fp32_precision for x in settings]
    try:
        for x in settings:
            x.fp32_precision = "ieee"
        yield
    finally:
        for x, precision in zip(settings, before, strict=True):
            x.fp32_precision = precision


def error_of(check: Check, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference to the float64 reference, relative to the largest value; inf where one is not finite."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), device, _without_tf32():
        torch.manual_seed(0)
        exact = check(reference, torch.float64)
        torch.manual_seed(0)
        actual = check(functional, dtype)
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape or not bool(a.isfinite().all()):
            return float("inf")
        scale = max(1.0, float(e.detach().abs().max()))
        worst = max(worst, float((a.detach().double() - e.detach()).abs().max()) / scale)
    return worst


def main() -> int:
    """Runs all checks; returns the process's exit code."""
    start, failed = time.perf_counter(), []
    print(f"{'operator':<48} {'float32':>9} {'float64':>9}")
    todo = [(name, check, torch.device("cpu")) for name, check in checks()]
    for gpu in _gpus():
        todo += [(f"{name}, on {gpu}", check, gpu) for name, check in checks()]
    for name, check, device in todo:
        errors = {dtype: error_of(check, dtype, device) for dtype in TOLERANCE}
        wrong = [dtype for dtype, error in errors.items() if not error <= TOLERANCE[dtype]]
        print(f"{name:<48} {errors[torch.float32]:9.1e} {errors[torch.float64]:9.1e}  {'WRONG' if wrong else 'ok'}")
        if wrong:
            failed.append(name)
    seconds = time.perf_counter() - start
    if failed:
        print(f"FAILED in {seconds:.1f} s: {'; '.join(failed)}", file=sys.stderr)
        return 1
    print(f"all operators agree with the reference equations ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
