"""The operator linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.losses.linear_cross_entropy import reference
from velm_kernels.operator import Operator

HIDDEN, WEIGHT, BIAS = 1, 2, 4
# Beside them: backward makes them, whatever the reduction.
LATER = 8
# Elements that are multiplied before they are rounded to 16 bits: 4 MiB.
SCALED = 1 << 20


def made_in_forward(reduction: str, details: bool, records: int) -> int:
    """Which of the gradients that are wanted forward makes, while it has the logits: all where every row's loss has the
    same gradient, known up to a factor; else none, and backward forms the logits again."""
    return 0 if reduction == "none" or details or records & LATER else records


def _shapes(a: Any) -> tuple[Tensor | None, ...]:
    rows, wide = a.hidden.shape[0], torch.promote_types(a.hidden.dtype, torch.float32)

    def new(*shape: Any) -> Tensor:
        return a.hidden.new_empty(shape, dtype=wide)

    made = made_in_forward(a.reduction, a.details, a.records)
    return (
        new(rows) if a.reduction == "none" else new(),
        new(rows) if a.details else None,
        new(rows) if a.details else None,
        new(2 if a.details else 1, rows) if a.records and not made else None,
        new(*a.hidden.shape) if made & HIDDEN else None,
        new(*a.weight.shape) if made & WEIGHT else None,
        new(a.weight.shape[0]) if made & BIAS else None,
    )


def meaning(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    details: bool,
    records: int,
) -> tuple[Tensor | None, ...]:
    given = (targets, bias, -1, label_smoothing, softcap or None, False)
    found = reference.linear_cross_entropy(hidden, weight, *given, reduction, True)
    loss, logprobs, entropy = found if details else (found[0], None, None)
    made = made_in_forward(reduction, details, records)
    if not records:
        return loss, logprobs, entropy, None, None, None, None
    with torch.no_grad():
        labelled = (targets >= 0)[:, None]
        raw = hidden.masked_fill(~labelled, 0.0) @ weight.transpose(0, 1)
        if bias is not None:
            raw = raw + bias
        raw = raw.masked_fill(~labelled, 0.0)
        logits = softcap * torch.tanh(raw / softcap) if softcap else raw
        if not made:
            logsumexp = torch.logsumexp(logits, -1).masked_fill(targets < 0, 0.0)
            statistics = torch.stack([logsumexp] if entropy is None else [logsumexp, entropy])
            return loss, logprobs, entropy, statistics, None, None, None
        # The gradients of the sum of the losses.
        grad = torch.softmax(logits, -1) - label_smoothing / max(1, weight.shape[0])
        if weight.shape[0]:
            places = targets.clamp(min=0)[:, None]
            grad = grad.scatter_add(-1, places, torch.full_like(grad[:, :1], label_smoothing - 1.0))
        if softcap:
            grad = grad * (1 - (logits / softcap).square())
        grad = grad.masked_fill(~labelled, 0.0)
        grads = (
            grad @ weight if made & HIDDEN else None,
            grad.transpose(0, 1) @ hidden.masked_fill(~labelled, 0.0) if made & WEIGHT else None,
            grad.sum(0) if made & BIAS else None,
        )
    return loss, None, None, None, *grads


def factor(targets: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """What the gradients of the sum are multiplied with: nothing is labelled, nothing has a gradient."""
    if reduction == "sum":
        return grad
    labelled = (targets >= 0).sum()
    return torch.where(labelled > 0, grad / labelled, 0.0)


def factors(targets: Tensor, of_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of the sum are multiplied with: of hidden, weight and bias. What has no label has none,
    whatever comes in."""
    return torch.where(targets >= 0, of_sum, 0.0)[:, None], of_sum, of_sum


def scale_into(made: Tensor, by: Tensor, to: Tensor) -> Tensor:
    """``to = made * by``. Where ``to`` is narrower torch would make the product whole in the wider dtype first."""
    step = len(made) if made.dtype == to.dtype or made.dim() == 1 else max(1, SCALED // max(1, made.shape[1]))
    for first in range(0, len(made), max(1, step)):
        rows = slice(first, first + step)
        torch.mul(made[rows], by if by.dim() == 0 else by[rows], out=to[rows])
    return to


def _in_place(a: Any, wanted: Sequence[bool]) -> list[Tensor | None] | None:
    """A gradient of weight is as large as weight, and there should be but one."""
    if a.statistics is not None or a.grad_loss is None:
        return None
    found: list[Tensor | None] = []
    all_made = (a.made_hidden, a.made_weight, a.made_bias)
    by_all = factors(a.targets, factor(a.targets, a.grad_loss, a.reduction))
    for made, by, like, want in zip(all_made, by_all, (a.hidden, a.weight, a.bias), wanted):
        if not want or made is None:
            found.append(None)
        elif made.dtype == like.dtype:
            found.append(made.mul_(by))
        else:
            found.append(scale_into(made, by, like.new_empty(like.shape)))
    return found


def _check(arguments: Arguments) -> None:
    targets, vocabulary = arguments["targets"], arguments["weight"].shape[0]
    if targets.numel() and checks.reads_values(targets):
        highest = int(targets.max())
        if highest >= vocabulary:
            # What is negative and not ignored has become the size of the vocabulary.
            given = f"{highest}" if highest > vocabulary else f"{highest} or a negative number"
            raise ValueError(f"targets: expected ignore_index or values from 0 to {vocabulary - 1}, given {given}")


def _flops(a: Any) -> int:
    made = made_in_forward(a.reduction, a.details, a.records)
    return _products(a, 1 + bool(made & HIDDEN) + bool(made & WEIGHT))


def _backward_flops(a: Any) -> int:
    if made_in_forward(a.reduction, a.details, a.records):
        return 0
    return _products(a, 1 + bool(a.wanted & HIDDEN) + bool(a.wanted & WEIGHT))


def _products(a: Any, count: int) -> int:
    """Of all rows: how many have a label, no shape tells."""
    return int(2 * count * a.hidden[0] * a.weight[0] * a.weight[1])


# hidden (rows, dim), weight (vocabulary, dim): last stride 1, any row stride; bias (vocabulary,) contiguous; all of one
# dtype. targets (rows,), int64 and contiguous: below 0 where there is none. softcap: 0 for none. details: logprobs and
# entropy too. records: which gradients are wanted, a bit each. Results in float32, or float64 of float64: loss () or
# (rows,); statistics, where backward forms the logits again: (1, rows) their logsumexp, or (2, rows) and the entropy;
# made_*: the gradients of the sum of all losses where forward makes them.
OPERATOR = Operator(
    "linear_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float label_smoothing, float softcap, "
    "str reduction, bool details, int records",
    shapes=_shapes,
    reference=meaning,
    results=("loss", "logprobs", "entropy", "statistics", "made_hidden", "made_weight", "made_bias"),
    may_be_absent=("logprobs", "entropy", "statistics", "made_hidden", "made_weight", "made_bias"),
    without_gradient=("statistics", "made_hidden", "made_weight", "made_bias"),
    may_lack=("loss", "logprobs", "entropy"),
    differentiable=("hidden", "weight", "bias"),
    saves={
        "hidden": ("hidden", "weight", "bias", "targets", "statistics", "made_hidden"),
        "weight": ("hidden", "weight", "bias", "targets", "statistics", "made_weight"),
        "bias": ("hidden", "weight", "bias", "targets", "statistics", "made_bias"),
    },
    saves_only_if={
        "statistics": lambda a: not made_in_forward(a.reduction, a.details, a.records),
        "made_hidden": lambda a: bool(made_in_forward(a.reduction, a.details, a.records) & HIDDEN),
        "made_weight": lambda a: bool(made_in_forward(a.reduction, a.details, a.records) & WEIGHT),
        "made_bias": lambda a: bool(made_in_forward(a.reduction, a.details, a.records) & BIAS),
    },
    in_place=_in_place,
    triton="losses.linear_cross_entropy.triton",
    cpu="losses.linear_cross_entropy.cpu",
    cuda=False,
    check=_check,
    flops=_flops,
    backward_flops=_backward_flops,
)
