# SPDX-License-Identifier: Apache-2.0
"""The local activation unit of DIN (eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dien_ops import _checks, _precision, reference
from dien_ops._autograd import backward_of_backward
from dien_ops.dice import Dice, check_average, check_options, update_running_statistics

ACTIVATIONS = ("sigmoid", "prelu", "dice")
DICE_OPTIONS = ("eps", "momentum", "variance_eps")  # of Dice: the unit has one of each for all its layers

# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.register_fake("dien_ops::local_activation_unit")
def _fake(
    query: Tensor,
    keys: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    alphas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    lengths: Tensor | None,
    activation: str,
    eps: float,
    variance_eps: float,
    softmax: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = _checks.compute_dtype(keys.dtype)
    rows = query.shape[0] * query.shape[1] * keys.shape[1]
    sizes = [weight.shape[0] for weight in weights[:-1]]
    kept = rows * sum(_padded(size, compute) for size in sizes) if activation == "dice" and not running_means else 0
    scores = keys.new_empty(query.shape[0], query.shape[1], keys.shape[1])
    statistics, hidden = (keys.new_empty(size, dtype=compute) for size in ((2, sum(sizes)), (kept,)))
    return keys.new_empty(query.shape), scores, statistics, hidden


def _padded(size: int, dtype: torch.dtype) -> int:
    """Rows of hidden values are padded to whole 64 bytes (csrc/common/activation_unit.h)."""
    step = 64 // dtype.itemsize
    return (size + step - 1) // step * step


@torch.library.register_fake("dien_ops::local_activation_unit_backward")
def _backward_fake(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    query: Tensor,
    keys: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    alphas: list[Tensor],
    *_: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    parameters = [[x.new_empty(x.shape) for x in tensors] for tensors in (weights, biases, alphas)]
    return query.new_empty(query.shape), keys.new_empty(keys.shape), *parameters  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, weights, biases, alphas, running_means, _, lengths, activation, *options = inputs
    _, scores, statistics, hidden = output
    batch_statistics = activation == "dice" and not running_means
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, hidden)
    ctx.save_for_backward(query, keys, *weights, *biases, *alphas, statistics, hidden, scores, lengths)
    ctx.counts, ctx.averages = (len(weights), len(biases), len(alphas)), len(running_means)
    ctx.options = (activation, batch_statistics, *options)


def _split(tensors: Sequence[Any], counts: Sequence[int]) -> tuple[list[list[Any]], Sequence[Any]]:
    """The first tensors as lists of the given lengths, and the rest."""
    lists = []
    for count in counts:
        lists.append(list(tensors[:count]))
        tensors = tensors[count:]
    return lists, tensors


def _backward(ctx: Any, grad_pooled: Tensor | None, grad_scores: Tensor | None, *_: None) -> tuple[Any, ...]:
    query, keys, *tensors = ctx.saved_tensors
    parameters, (statistics, hidden, scores, lengths) = _split(tensors, ctx.counts)
    grads = torch.ops.dien_ops.local_activation_unit_backward(
        grad_pooled, grad_scores, query, keys, *parameters, statistics, hidden, scores, lengths, *ctx.options
    )
    averages = [None] * ctx.averages
    return (*grads, averages, averages, *[None] * 6)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    grad_pooled, grad_scores, query, keys, weights, biases, alphas, statistics, _, _, lengths, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_pooled, grad_scores, query, keys, *weights, *biases, *alphas, statistics, lengths)
    ctx.counts, ctx.options = (len(weights), len(biases), len(alphas)), options


def _double_backward(
    ctx: Any,
    for_query: Tensor | None,
    for_keys: Tensor | None,
    for_weights: list[Tensor | None],
    for_biases: list[Tensor | None],
    for_alphas: list[Tensor | None],
) -> tuple[Any, ...]:
    grad_pooled, grad_scores, *primals, statistics, lengths = ctx.saved_tensors
    activation, batch_statistics, eps, variance_eps, softmax, _ = ctx.options
    averages: list[Sequence[Tensor]] = [(), ()]
    if activation == "dice" and not batch_statistics:
        sizes = [weight.shape[0] for weight in primals[2 : 1 + ctx.counts[0]]]
        averages = [row.split(sizes) for row in statistics]

    def equations(query: Tensor, keys: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        (weights, biases, alphas), _ = _split(parameters, ctx.counts)
        pooled, scores = reference.local_activation_unit(
            query, keys, weights, biases, activation=activation, alphas=alphas,
            running_means=averages[0], running_vars=averages[1], training=batch_statistics,
            eps=eps, variance_eps=variance_eps, softmax=softmax, lengths=lengths, return_scores=True,
        )  # fmt: skip
        return pooled, scores

    grad_grads = [for_query, for_keys, *for_weights, *for_biases, *for_alphas]
    (for_pooled, for_scores), found = backward_of_backward(equations, primals, [grad_pooled, grad_scores], grad_grads)
    parameters, _ = _split(found[2:], ctx.counts)
    return (for_pooled, for_scores, *found[:2], *parameters, *[None] * 10)


torch.library.register_autograd("dien_ops::local_activation_unit", _backward, setup_context=_save_for_backward)
torch.library.register_autograd(
    "dien_ops::local_activation_unit_backward", _double_backward, setup_context=_save_for_double_backward
)

# --------------------------------------------------------------------------------------------------------- functional


def local_activation_unit(
    query: Tensor,
    keys: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "sigmoid",
    alphas: Sequence[Tensor] = (),
    running_means: Sequence[Tensor] = (),
    running_vars: Sequence[Tensor] = (),
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-8,
    variance_eps: float = 0.0,
    scale: float = 1.0,
    softmax: bool = False,
    lengths: Tensor | None = None,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""What a user's history amounts to in view of a target (DIN eq. 3).

    .. math::
        v_U = \sum_t a(e_t, v_A) \, e_t

    where a is a network over ``[q, k, q - k, q * k]`` with the query :math:`q = v_A` and the keys :math:`k = e_t`.
    That input is never built: nothing of size ``[B, T, 4D]`` is written. Padding has score 0 and is in no sum and no
    statistic; an empty history gives zeros.

    Args:
        query: ``[B, D]``, or ``[B, C, D]`` for C targets per sequence; float32, float64, bfloat16 or float16, as the
            keys. Under ``torch.autocast`` both are cast to its dtype. Any strides.
        keys: ``[B, T, D]``.
        weights: one of each layer as in :class:`torch.nn.Linear`: ``[H1, 4D]``, ``[H2, H1]``, ..., ``[1, HL]``. The
            first one's columns are those of q, k, q - k and q * k. All parameters have the dtype of the keys or, with
            16-bit keys, float32: their products' sums, the hidden values and the statistics are float32 then in any
            case. On CUDA, float32 is multiplied as tf32 where nn.Linear's is, see
            ``torch.backends.cuda.matmul.fp32_precision``.
        biases: ``[H1]``, ``[H2]``, ..., ``[1]``.
        activation: of the hidden layers: ``"sigmoid"`` (the released code), ``"prelu"`` or ``"dice"`` (the paper).
        alphas: ``[H1]``, ..., ``[HL]`` for ``"prelu"`` and ``"dice"``, none for ``"sigmoid"``.
        running_means, running_vars: ``[H1]``, ..., ``[HL]``, Dice's moving averages; see
            :func:`dien_ops.functional.dice`, also for training, momentum, eps and variance_eps. Needed with
            ``training=False``.
        training: only Dice knows the difference.
        scale: is multiplied into the scores, before the softmax where there is one.
        softmax: normalise the scores over the valid steps (the released code); the paper does not.
        lengths: ``[B]`` int32 or int64, each in 0..T. On CUDA one outside of that is a device-side assertion, which
            names it and ends the process's use of the GPU.
        return_scores: also return the scores.

    Returns:
        pooled ``[B, D]``, or ``[B, C, D]`` for C targets; with ``return_scores`` also the scores ``[B, T]`` or
        ``[B, C, T]``. Both are differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank, dtype, name or number of tensors;
            size, device or value. After an error the moving averages are as they were.

    Example:
        >>> q, k = torch.randn(8, 18), torch.randn(8, 50, 18)
        >>> layers = [torch.nn.Linear(72, 80), torch.nn.Linear(80, 1)]
        >>> weights, biases = [x.weight for x in layers], [x.bias for x in layers]
        >>> dien_ops.functional.local_activation_unit(q, k, weights, biases).shape
        torch.Size([8, 18])
    """
    _checks.tensor("keys", keys)
    query, keys = _precision.cast(_precision.autocast_dtype(keys), query, keys)
    _check_arguments(query, keys, weights, biases, activation, alphas, running_means, running_vars, lengths, training)
    check_options(momentum, eps, variance_eps)
    _checks.number("scale", scale)
    _checks.boolean("softmax", softmax)
    dice = activation == "dice"
    if dice and not training and not running_means and len(weights) > 1:
        raise ValueError("running_means and running_vars are needed where training=False, got none")
    compute = _checks.compute_dtype(keys.dtype)
    weights, biases, alphas = (_precision.in_dtype(compute, tensors) for tensors in (weights, biases, alphas))
    used = ((), ()) if training or not dice else (running_means, running_vars)
    averages = [_precision.in_dtype(compute, tensors) for tensors in used]
    if scale != 1.0:  # the output layer is linear, and its parameters are the smaller side
        weights[-1], biases[-1] = scale * weights[-1], scale * biases[-1]
    several = query.dim() == 3
    queries = query if several else query.unsqueeze(1)
    pooled, scores, statistics, _ = torch.ops.dien_ops.local_activation_unit(
        queries,
        keys,
        weights,
        biases,
        alphas,
        *averages,
        lengths,
        activation,
        eps,
        variance_eps,
        softmax,
        _precision.allow_tf32(keys, "matmul"),
    )
    if dice and training and running_means:
        steps = lengths.sum() if lengths is not None else torch.full((), keys.shape[:2].numel(), device=keys.device)
        sizes = [weight.shape[0] for weight in weights[:-1]]
        means, variances = (row.split(sizes) for row in statistics)
        for running_mean, running_var, mean, var in zip(running_means, running_vars, means, variances, strict=True):
            update_running_statistics(running_mean, running_var, mean, var, steps * queries.shape[1], momentum)
    if not several:
        pooled, scores = pooled.squeeze(1), scores.squeeze(1)
    return (pooled, scores) if return_scores else pooled


def _check_arguments(
    query: Tensor,
    keys: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    alphas: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    lengths: Tensor | None,
    training: bool,
) -> None:
    _checks.one_of("activation", activation, ACTIVATIONS)
    _checks.supported("keys", keys)
    _checks.rank("keys", keys, 3)
    _checks.tensor("query", query)
    _checks.matches("keys", keys, query=query)
    _checks.rank("query", query, 2, 3)
    batch, _, features = keys.shape
    several = query.dim() == 3
    expected = [batch, query.shape[1], features] if several else [batch, features]
    _checks.shape("query", query, expected, "[B, C, D]" if several else "[B, D]")
    for name, tensors in (
        ("weights", weights), ("biases", biases), ("alphas", alphas),
        ("running_means", running_means), ("running_vars", running_vars),
    ):  # fmt: skip
        _checks.tensors(name, tensors)
    if len(weights) == 0:
        raise ValueError("weights must have at least one tensor, that of the output layer, got none")
    hidden = len(weights) - 1
    averages = hidden if len(running_means) > 0 else 0
    numbers = {
        "biases": (biases, hidden + 1),
        "alphas": (alphas, 0 if activation == "sigmoid" else hidden),
        "running_means": (running_means, averages if activation == "dice" else 0),
        "running_vars": (running_vars, averages if activation == "dice" else 0),
    }
    for name, (tensors, number) in numbers.items():
        if len(tensors) != number:
            raise ValueError(
                f"{name} must have {number} tensors with {len(weights)} weights and activation={activation!r}, "
                f"got {len(tensors)}"
            )
    inputs = 4 * features
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _checks.tensor(f"weights[{i}]", weight)
        _checks.tensor(f"biases[{i}]", bias)
        _checks.rank(f"weights[{i}]", weight, 2)
        outputs = weight.shape[0] if i < hidden else 1
        _checks.shape(f"weights[{i}]", weight, [outputs, inputs], "[outputs, inputs]")
        _checks.shape(f"biases[{i}]", bias, [outputs], "[outputs]")
        _checks.parameters("keys", keys, **{f"weights[{i}]": weight, f"biases[{i}]": bias})
        if i < hidden and len(alphas) > 0:
            _checks.tensor(f"alphas[{i}]", alphas[i])
            _checks.shape(f"alphas[{i}]", alphas[i], [outputs], "[outputs]")
            _checks.parameters("keys", keys, **{f"alphas[{i}]": alphas[i]})
        if i < averages:
            for name, average in (("running_means", running_means[i]), ("running_vars", running_vars[i])):
                check_average(f"{name}[{i}]", average, "keys", keys, outputs, training)
        inputs = outputs
    _checks.lengths(lengths, batch, keys.device)


# ------------------------------------------------------------------------------------------------------------ modules


class LocalActivationUnit(nn.Module):
    """:func:`dien_ops.functional.local_activation_unit` (DIN eq. 3) with its parameters.

    ``layers`` holds one :class:`torch.nn.Linear` per layer, so that weights of a composed model load as they are; the
    first one takes ``[q, k, q - k, q * k]``. ``activations`` holds one :class:`torch.nn.Sigmoid`,
    :class:`torch.nn.PReLU` or :class:`dien_ops.Dice` per hidden layer. Their parameters may change, not their kind;
    several Dice share their eps, momentum and variance_eps. One Dice in evaluation mode puts all of the unit's in it:
    they take the moving averages for the statistics, and leave them as they are.

    The defaults are the released code's network, 80-40-1 with sigmoids, without its softmax, as in the paper.

    Args:
        embedding_dim: D >= 1, the size of the query and of each key.
        hidden_sizes: of the hidden layers, any number of them, each >= 1.
        activation: ``"sigmoid"``, ``"prelu"`` or ``"dice"``.
        softmax: normalise the scores over the valid steps; the paper does not.
        device, dtype: of the parameters.
        scale: is multiplied into the scores, before the softmax where there is one: ``D ** -0.5`` in some
            implementations.
        query_size: where given, the query has this size A, and first passes ``query_projection``, a
            :class:`torch.nn.Linear` to D and a :class:`torch.nn.PReLU` that starts at 0.1, as in the released code of
            DIEN.

    Shapes: query [B, D] or [B, C, D] (with query_size [B, A] or [B, C, A]), keys [B, T, D], lengths [B]; pooled [B, D]
    or [B, C, D]; scores, where return_scores is set, [B, T] or [B, C, T].

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank or dtype; size, device or value.
        ValueError: a submodule was replaced by one that the unit does not compute.

    Example:
        >>> unit = dien_ops.LocalActivationUnit(36)
        >>> pooled = unit(torch.randn(8, 36), torch.randn(8, 50, 36), lengths=torch.randint(0, 51, (8,)))
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_sizes: Sequence[int] = (80, 40),
        activation: str = "sigmoid",
        softmax: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        query_size: int | None = None,
    ) -> None:
        super().__init__()
        _checks.one_of("activation", activation, ACTIVATIONS)
        _checks.number("scale", scale)
        _checks.boolean("softmax", softmax)
        _checks.size("embedding_dim", embedding_dim)
        if not isinstance(hidden_sizes, Sequence):
            raise TypeError(f"hidden_sizes must be a sequence of ints, got {type(hidden_sizes).__name__}")
        for i, size in enumerate(hidden_sizes):
            _checks.size(f"hidden_sizes[{i}]", size)
        self.embedding_dim, self.hidden_sizes = embedding_dim, tuple(hidden_sizes)
        self.activation, self.softmax, self.scale, self.query_size = activation, softmax, scale, query_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = [4 * embedding_dim, *hidden_sizes, 1]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, **factory) for inputs, outputs in pairwise(sizes))
        modules: dict[str, Callable[[int], nn.Module]] = {
            "sigmoid": lambda _: nn.Sigmoid(),
            "prelu": lambda size: nn.PReLU(size, **factory),
            "dice": lambda size: Dice(size, **factory),
        }
        self.activations = nn.ModuleList(modules[activation](size) for size in hidden_sizes)
        self.query_projection: nn.Sequential | None = None
        if query_size is not None:
            _checks.size("query_size", query_size)
            self.query_projection = nn.Sequential(
                nn.Linear(query_size, embedding_dim, **factory), nn.PReLU(embedding_dim, init=0.1, **factory)
            )

    def forward(
        self, query: Tensor, keys: Tensor, *, lengths: Tensor | None = None, return_scores: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args: query ``[B, D]`` or ``[B, C, D]`` (A in the place of D with query_size), keys ``[B, T, D]``, lengths
        ``[B]``. Returns pooled ``[B, D]`` or ``[B, C, D]``, and where asked for the scores ``[B, T]`` or
        ``[B, C, T]``."""
        self._check_submodules()
        if self.query_projection is not None:
            query = self._project(query)
        layers = [x for x in self.layers if isinstance(x, nn.Linear)]
        prelus = [x for x in self.activations if isinstance(x, nn.PReLU)]
        dices = [x for x in self.activations if isinstance(x, Dice)]
        options = {name: getattr(dices[0], name) for name in DICE_OPTIONS} if dices else {}
        training = self.training and all(x.training for x in dices)
        result = local_activation_unit(
            query,
            keys,
            [x.weight for x in layers],
            [x.bias for x in layers],
            activation=self.activation,
            alphas=[x.weight for x in prelus] + [x.alpha for x in dices],
            running_means=[x.running_mean for x in dices if x.running_mean is not None],
            running_vars=[x.running_var for x in dices if x.running_var is not None],
            training=training,
            softmax=self.softmax,
            scale=self.scale,
            lengths=lengths,
            return_scores=return_scores,
            **options,
        )
        if training:
            for x in dices:
                if x.num_batches_tracked is not None:
                    x.num_batches_tracked.add_(1)
        return result

    def _project(self, query: Tensor) -> Tensor:
        assert self.query_projection is not None and self.query_size is not None
        _checks.tensor("query", query)
        _checks.rank("query", query, 2, 3)
        meaning = "[B, A]" if query.dim() == 2 else "[B, C, A]"
        _checks.shape("query", query, [*query.shape[:-1], self.query_size], meaning)
        rows = query.flatten(0, -2)  # PReLU takes the second axis for the channels
        if _precision.autocast_dtype(query) is not None:
            projected: Tensor = self.query_projection(rows)
        else:
            weight = self.query_projection[0].weight
            assert isinstance(weight, Tensor)
            _checks.parameters("query", query, **{"query_projection[0].weight": weight})
            projected = self.query_projection(rows.to(weight.dtype)).to(query.dtype)
        result: Tensor = projected.unflatten(0, query.shape[:-1])
        return result

    def _check_submodules(self) -> None:
        """The unit reads its submodules' parameters and calls none of them: it must be what they would compute."""
        hidden = len(self.hidden_sizes)
        kind = {"sigmoid": nn.Sigmoid, "prelu": nn.PReLU, "dice": Dice}[self.activation]
        for name, modules, number, expected in (
            ("layers", self.layers, hidden + 1, nn.Linear), ("activations", self.activations, hidden, kind),
        ):  # fmt: skip
            if len(modules) != number:
                raise ValueError(f"{name} must have {number} modules, got {len(modules)}")
            for i, module in enumerate(modules):
                if not isinstance(module, expected):
                    raise ValueError(
                        f"{name}[{i}] must be a {expected.__name__} with activation={self.activation!r}, "
                        f"got {type(module).__name__}"
                    )
        dices = [x for x in self.activations if isinstance(x, Dice)]
        for i, dice in enumerate(dices):
            for name in DICE_OPTIONS:
                expected, got = getattr(dices[0], name), getattr(dice, name)
                if got != expected:
                    raise ValueError(f"activations[{i}] must have the {name} of activations[0], {expected}, got {got}")
            if not dice.track_running_stats:
                raise ValueError(f"activations[{i}] must be a Dice with track_running_stats=True")
            if dice.affine:
                raise ValueError(
                    f"activations[{i}] must be a Dice with affine=False: the unit's has no weight and bias"
                )

    def extra_repr(self) -> str:
        more = f", scale={self.scale}" if self.scale != 1.0 else ""
        more += f", query_size={self.query_size}" if self.query_size is not None else ""
        return (
            f"{self.embedding_dim}, hidden_sizes={self.hidden_sizes}, activation={self.activation!r}, "
            f"softmax={self.softmax}{more}"
        )
