# SPDX-License-Identifier: Apache-2.0
"""The papers' equations in plain, differentiable PyTorch: the executable specification.

Every function has the name and the signature of its counterpart in :mod:`dien_ops.functional` and is written to be
read next to the paper, one line per equation. The kernels are tested against this module in float64, and double
backward goes through it. It loops over time in Python and is slow; nothing here calls a kernel of this package.

DIN: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
DIEN: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _valid_steps(lengths: Tensor | None, batch: int, steps: int, device: torch.device) -> Tensor:
    """[B, T] booleans: which steps of each row hold data."""
    if lengths is None:
        return torch.ones(batch, steps, dtype=torch.bool, device=device)
    return torch.arange(steps, device=device) < lengths.unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------------- gru


def _reverse_within_length(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses x [B, T, ...] in time; the padding behind each row's length stays where it is."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.size(1), device=x.device)
    last = lengths.unsqueeze(1) - 1
    index = torch.where(steps <= last, last - steps, steps)
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def _recurrence(
    input: Tensor,  # [B, T, I]
    attention: Tensor | None,  # [B, C, T]
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: Tensor,  # [B, C, H]
    valid: Tensor,  # [B, T]
    gate: str,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:  # [B, C, T, H], [B, C, H]
    hidden = weight_hh.size(1)
    projected = F.linear(input, weight_ih).unsqueeze(1)  # [B, 1, T, 3H]: once per sequence, not per target
    if gate == "input":
        assert attention is not None
        projected = attention.unsqueeze(-1) * projected  # DIEN eq. 9: W (a x) = a (W x)
    if bias_ih is not None:
        projected = projected + bias_ih
    weight_rz, weight_n = weight_hh.split([2 * hidden, hidden])
    bias_rz, bias_n = bias_hh.split([2 * hidden, hidden]) if bias_hh is not None else (0.0, 0.0)

    outputs = []
    for t in range(input.size(1)):
        x_r, x_z, x_n = projected[:, :, t].chunk(3, dim=-1)
        h_r, h_z = (F.linear(state, weight_rz) + bias_rz).chunk(2, dim=-1)
        r = torch.sigmoid(x_r + h_r)  # DIEN eq. 3
        z = torch.sigmoid(x_z + h_z)  # DIEN eq. 2: z keeps, the paper's update gate is u = 1 - z
        if reset_after:
            n = torch.tanh(x_n + r * (F.linear(state, weight_n) + bias_n))  # DIEN eq. 4
        else:
            n = torch.tanh(x_n + F.linear(r * state, weight_n) + bias_n)
        a = attention[:, :, t].unsqueeze(-1) if attention is not None else None
        keep = _keep(gate, z, a)
        new_state = keep * state + (1 - keep) * n  # DIEN eq. 5
        running = valid[:, t].view(-1, 1, 1)
        state = torch.where(running, new_state, state)
        outputs.append(torch.where(running, new_state, torch.zeros((), dtype=state.dtype, device=state.device)))
    if outputs:
        return torch.stack(outputs, dim=2), state
    return state.new_zeros(*state.shape[:2], 0, hidden), state


def _keep(gate: str, z: Tensor, a: Tensor | None) -> Tensor:
    """The weight of the old state in h' = keep h + (1 - keep) n."""
    if gate in ("none", "input"):
        return z
    assert a is not None
    if gate == "replace":  # DIEN eq. 10
        return (1 - a).expand_as(z)
    if gate == "paper":  # DIEN eq. 11-12: the update gate 1 - z is scaled
        return 1 - a * (1 - z)
    if gate == "authors":  # the released code, oneDNN and OpenVINO: the keep gate is scaled
        return (1 - a) * z
    raise ValueError(f'gate must be one of "paper", "authors", "replace", "input", got {gate!r}')


def gru(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    """One layer, one direction of a GRU (DIEN eq. 2-5); see :func:`dien_ops.functional.gru`."""
    x = input if batch_first else input.transpose(0, 1)
    if reverse:
        x = _reverse_within_length(x, lengths)
    batch, steps = x.shape[:2]
    state = x.new_zeros(batch, weight_hh.size(1)) if hx is None else hx
    valid = _valid_steps(lengths, batch, steps, x.device)
    output, h_n = _recurrence(
        x, None, weight_ih, weight_hh, bias_ih, bias_hh, state.unsqueeze(1), valid, "none", reset_after
    )
    output = output.squeeze(1)
    if reverse:
        output = _reverse_within_length(output, lengths)
    return output if batch_first else output.transpose(0, 1), h_n.squeeze(1)


def attentional_gru(
    input: Tensor,
    attention: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    gate: str = "paper",
    reset_after: bool = True,
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """AIGRU, AGRU and AUGRU (DIEN eq. 9-12); see :func:`dien_ops.functional.attentional_gru`."""
    several = attention.dim() == 3
    x = input if batch_first else input.transpose(0, 1)
    scores = attention if batch_first else attention.movedim(0, -1)
    if not several:
        scores = scores.unsqueeze(1)
    batch, steps = x.shape[:2]
    if hx is None:
        state = x.new_zeros(batch, scores.size(1), weight_hh.size(1))
    else:
        state = hx if several else hx.unsqueeze(1)
    valid = _valid_steps(lengths, batch, steps, x.device)
    output, h_n = _recurrence(x, scores, weight_ih, weight_hh, bias_ih, bias_hh, state, valid, gate, reset_after)
    if not several:
        output, h_n = output.squeeze(1), h_n.squeeze(1)
    return output if batch_first else output.movedim(-2, 0), h_n


# ---------------------------------------------------------------------------------------------------------- attention


def _masked_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the valid last-axis entries; the others, and rows that have none, are exactly 0."""
    filled = logits.masked_fill(~valid, -torch.inf)
    scores = torch.softmax(torch.where(valid.any(-1, keepdim=True), filled, 0.0), dim=-1)
    return torch.where(valid, scores, 0.0)


def bilinear_attention(states: Tensor, target: Tensor, weight: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """a_t = softmax_t(h_t W e_a) (DIEN eq. 8); see :func:`dien_ops.functional.bilinear_attention`."""
    targets = target if target.dim() == 3 else target.unsqueeze(1)
    logits = torch.einsum("bth,ha,bca->bct", states, weight.to(states.dtype), targets)
    valid = _valid_steps(lengths, states.size(0), states.size(1), states.device).unsqueeze(1)
    scores = _masked_softmax(logits, valid.expand_as(logits))
    return scores if target.dim() == 3 else scores.squeeze(1)


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
    """v_U = sum_t a(e_t, v_A) e_t (DIN eq. 3); see :func:`dien_ops.functional.local_activation_unit`."""
    queries = query if query.dim() == 3 else query.unsqueeze(1)
    batch, targets, steps = queries.size(0), queries.size(1), keys.size(1)
    q, k = torch.broadcast_tensors(queries.unsqueeze(2), keys.unsqueeze(1))  # [B, C, T, D]
    hidden = torch.cat([q, k, q - k, q * k], dim=-1)
    valid = _valid_steps(lengths, batch, steps, keys.device).unsqueeze(1).expand(batch, targets, steps)
    for layer, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        hidden = F.linear(hidden, weight, bias)
        if activation == "sigmoid":
            hidden = torch.sigmoid(hidden)
        elif activation == "prelu":
            hidden = torch.where(hidden > 0, hidden, alphas[layer] * hidden)
        elif activation == "dice":
            hidden = _dice(
                hidden,
                valid,
                alphas[layer],
                running_means[layer] if running_means else None,
                running_vars[layer] if running_vars else None,
                None,
                None,
                training,
                momentum,
                eps,
                variance_eps,
            )
        else:
            raise ValueError(f'activation must be one of "sigmoid", "prelu", "dice", got {activation!r}')
    logits = scale * F.linear(hidden, weights[-1], biases[-1]).squeeze(-1)
    scores = _masked_softmax(logits, valid) if softmax else torch.where(valid, logits, 0.0)
    pooled = torch.einsum("bct,btd->bcd", scores, keys)
    if query.dim() == 2:
        pooled, scores = pooled.squeeze(1), scores.squeeze(1)
    return (pooled, scores) if return_scores else pooled


# --------------------------------------------------------------------------------------------------------------- dice


def _dice(
    s: Tensor,  # [..., C]
    valid: Tensor,  # [...]
    alpha: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    variance_eps: float,
) -> Tensor:
    mask = valid.unsqueeze(-1)
    if training:
        count = valid.sum().clamp(min=1).to(s.dtype)
        axes = tuple(range(s.dim() - 1))
        mean = torch.where(mask, s, 0.0).sum(axes) / count
        var = torch.where(mask, s - mean, 0.0).square().sum(axes) / count
        if running_mean is not None and running_var is not None and bool(valid.any()):
            with torch.no_grad():  # as F.batch_norm: the moving variance is the unbiased one
                unbiased = var * (count / (count - 1).clamp(min=1))
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var are needed where training=False, got None")
        mean, var = running_mean.to(s.dtype), running_var.to(s.dtype)
    var = var + variance_eps
    spread = torch.where(var > 0, torch.where(var > 0, var, 1.0).sqrt(), 0.0)  # sqrt with derivative 0 at 0
    normalized = (s - mean) / (spread + eps)
    if weight is not None:
        normalized = normalized * weight
    if bias is not None:
        normalized = normalized + bias
    p = torch.sigmoid(normalized)  # DIN eq. 9
    return torch.where(mask, p * s + (1 - p) * alpha * s, 0.0)


def dice(
    input: Tensor,
    alpha: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-8,
    variance_eps: float = 0.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """f(s) = p(s) s + (1 - p(s)) alpha s (DIN eq. 9); see :func:`dien_ops.functional.dice`."""
    if lengths is None:
        valid = torch.ones(input.shape[:-1], dtype=torch.bool, device=input.device)
    else:
        valid = _valid_steps(lengths, input.size(0), input.size(1), input.device)
    return _dice(input, valid, alpha, running_mean, running_var, weight, bias, training, momentum, eps, variance_eps)


# ----------------------------------------------------------------------------------------------------- auxiliary loss


def auxiliary_loss(
    states: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    lengths: Tensor | None = None,
    scorer: str | Callable[[Tensor, Tensor], Tensor] = "inner",
    reduction: str = "paper",
) -> Tensor:
    """L_aux of DIEN eq. 6 over whole sequences; see :func:`dien_ops.functional.auxiliary_loss`."""
    if callable(scorer):
        h, e, e_hat = states[:, :-1], positives[:, 1:], negatives[:, 1:]
        logits = torch.stack([scorer(h, e), scorer(h, e_hat)], dim=1)
    else:
        logits = _auxiliary_logits(states, positives, negatives, lengths)
    return _loss_of_logits(logits, lengths, states.size(1), reduction)


def _auxiliary_logits(
    states: Tensor, positives: Tensor, negatives: Tensor, lengths: Tensor | None
) -> Tensor:  # [B, 2, T - 1]: of the clicked and of the sampled items; 0 in padding
    h, e, e_hat = states[:, :-1], positives[:, 1:], negatives[:, 1:]
    logits = torch.stack([(h * e).sum(-1), (h * e_hat).sum(-1)], dim=1)
    valid = _valid_steps(lengths, states.size(0), states.size(1), states.device)[:, 1:]
    return torch.where(valid.unsqueeze(1), logits, 0.0)


def _loss_of_logits(logits: Tensor, lengths: Tensor | None, steps: int, reduction: str) -> Tensor:
    batch = logits.size(0)
    clicked, sampled = logits.unbind(1)
    # -log sigma(x) = softplus(-x) and -log(1 - sigma(x)) = softplus(x): never log(0)
    losses = F.softplus(-clicked) + F.softplus(sampled)
    valid = _valid_steps(lengths, batch, steps, logits.device)[:, 1:]
    total = torch.where(valid, losses, 0.0).sum()
    if reduction == "paper":
        return total / max(batch, 1)
    if reduction == "mean":
        return total / valid.sum().clamp(min=1)
    if reduction == "authors":
        return total / max(batch * (steps - 1), 1)
    raise ValueError(f'reduction must be one of "paper", "mean", "authors", got {reduction!r}')


# ---------------------------------------------------------------------------------------------------------- embedding


def _mini_batch_rows(
    weight: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    lr: float,
    l2: float,
    counts: Tensor | None,
    padding_idx: int | None,
    decay: str,
    grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of the mini-batch, each once, with w_j and g_j of each, the decay being part of the one or of the other:
    the rule then takes a step from w_j along g_j."""
    if ids is None:  # of a sparse gradient
        ids, grad = grad._indices()[0], grad._values()
    ids, grad = ids.flatten(), grad.reshape(-1, weight.size(1))
    if padding_idx is not None:
        kept = ids != padding_idx % weight.size(0)
        ids, grad = ids[kept], grad[kept]
    rows, inverse = torch.unique(ids, return_inverse=True)
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight[rows].to(wide)
    g = w.new_zeros(w.shape).index_add_(0, inverse, grad.to(wide))
    if grad_scale is not None:
        g = g / grad_scale
    n = 1.0 if counts is None or decay == "difacto" else counts[rows].to(wide).unsqueeze(1)
    if decay in ("mini_batch_aware", "difacto"):  # DIN eq. 7
        g = g + l2 / n * w
    elif decay == "decoupled":
        w = w - lr * l2 / n * w
    elif decay != "lazy":
        raise ValueError(f'decay must be "mini_batch_aware", "decoupled", "difacto" or "lazy", got {decay!r}')
    return rows, w, g


@torch.no_grad()
def mba_sgd_(
    weight: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    decay: str = "mini_batch_aware",
    decayed: Tensor | None = None,
    log_decay: float | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """SGD on the mini-batch's rows (DIN eq. 7); see :func:`dien_ops.functional.mba_sgd_`."""
    rows, w, g = _mini_batch_rows(weight, ids, grad, lr, l2, counts, padding_idx, decay, grad_scale)
    if decay == "lazy":
        assert decayed is not None and log_decay is not None
        w = (log_decay - decayed[rows]).exp().to(w.dtype).unsqueeze(1) * w
        decayed[rows] = log_decay
    if momentum_buffer is not None:
        g = momentum * momentum_buffer[rows] + g
        momentum_buffer[rows] = g
    weight[rows] = (w - lr * g).to(weight.dtype)


@torch.no_grad()
def mba_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
    decay: str = "mini_batch_aware",
    grad_scale: Tensor | None = None,
) -> None:
    """Adagrad on the mini-batch's rows; see :func:`dien_ops.functional.mba_adagrad_`."""
    rows, w, g = _mini_batch_rows(weight, ids, grad, lr, l2, counts, padding_idx, decay, grad_scale)
    state_sum[rows] += g * g
    weight[rows] = (w - lr * g / (state_sum[rows].sqrt() + eps)).to(weight.dtype)


@torch.no_grad()
def mba_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-10,
    decay: str = "mini_batch_aware",
    grad_scale: Tensor | None = None,
) -> None:
    """Row-wise Adagrad: one accumulator per row; see :func:`dien_ops.functional.mba_rowwise_adagrad_`."""
    rows, w, g = _mini_batch_rows(weight, ids, grad, lr, l2, counts, padding_idx, decay, grad_scale)
    state_sum[rows] += g.square().mean(1)
    weight[rows] = (w - lr * g / (state_sum[rows].sqrt() + eps).unsqueeze(1)).to(weight.dtype)


@torch.no_grad()
def mba_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2: float = 0.01,
    counts: Tensor | None = None,
    padding_idx: int | None = None,
    decay: str = "mini_batch_aware",
    grad_scale: Tensor | None = None,
) -> None:
    """Lazy Adam with a step count per row; see :func:`dien_ops.functional.mba_adam_`."""
    rows, w, g = _mini_batch_rows(weight, ids, grad, lr, l2, counts, padding_idx, decay, grad_scale)
    beta1, beta2 = betas
    step[rows] += 1
    t = step[rows].to(w.dtype).unsqueeze(1)
    exp_avg[rows] = beta1 * exp_avg[rows] + (1 - beta1) * g
    exp_avg_sq[rows] = beta2 * exp_avg_sq[rows] + (1 - beta2) * g * g
    first = exp_avg[rows] / (1 - beta1**t)
    second = exp_avg_sq[rows] / (1 - beta2**t)
    weight[rows] = (w - lr * first / (second.sqrt() + eps)).to(weight.dtype)
