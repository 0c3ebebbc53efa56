"""The operator pool: tokens of padded rows, of pixels or of packed segments to one vector each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.operator import Operator
from velm_kernels.pooling.pool import reference
from velm_kernels.pooling.pool.reference import GEM_EPS, MODES
from velm_kernels.pooling.tokens import check_values, live_tokens, padded

MEAN, SUM, MAX, LOGSUMEXP, GEM = range(len(MODES))


def _shapes(a: Any) -> tuple[Tensor, Tensor | None]:
    shape = (a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1, a.x.shape[-1])
    stats = None
    if a.mode in (MAX, LOGSUMEXP, GEM):
        dtype = torch.int32 if a.mode == MAX else torch.promote_types(a.x.dtype, torch.float32)
        stats = a.x.new_empty(shape, dtype=dtype)
    return a.x.new_empty(shape), stats


def _empty_gradient(a: Any) -> Tensor:
    rows, dim = a.grad.shape
    made: Tensor
    if a.cu_seqlens is not None:
        made = a.grad.new_empty((a.tokens, dim))
    elif a.tokens_contiguous:
        made = a.grad.new_empty((rows, dim, a.tokens)).transpose(1, 2)
    else:
        made = a.grad.new_empty((rows, a.tokens, dim))
    return made


def meaning(
    x: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens_contiguous: bool,
    mode: int,
    p: float,
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is not None:
        x, source = padded(x, cu_seqlens)
        mask = source >= 0
    if mode == MAX and x.shape[1]:
        live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)[..., None]
        values = x.detach()
        largest = torch.where(live, values, -torch.inf).amax(1, keepdim=True)
        # The first of equal ones: torch's own index is that of any of them.
        equal = live & ((values == largest) | (values.isnan() & largest.isnan()))
        first = equal.to(torch.uint8).argmax(1)
        some = live.any(1)
        out = torch.where(some, x.gather(1, first[:, None])[:, 0], 0.0)
        return out, torch.where(some, first, -1)
    out = reference.masked_pool(x, lengths, mask, MODES[mode], p)
    if mode == MAX:
        return out, torch.full_like(out, -1, dtype=torch.int32)
    # The result and what is kept of it are two tensors.
    return out, out.detach().clone() if mode in (LOGSUMEXP, GEM) else None


def _gradient(
    grad: Tensor,
    x: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    stats: Tensor,
    tokens: int,
    tokens_contiguous: bool,
    mode: int,
    p: float,
) -> Tensor:
    """The gradient of x, in plain torch that can be differentiated."""
    source = None
    if cu_seqlens is not None:
        x, source = padded(grad.new_zeros(tokens, grad.shape[1]) if x is None else x, cu_seqlens)
        mask = source >= 0
    elif x is None:
        x = grad.new_zeros(grad.shape[0], tokens, grad.shape[1])
    compute_dtype = torch.promote_types(grad.dtype, torch.float32)
    live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)[..., None]
    g, x = grad.to(compute_dtype)[:, None], torch.where(live, x.to(compute_dtype), 0.0)
    if mode == MAX:
        position = torch.arange(x.shape[1], device=x.device)[None, :, None]
        parts = torch.where(stats[:, None] == position, g, 0.0)
    elif mode == LOGSUMEXP:
        parts = torch.where(stats[:, None] == -torch.inf, 0.0, g * (x - stats[:, None]).exp())
    elif mode == GEM:
        ratio = x / stats[:, None].clamp(min=GEM_EPS)
        parts = torch.where(x >= GEM_EPS, g * ratio ** (p - 1), 0.0)
    else:
        parts = g.expand(x.shape)
    if mode in (MEAN, GEM):
        parts = parts / live.sum(1, keepdim=True).clamp(min=1)
    parts = torch.where(live, parts, 0.0).to(grad.dtype)
    if source is None:
        return parts
    # One row more, for what comes from nowhere.
    places = torch.where(source >= 0, source, tokens).reshape(-1)
    rows = parts.reshape(len(places), parts.shape[2])
    return parts.new_zeros(tokens + 1, parts.shape[2]).index_add(0, places, rows)[:tokens]


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor]:
    saved = (a.x, a.lengths, a.mask, a.cu_seqlens, a.stats)
    return (_gradient(a.grad, *saved, a.tokens, a.tokens_contiguous, a.mode, a.p),)


def _too_long(arguments: Arguments) -> list[str]:
    tokens = arguments["tokens"] if "tokens" in arguments else arguments["x"].shape[-2]
    return [] if tokens < 2**31 else [f"x has {tokens} tokens, and kernels count them in 32 bits"]


# x: (segments, tokens, dim), last stride 1, or, with tokens_contiguous, the one before it, other strides arbitrary;
# with cu_seqlens (tokens, dim), last stride 1. lengths: (segments,) int32, mask: (segments, tokens) bool, cu_seqlens:
# (segments + 1,) int32, all contiguous; kernels clamp their values. mode: index into MODES.
# out: (segments, dim) contiguous in x's dtype. stats, contiguous: for max the index of the token inside its segment,
# int32, -1 for none; for logsumexp and gem the result in float32; else none.
# grad: (segments, dim) contiguous; x as above for logsumexp and gem, else None. grad_x has the shape of x and is
# contiguous, with tokens_contiguous in the order (segments, dim, tokens).
OPERATOR = Operator(
    "pool",
    "Tensor x, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens, bool tokens_contiguous, int mode, float p",
    results=("out", "stats"),
    may_be_absent=("stats",),
    without_gradient=("stats",),
    shapes=_shapes,
    reference=meaning,
    differentiable=("x",),
    saves=("x", "lengths", "mask", "cu_seqlens", "stats"),
    saves_only_if={"x": lambda a: a.mode in (LOGSUMEXP, GEM)},
    remembers={"SymInt tokens": lambda a: a.x.shape[-2]},
    gradients=gradients,
    # Of a maximum the index is kept and not x.
    gradients_again=lambda a, wanted: gradients(a, wanted) if a.mode == MAX else NotImplemented,
    gradient_shapes={"x": _empty_gradient},
    triton="pooling.pool.triton",
    reasons=dict.fromkeys(("cpu", "cuda", "device_on_host", "triton"), _too_long),
    check=lambda arguments: check_values(arguments, arguments["x"].shape[-2]),
)
