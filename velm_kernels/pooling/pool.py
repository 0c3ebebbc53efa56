"""Pooling over tokens: ``masked_pool`` of padded rows or pixels and ``segment_pool`` of packed ones."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.small import ANY, takes_torch, values_of, wide
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.pooling import reference
from velm_kernels.pooling.reference import GEM_EPS, MODES
from velm_kernels.pooling.tokens import (
    check_values,
    checked_cu_seqlens,
    checked_integers,
    checked_mask,
    live_tokens,
    padded,
)

MEAN, SUM, MAX, LOGSUMEXP, GEM = range(len(MODES))
# Elements of x up to which torch's form is the faster one, without a gradient and with one, see
# velm_kernels.backends.small; rows shorter than others.
SMALL = {
    "mean": (1 << 18, 1 << 18),
    "sum": (1 << 18, 1 << 18),
    "max": (1 << 16, 1 << 17),
    "logsumexp": (1 << 15, 1 << 17),
}
FEW_ROWS = 16
# The same for segments, and for one alone.
SMALL_SEGMENTS, SMALL_SEGMENT = 1 << 19, 1 << 20


def masked_pool(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Tensor:
    """Pools the tokens of each row that are not padding, in one pass that reads no others.

    - ``"mean"``, ``"sum"``: their mean and sum;
    - ``"max"``: their largest, for each feature; NaN where one of them is NaN. The gradient goes to the first of equal
      ones;
    - ``"logsumexp"``: ``log(sum(exp(x)))``;
    - ``"gem"``: the generalised mean ``mean(max(x, 1e-6)^p)^(1/p)`` (Radenovic et al., 2018, eq. 3), computed as
      ``m mean((max(x, 1e-6) / m)^p)^(1/p)`` with the largest value m, so that no power overflows: ``p`` may be 1000.

    Over no token at all the result is 0 in every mode, and passes nothing back. NaN and infinity in tokens that count
    come out where the formulas have them, in the feature that holds them.

    Args:
        x: ``(..., tokens, dim)``, floating point. With ``channels_first``: ``(batch, dim, *spatial)``, whose tokens are
            the pixels in row-major order; read as it lies, also in ``torch.channels_last``.
        lengths: ``(...)`` (with ``channels_first`` ``(batch,)``), integers from 0 to tokens: only the first so many
            tokens count.
        mask: bool, broadcastable to ``(..., tokens)`` (``(batch, *spatial)``); tokens where it is False do not count.
            They may hold NaN and get gradient 0.
        mode: as above.
        p: power of ``"gem"``, greater than 0.
        channels_first: see ``x``.

    Returns:
        ``(..., dim)`` (``(batch, dim)``), contiguous, in x's dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device, ``mode``, ``p`` or (on the CPU, or with VELM_CHECK=1) a length is not as above.

    Backward keeps ``x`` for ``"logsumexp"`` and ``"gem"`` alone; for ``"max"`` an index for each element of the result.
    """
    small = _small(x, lengths, mask, mode, p, channels_first=channels_first)
    if small is not None:
        return small
    arguments = canonical_masked(x, lengths, mask, mode, p, channels_first=channels_first)
    out, _ = call("pool_forward", arguments)
    leading, dim = (x.shape[:1], x.shape[1]) if channels_first else (x.shape[:-2], x.shape[-1])
    return out.view(*leading, dim)


def _small(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Tensor | None:
    if mask is not None or channels_first is not False or p.__class__ is not float or mode.__class__ is not str:
        return None
    limits = SMALL.get(mode)
    if limits is None or not takes_torch(limits[0], x, dtype=ANY, recorded=limits[1]):
        return None
    shape = x.shape
    if len(shape) < 2 or 0 in shape or not x.is_contiguous():
        return None
    if lengths is None:
        return _of_tokens(x, mode)
    known = values_of(lengths)
    if known is None or lengths.shape != shape[:-2]:
        return None
    tokens, least, most = shape[-2], min(known), max(known)
    if least < 0 or most > tokens:
        return None
    if least == most:
        return _of_tokens(x if most == tokens else x.narrow(-2, 0, most), mode if most else "sum")
    if least == 0 and mode not in ("mean", "sum"):
        return None
    short = [(row, length) for row, length in enumerate(known) if length < tokens]
    if len(short) > FEW_ROWS:
        return None
    # Sooner than any mask.
    filled = x.clone()
    rows = filled.view(-1, tokens, shape[-1])
    for row, length in short:
        rows[row, length:] = 0.0 if mode in ("mean", "sum") else -torch.inf
    if mode != "mean":
        return _of_tokens(filled, mode)
    counts = lengths.unsqueeze(-1) if least else lengths.unsqueeze(-1).clamp(min=1)
    return (filled.sum(-2, dtype=torch.float32) / counts).to(x.dtype)


def _of_tokens(x: Tensor, mode: str) -> Tensor:
    if mode == "mean":
        return x.mean(-2)
    if mode == "sum":
        return x.sum(-2)
    if mode == "logsumexp":
        return wide(x).logsumexp(-2).to(x.dtype)
    # The gradient goes to the first of equal ones.
    return x.max(-2).values if torch.is_grad_enabled() and x.requires_grad else x.amax(-2)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor:
    """Pools each run of packed tokens: row s of the result is over ``x[cu_seqlens[s]:cu_seqlens[s + 1]]``.

    Args:
        x: ``(tokens, dim)``, floating point.
        cu_seqlens: ``(segments + 1,)`` integers from 0 to tokens, none less than the one before. Segments may be empty.
        mode, p: as in :func:`masked_pool`.

    Returns:
        ``(segments, dim)``, contiguous, in x's dtype; 0 for empty segments.

    Raises:
        TypeError, ValueError: as :func:`masked_pool`; also for ``cu_seqlens`` that do not fit ``x``.
    """
    small = _small_segments(x, cu_seqlens, mode, p)
    if small is not None:
        return small
    arguments = canonical_segments(x, cu_seqlens, mode, p)
    out, _ = call("pool_forward", arguments)
    return out


def _small_segments(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor | None:
    if (
        mode not in ("mean", "sum")
        or p.__class__ is not float
        or not takes_torch(SMALL_SEGMENT, x, dtype=ANY, recorded=SMALL_SEGMENT)
    ):
        return None
    bounds = values_of(cu_seqlens)
    if bounds is None or x.dim() != 2 or cu_seqlens.dim() != 1 or len(bounds) < 2 or 0 in x.shape:
        return None
    tokens = x.shape[0]
    if bounds[0] != 0 or bounds[-1] != tokens or not all(map(operator.le, bounds, bounds[1:])):
        return None
    if len(bounds) == 2:
        return x.mean(0, True) if mode == "mean" else x.sum(0, True)
    if x.numel() > SMALL_SEGMENTS:
        return None
    lengths = cu_seqlens.diff().long()
    given = wide(x)
    index = torch.repeat_interleave(lengths, output_size=tokens)
    out = given.new_zeros(len(lengths), x.shape[1]).index_add(0, index, given)
    if mode == "mean":
        out = out / lengths.clamp(min=1).unsqueeze(-1)
    return out.to(x.dtype)


def checked_mode(mode: str, p: float) -> tuple[int, float]:
    checks.choice("mode", mode, MODES)
    return MODES.index(mode), checks.number("p", p, 1e-3, 1e3, described="a power from 0.001 to 1000")


def canonical_masked(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Arguments:
    """Checks the arguments of :func:`masked_pool` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    number, p = checked_mode(mode, p)
    if checks.flag("channels_first", channels_first):
        if x.dim() < 3:
            raise ValueError(f"x: expected (batch, dim, *spatial), given {tuple(x.shape)}")
        leading, spatial = tuple(x.shape[:1]), tuple(x.shape[2:])
        tokens, dim = product(spatial), x.shape[1]
        rows = x.reshape(x.shape[0], dim, tokens).transpose(1, 2)
    else:
        if x.dim() < 2:
            raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
        leading, spatial = tuple(x.shape[:-2]), (x.shape[-2],)
        tokens, dim = x.shape[-2:]
        rows = x.reshape(product(leading), tokens, dim)
    if lengths is not None:
        lengths = checked_integers("lengths", lengths, x, "the leading dimensions of x", leading)
    if mask is not None:
        layout = "(batch, *spatial)" if channels_first else "(..., tokens)"
        mask = checked_mask(mask, x, layout, leading + spatial, rows.shape[0], tokens)
    # Which of the two last strides is 1; with one column or one token either may be said to be.
    by_token = rows.stride(1) == 1 and rows.stride(2) != 1 and dim > 1
    if not by_token and rows.stride(2) != 1 and dim > 1:
        rows = rows.contiguous()
    return {
        "x": rows,
        "lengths": lengths,
        "mask": mask,
        "cu_seqlens": None,
        "tokens_contiguous": by_token,
        "mode": number,
        "p": p,
    }


def canonical_segments(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Arguments:
    """Checks the arguments of :func:`segment_pool` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x, dims=2, layout="(tokens, dim)"), checks.FLOAT_DTYPES)
    number, p = checked_mode(mode, p)
    return {
        "x": unit_last_stride(x),
        "lengths": None,
        "mask": None,
        "cu_seqlens": checked_cu_seqlens(cu_seqlens, x),
        "tokens_contiguous": False,
        "mode": number,
        "p": p,
    }


def _stats(like: Tensor, shape: tuple[int, ...], mode: int) -> Tensor:
    """Uninitialised; what backward needs of the result."""
    dtype = torch.int32 if mode == MAX else torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(shape if mode in (MAX, LOGSUMEXP, GEM) else (0,), dtype=dtype)


def _fake_forward(
    x: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens_contiguous: bool,
    mode: int,
    p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[-1])
    return x.new_empty(shape), _stats(x, shape, mode)


def empty_gradient(grad: Tensor, tokens: int, packed: bool, tokens_contiguous: bool) -> Tensor:
    rows, dim = grad.shape
    if packed:
        return grad.new_empty((tokens, dim))
    if tokens_contiguous:
        return grad.new_empty((rows, dim, tokens)).transpose(1, 2)
    return grad.new_empty((rows, tokens, dim))


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    stats: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: int,
    tokens_contiguous: bool,
    mode: int,
    p: float,
    backend: str,
) -> Tensor:
    return empty_gradient(grad, tokens, cu_seqlens is not None, tokens_contiguous)


# x: (segments, tokens, dim), last stride 1, or, with tokens_contiguous, the one before it, other strides arbitrary;
# with cu_seqlens (tokens, dim), last stride 1. lengths: (segments,) int32, mask: (segments, tokens) bool, cu_seqlens:
# (segments + 1,) int32, all contiguous; kernels clamp their values. mode: index into MODES.
# out: (segments, dim) contiguous in x's dtype. stats, contiguous: for max the index of the token inside its segment,
# int32, -1 for none; for logsumexp and gem the result in float32; else (0,).
declare(
    "pool_forward",
    "Tensor x, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens, bool tokens_contiguous, int mode, float p",
    "(Tensor, Tensor)",
    fake=_fake_forward,
    check=lambda arguments: check_values(arguments, arguments["x"].shape[0 if arguments["x"].dim() == 2 else 1]),
)
# grad: (segments, dim) contiguous; x as above for logsumexp and gem, else None. The result has the shape of x and is
# contiguous, with tokens_contiguous in the order (segments, dim, tokens).
declare(
    "pool_backward",
    "Tensor grad, Tensor? x, Tensor stats, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens, SymInt tokens, "
    "bool tokens_contiguous, int mode, float p",
    "Tensor",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lengths, mask, cu_seqlens, *ctx.settings = inputs
    ctx.tokens = x.shape[0 if cu_seqlens is not None else 1]
    ctx.mark_non_differentiable(output[1])
    keeps_x = ctx.settings[1] in (LOGSUMEXP, GEM)
    ctx.save_for_backward(x if keeps_x else None, output[1], lengths, mask, cu_seqlens)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x = ops.pool_backward(grad.contiguous(), *ctx.saved_tensors, ctx.tokens, *ctx.settings)
    return grad_x, None, None, None, None, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Any:
    tokens_contiguous, mode, p, _ = ctx.settings
    # Of a maximum the index is kept and not x.
    if mode != MAX:
        return NotImplemented
    arguments: list[Any] = [*ctx.saved_tensors, ctx.tokens, tokens_contiguous, mode, p]
    return _gradient(grad, *arguments), None, None, None, None, None, None, None


def _meaning(
    x: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens_contiguous: bool,
    mode: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    if cu_seqlens is not None:
        x, source = padded(x, cu_seqlens)
        mask = source >= 0
    wide = x.to(torch.promote_types(dtype, torch.float32))
    if mode == MAX and x.shape[1]:
        live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)[..., None]
        values = wide.detach()
        largest = torch.where(live, values, -torch.inf).amax(1, keepdim=True)
        # The first of equal ones: torch's own index is that of any of them.
        equal = live & ((values == largest) | (values.isnan() & largest.isnan()))
        first = equal.to(torch.uint8).argmax(1)
        some = live.any(1)
        out = torch.where(some, wide.gather(1, first[:, None])[:, 0], 0.0)
        return out.to(dtype), torch.where(some, first, -1).int()
    out = reference.masked_pool(wide, lengths, mask, MODES[mode], p)
    stats = out.detach() if mode in (LOGSUMEXP, GEM) else x.new_empty((0,), dtype=wide.dtype)
    if mode == MAX:
        stats = x.new_full(tuple(out.shape), -1, dtype=torch.int32)
    return out.to(dtype).contiguous(), stats


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, stats = _meaning(*arguments)
    # The result and what is kept of it are two tensors.
    return out, stats.clone()


def _reference_backward(*arguments: Any) -> Tensor:
    *_, tokens_contiguous, _, _ = arguments
    grad_x = _gradient(*arguments)
    return grad_x.transpose(1, 2).contiguous().transpose(1, 2) if tokens_contiguous else grad_x.contiguous()


def _gradient(
    grad: Tensor,
    x: Tensor | None,
    stats: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
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
    wide = torch.promote_types(grad.dtype, torch.float32)
    live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)[..., None]
    g, x = grad.to(wide)[:, None], torch.where(live, x.to(wide), 0.0)
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


def _too_long(arguments: Arguments) -> list[str]:
    tokens = arguments["tokens"] if "tokens" in arguments else arguments["x"].shape[-2]
    return [] if tokens < 2**31 else [f"x has {tokens} tokens, and kernels count them in 32 bits"]


register_autograd(
    "pool_forward",
    _backward,
    setup_context=_setup_context,
    meaning=_meaning,
    differentiable_backward=_differentiable_backward,
)
register("pool_forward", "reference", _reference_forward)
register("pool_backward", "reference", _reference_backward)
for _name in ("pool_forward", "pool_backward"):
    cpu.register_cpu(_name, more_reasons=_too_long)
    cuda.register_cuda(_name, _too_long)
    triton.register_triton(_name, "pooling.triton_pool", _too_long)
register_public("masked_pool", "pool_forward", canonical_masked, _small)
register_public("segment_pool", "pool_forward", canonical_segments, _small_segments)
