"""``attention_pool``: attention of a few queries over tokens, whose keys and values are never formed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.cross_attention import cross_attention
from velm_kernels.attention.cross_attention_varlen import cross_attention_varlen
from velm_kernels.backends import Arguments, cuda, derivatives, forced, register_composed
from velm_kernels.backends.small import ANY, in_float32, takes_torch
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.linear.linear import linear
from velm_kernels.pooling.attention_pool.op import OPERATOR
from velm_kernels.pooling.tokens import check_values, checked_cu_seqlens, checked_integers, checked_mask, live_tokens
from velm_kernels.processors import NEVER, TORCH_ATTENTION_KEYS

# Heads of so many columns are the widest that cross_attention takes.
WIDEST_HEAD = 512
# Elements of tokens, queries and scores up to which torch's form is the faster one, without a gradient and with one
# (see velm_kernels.backends.small); tokens of a row up to which forming keys and values of them is.
SMALL, SMALL_RECORDED, FEW_TOKENS = 1 << 19, 1 << 16, 8


def attention_pool(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    heads: int,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of ``query`` over the tokens ``x``, with keys ``x key_weight^T + key_bias`` and values
    ``x value_weight^T + value_bias`` (Vaswani et al., 2017, section 3.2.2), without the projections around it.

    Where there are few queries, neither keys nor values are formed. For each head, ``q (W_k x) = (W_k^T q) x``: the
    query is folded into the key weight, the softmax over its products with the tokens pools the tokens themselves, and
    the value weight is applied to what was pooled. The key bias adds the same to all scores of a row, which the softmax
    does not see: it is not read, and its gradient is 0. Which way is taken is counted: with M queries, H heads and
    tokens of width d, folding needs ``2 M H d`` operations per token and the ordinary way ``(d + M) (e + v)``, with the
    widths e and v of keys and values; for e = v = d that is M against the width of a head. The ordinary way is
    :func:`velm_kernels.linear` (with backend ``cuda`` torch's) and :func:`velm_kernels.cross_attention`.

    Args:
        x: ``(batch, tokens, d)``, or ``(tokens, d)`` with ``cu_seqlens``.
        query: ``(queries, e)`` for all rows, or ``(batch, queries, e)``; already projected, not yet scaled.
        key_weight: ``(e, d)``, as the weight of ``torch.nn.Linear``; one head after the other.
        value_weight: ``(v, d)``, likewise.
        key_bias: ``(e,)``.
        value_bias: ``(v,)``.
        heads: number of heads; divides e and v.
        lengths: ``(batch,)`` integers from 0 to tokens: the number of leading tokens that count.
        mask: bool, broadcastable to ``(batch, tokens)``; tokens where it is False do not count and may hold NaN.
        cu_seqlens: ``(batch + 1,)`` integers: the bounds of each row's tokens in the packed ``x``.
        scale: of the scores, by default ``(e / heads)^-0.5``.

    All floating point, of one dtype (under autocast, cast to its dtype).

    Returns:
        ``(batch, queries, v)``. A row without tokens is 0, without the bias, and passes nothing back.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device, ``heads`` or (on the CPU, or with VELM_CHECK=1) a length is not as above.

    Example:
        >>> x, query = torch.randn(3, 50, 64), torch.randn(1, 64)
        >>> key_weight, value_weight = torch.randn(64, 64), torch.randn(32, 64)
        >>> lengths = torch.tensor([50, 20, 0])
        >>> velm_kernels.attention_pool(x, query, key_weight, value_weight, heads=4, lengths=lengths).shape
        torch.Size([3, 1, 32])
    """
    if lengths is mask is cu_seqlens is None:
        small = plain(x, query, key_weight, value_weight, key_bias, value_bias, heads=heads, scale=scale)
        if small is not None:
            return small
    x, query, key_weight, value_weight, key_bias, value_bias = checks.autocast(
        x, query, key_weight, value_weight, key_bias, value_bias
    )
    given = (lengths, mask, cu_seqlens)
    tokens, scale = _checked(x, query, key_weight, value_weight, key_bias, value_bias, heads, given, scale)
    if _folds(x, query, key_weight, value_weight, heads):
        out = _folded(x, query, key_weight, value_weight, value_bias, heads, tokens, scale)
    else:
        out = _ordinary(x, query, key_weight, value_weight, value_bias, heads, tokens, scale)
    if key_bias is not None and key_bias.requires_grad:
        # The softmax does not see it: its gradient is 0, not None. None of its values is read, which may be NaN.
        out = out + key_bias[:0].sum()
    return out


def plain(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    **others: Any,
) -> Tensor | None:
    """The ordinary way or the folded one in a few operators of torch, for few tokens without padding; else None."""
    if any(value is not None for value in others.values()) or not (
        scale is None or (scale.__class__ is float and abs(scale) <= 1e30)
    ):
        return None
    if not takes_torch(SMALL, x, query, dtype=ANY, recorded=SMALL_RECORDED) or not takes_torch(
        NEVER, key_weight, value_weight, dtype=x.dtype
    ):
        return None
    if x.dim() != 3 or 0 in x.shape or not (key_weight.dim() == value_weight.dim() == 2) or query.dim() not in (2, 3):
        return None
    (batch, tokens, dim), features, values = x.shape, key_weight.shape[0], value_weight.shape[0]
    if key_weight.shape[1] != dim or value_weight.shape[1] != dim or heads.__class__ is not int or heads < 1:
        return None
    if 0 in (features, values) or features % heads or values % heads or query.shape[-1] != features:
        return None
    if query.shape[:-2] not in ((), (batch,)) or query.numel() == 0:
        return None
    for bias, size in ((key_bias, features), (value_bias, values)):
        if bias is not None and not (takes_torch(NEVER, bias, dtype=x.dtype) and bias.shape == (size,)):
            return None
    queries = query.shape[-2]
    if batch * heads * queries * tokens > SMALL:
        return None
    query = query * ((features // heads) ** -0.5 if scale is None else scale)
    if x.dtype is not torch.float32 or tokens <= FEW_TOKENS or not _folds(x, query, key_weight, value_weight, heads):
        out = _small_ordinary(x, query, key_weight, value_weight, value_bias, heads)
    else:
        out = _folded(x, query, key_weight, value_weight, value_bias, heads, None, 1.0)
    if key_bias is not None and key_bias.requires_grad:
        # The softmax does not see it: its gradient is 0, not None. None of its values is read, which may be NaN.
        out = out + key_bias[:0].sum()
    return out


def _small_ordinary(
    x: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor | None, heads: int
) -> Tensor:
    key, value = F.linear(x, key_weight), F.linear(x, value_weight, value_bias)
    query, key, value = (
        tensor.unflatten(-1, (heads, tensor.shape[-1] // heads)).transpose(-3, -2) for tensor in (query, key, value)
    )
    if key.shape[-2] >= TORCH_ATTENTION_KEYS and not derivatives.wanted(x, query, key, value):
        # The public function knows where torch's kernel is the faster one.
        pooled = cross_attention(query.expand(len(x), *query.shape[-3:]), key, value, scale=1.0)
    else:
        pooled = torch.softmax(in_float32(query) @ in_float32(key).transpose(-1, -2), -1) @ in_float32(value)
    return pooled.transpose(1, 2).flatten(2).to(x.dtype)


def _checked(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    heads: int,
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: float | None,
) -> tuple[Arguments, float]:
    lengths, mask, cu_seqlens = given
    checks.tensor("x", x)
    for name, value in (("lengths", lengths), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            checks.tensor(name, value)
    packed = cu_seqlens is not None
    checks.tensor("x", x, dims=2 if packed else 3, layout="(tokens, d)" if packed else "(batch, tokens, d)")
    checks.dtype_in("x", x, checks.FLOAT_DTYPES)
    if cu_seqlens is not None:
        if lengths is not None or mask is not None:
            name, value = ("mask", mask) if lengths is None else ("lengths", lengths)
            raise ValueError(f"{name}: expected None beside cu_seqlens, given {checks.describe(value)}")
        cu_seqlens = checked_cu_seqlens(cu_seqlens, x)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, dim = x.shape[-2:]
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        checks.tensor(name, weight, dims=2, layout="(features, d)")
        checks.shape(name, weight, "(features, d)", (weight.shape[0], dim))
    checks.integer("heads", heads, 1)
    features, values = key_weight.shape[0], value_weight.shape[0]
    if features % heads or values % heads:
        raise ValueError(
            f"heads: expected a number that divides the {features} features of keys and the {values} of values, "
            f"given {heads}"
        )
    checks.tensor("query", query)
    if query.dim() not in (2, 3) or query.shape[-1] != features or query.shape[:-2] not in ((), (batch,)):
        raise ValueError(
            f"query: expected (queries, features) or (batch, queries, features) with batch = {batch} and features = "
            f"{features}, given {tuple(query.shape)}"
        )
    for name, bias, size in (("key_bias", key_bias, features), ("value_bias", value_bias, values)):
        if bias is not None:
            checks.shape(name, checks.tensor(name, bias), "(features,)", (size,))
    others = {"query": query, "key_weight": key_weight, "value_weight": value_weight}
    others |= {name: bias for name, bias in (("key_bias", key_bias), ("value_bias", value_bias)) if bias is not None}
    for name, other in others.items():
        checks.dtype_in(name, other, (x.dtype,))
        checks.same_device(name, other, "x", x)
    if lengths is not None:
        lengths = checked_integers("lengths", lengths, x, "(batch,)", (batch,))
    if mask is not None:
        mask = checked_mask(mask, x, "(batch, tokens)", (batch, tokens), batch, tokens)
    head_dim = features // heads
    if scale is None:
        scale = float(max(head_dim, 1)) ** -0.5
    scale = checks.number("scale", scale, -1e30, 1e30, described="a finite number")
    return {"lengths": lengths, "mask": mask, "cu_seqlens": cu_seqlens}, scale


def _folds(x: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, heads: int) -> bool:
    """Whether folding takes fewer operations than the ordinary way, and the weights can be multiplied by anything."""
    if checks.is_wrapped(key_weight) or checks.is_wrapped(value_weight):
        return False
    queries, dim = query.shape[-2], x.shape[-1]
    both = key_weight.shape[0] + value_weight.shape[0]
    widest = max(key_weight.shape[0], value_weight.shape[0]) // heads
    return 2 * queries * heads * dim <= (dim + queries) * both or widest > WIDEST_HEAD


def _heads_of(weight: Tensor, heads: int) -> Tensor:
    return weight.reshape(heads, weight.shape[0] // heads, weight.shape[1])


def _folded(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    heads: int,
    tokens: Arguments | None,
    scale: float,
) -> Tensor:
    """Without ``tokens``, those that count, by torch alone."""
    shared, queries, dim = query.shape[:-2], query.shape[-2], x.shape[-1]
    outer = product(shared)
    # One product per head, over the queries of all rows.
    by_head = (query * scale).reshape(outer * queries, heads, key_weight.shape[0] // heads).transpose(0, 1)
    folded = torch.bmm(by_head, _heads_of(key_weight, heads)).view(heads, outer, queries, dim)
    rows = folded.transpose(0, 1).reshape(outer, heads * queries, dim)
    if tokens is None:
        pooled = torch.softmax(rows @ x.transpose(1, 2), -1) @ x
    else:
        pooled, _ = OPERATOR(_canonical_rows(x, rows, **tokens))
    batch = pooled.shape[0]
    pooled = pooled.view(batch, heads, queries, dim).transpose(0, 1).reshape(heads, batch * queries, dim)
    values = torch.bmm(pooled, _heads_of(value_weight, heads).transpose(1, 2))
    out = (
        values.view(heads, batch, queries, values.shape[2])
        .permute(1, 2, 0, 3)
        .reshape(batch, queries, len(value_weight))
    )
    if value_bias is not None:
        out = out + value_bias
    some = None if tokens is None else _sees_some(x, **tokens)
    # Nothing of a weight or a bias, NaN or not, reaches a segment without tokens.
    return out if some is None else torch.where(some[:, None, None], out, 0.0)


def _sees_some(x: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Which segments have a token that counts, or None where all have."""
    if cu_seqlens is not None:
        return cu_seqlens[1:] > cu_seqlens[:-1]
    if lengths is None and mask is None and x.shape[1]:
        return None
    return live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device).any(1)


def _ordinary(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    heads: int,
    tokens: Arguments,
    scale: float,
) -> Tensor:
    check_values(tokens, x.shape[-2])
    # Padding may hold NaN, which must not reach the gradients of the weights.
    live = None
    if tokens["mask"] is not None or tokens["lengths"] is not None:
        live = live_tokens(x.shape[0], x.shape[1], tokens["lengths"], tokens["mask"], x.device)
        x = torch.where(live[..., None], x, 0.0)
    # Of matrix products alone there is no CUDA kernel here: torch's is taken where nothing but CUDA kernels may be.
    project = F.linear if forced() in cuda.NAMESPACES else linear
    key, value = project(x, key_weight), project(x, value_weight, value_bias)
    bounds = tokens["cu_seqlens"]
    if bounds is None:
        batch = x.shape[0]
        query = query.expand(batch, *query.shape[-2:])
        query, key, value = (
            tensor.unflatten(-1, (heads, tensor.shape[-1] // heads)).transpose(1, 2) for tensor in (query, key, value)
        )
        out = cross_attention(query, key, value, key_mask=live, scale=scale)
        return out.transpose(1, 2).flatten(2)
    batch, queries = bounds.shape[0] - 1, query.shape[-2]
    query = query.expand(batch, *query.shape[-2:]).reshape(batch * queries, -1)
    query, key, value = (tensor.unflatten(-1, (heads, tensor.shape[-1] // heads)) for tensor in (query, key, value))
    starts = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * queries
    out = cross_attention_varlen(query, key, value, starts, bounds, max_seqlen_q=queries, scale=scale)
    return out.flatten(1).view(batch, queries, -1)


def _canonical_rows(
    x: Tensor, rows: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Arguments:
    return {
        "x": unit_last_stride(x),
        "rows": rows.contiguous(),
        "lengths": lengths,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }


register_composed(attention_pool, plain)
