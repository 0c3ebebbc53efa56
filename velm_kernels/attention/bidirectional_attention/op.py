"""The operator bidirectional_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.bidirectional_attention import reference
from velm_kernels.backends import Arguments, cuda, triton
from velm_kernels.layout import empty_heads_last, unit_last_stride
from velm_kernels.operator import Operator

SIDES = ("query_a", "query_b", "value_a", "value_b")


def _results(a: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if a.query_a.dtype == torch.float64 else torch.float32
    return (
        empty_heads_last(a.query_a, (*a.query_a.shape[:3], a.value_b.shape[3])),
        empty_heads_last(a.query_b, (*a.query_b.shape[:3], a.value_a.shape[3])),
        a.query_a.new_empty(a.query_a.shape[:3], dtype=dtype),
        a.query_b.new_empty(a.query_b.shape[:3], dtype=dtype),
    )


def meaning(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    given = {"mask_a": mask_a, "mask_b": mask_b, "seed": seed}
    return reference.bidirectional_attention(
        query_a, query_b, value_a, value_b, **given, scale=scale, dropout_p=dropout_p
    )


def _too_many_features(arguments: Arguments, most: int = 512) -> list[str]:
    sizes = {name: arguments[name].shape[3] for name in ("query_a", "value_a", "value_b")}
    return [f"{name} has {size} features, more than {most}" for name, size in sizes.items() if size > most]


def _too_many_in_triton(arguments: Arguments) -> list[str]:
    return _too_many_features(arguments) or triton.too_wide(arguments, "query_a", "value_a", "value_b")


def _too_many_in_cuda(arguments: Arguments) -> list[str]:
    return _too_many_features(arguments, 256)


def _flops(a: Any) -> int:
    batch, heads, length_a, head_dim = a.query_a
    return int(2 * batch * heads * length_a * a.query_b[2] * (head_dim + a.value_a[3] + a.value_b[3]))


def _backward_flops(a: Any) -> int:
    batch, heads, length_a, head_dim = a.query_a
    return int(2 * batch * heads * length_a * a.query_b[2] * (3 * head_dim + 2 * a.value_a[3] + 2 * a.value_b[3]))


# query_*, value_*: last stride 1, other strides arbitrary (may be 0). masks: (batch, a), (batch, b) bool, contiguous.
# seed: int64 scalar, given iff dropout_p > 0. Outs and gradients: (batch, heads, rows, dim) stored as (batch, rows,
# heads, dim); logsumexps contiguous float32. grad_out_*: last stride 1; None if the output was not used (then so is its
# direction, but for grad_logsumexp_*, which is contiguous).
OPERATOR = Operator(
    "bidirectional_attention",
    "Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, Tensor? mask_a, Tensor? mask_b, Tensor? seed, "
    "float scale, float dropout_p",
    shapes=_results,
    reference=meaning,
    results=("out_a", "out_b", "logsumexp_a", "logsumexp_b"),
    may_lack=("out_a", "out_b", "logsumexp_a", "logsumexp_b"),
    differentiable=SIDES,
    saves=(*SIDES, "mask_a", "mask_b", "seed", "out_a", "out_b", "logsumexp_a", "logsumexp_b"),
    gradient_shapes={
        name: lambda a, name=name: empty_heads_last(getattr(a, name), getattr(a, name).shape) for name in SIDES
    },
    incoming=lambda grad, a: unit_last_stride(grad) if grad.dim() == 4 else grad.contiguous(),
    triton="attention.bidirectional_attention.triton",
    reasons={"triton": _too_many_in_triton, **dict.fromkeys(cuda.NAMESPACES, _too_many_in_cuda)},
    flops=_flops,
    backward_flops=_backward_flops,
)
