"""The operators rotary and normed_rotary: queries and keys of (batch, heads, tokens, head_dim), rotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.layout import empty_heads_last, empty_like, unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.rotary import reference

LAYOUTS = ("halves", "pairs", "quarters")


def meaning(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int, *heads_last: bool) -> Any:
    return reference.rotary(query, key, cos, sin, LAYOUTS[layout])


def meaning_with_norms(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm_weight: Tensor | None,
    key_norm_weight: Tensor | None,
    norm_eps: float,
    layout: int,
    *heads_last: bool,
) -> Any:
    return reference.rotary(query, key, cos, sin, LAYOUTS[layout], query_norm_weight, key_norm_weight, norm_eps)


def gradients(a: Any, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Those of queries and keys are rotated back, those of cos and sin are sums over heads."""
    layout, rotated = LAYOUTS[a.layout], a.cos.shape[-1]
    cos, sin = a.cos[:, None], a.sin[:, None]

    def back(grad: Tensor) -> Tensor:
        turning, rest = grad[..., :rotated], grad[..., rotated:]
        return torch.cat([turning * cos - reference.turned(turning * sin, layout), rest], -1)

    def over_heads(turn: bool) -> Tensor:
        sides = ((a.grad_rotated_query, a.query), (a.grad_rotated_key, a.key))
        of_query, of_key = (
            (grad[..., :rotated] * (reference.turned(x[..., :rotated], layout) if turn else x[..., :rotated])).sum(1)
            for grad, x in sides
        )
        summed: Tensor = of_query + of_key
        return summed

    of_query, of_key, of_cos, of_sin = wanted
    return (
        back(a.grad_rotated_query) if of_query else None,
        back(a.grad_rotated_key) if of_key else None,
        over_heads(False) if of_cos else None,
        over_heads(True) if of_sin else None,
    )


def _empty(like: Tensor, heads_last: bool) -> Tensor:
    """Uninitialised, of the shape of ``like``, in memory (batch, tokens, heads, head_dim) with ``heads_last``."""
    return empty_heads_last(like, like.shape) if heads_last else empty_like(like)


_EMPTY_GRADIENTS = {
    "query": lambda a: _empty(a.grad_rotated_query, a.query_heads_last),
    "key": lambda a: _empty(a.grad_rotated_key, a.key_heads_last),
}
_IN_COMMON: dict[str, Any] = {
    "shapes": lambda a: (_empty(a.query, a.query_heads_last), _empty(a.key, a.key_heads_last)),
    "results": ("rotated_query", "rotated_key"),
    "gradient_shapes": _EMPTY_GRADIENTS,
    "incoming": lambda grad, a: unit_last_stride(grad),
    "triton": "sequence.rotary.triton",
}

# query: (batch, heads, tokens, head_dim), key: (batch, its own heads, tokens, head_dim), one dtype; cos, sin: (batch,
# tokens, rotated), one floating dtype; all with last stride 1 and any other strides, also of 0. layout: a place in
# LAYOUTS. What comes out, and the gradients of query and key, are contiguous, with *_heads_last in the order (batch,
# tokens, heads, head_dim); the gradients that come in have last stride 1.
OPERATOR = Operator(
    "rotary",
    "Tensor query, Tensor key, Tensor cos, Tensor sin, int layout, bool query_heads_last, bool key_heads_last",
    reference=meaning,
    differentiable=("query", "key", "cos", "sin"),
    saves={
        "query": ("cos", "sin"),
        "key": ("cos", "sin"),
        "cos": ("query", "key", "cos", "sin"),
        "sin": ("query", "key", "cos", "sin"),
    },
    gradients=gradients,
    **_IN_COMMON,
)

# The same after RMS norms, of query, key or both: weights of (head_dim,), or (heads * head_dim,) for one norm over all
# heads of a token, contiguous, any floating dtype.
WITH_NORMS = Operator(
    "normed_rotary",
    "Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_norm_weight, Tensor? key_norm_weight, "
    "float norm_eps, int layout, bool query_heads_last, bool key_heads_last",
    reference=meaning_with_norms,
    differentiable=("query", "key", "cos", "sin", "query_norm_weight", "key_norm_weight"),
    saves=("query", "key", "cos", "sin", "query_norm_weight", "key_norm_weight"),
    **_IN_COMMON,
)
