"""The written meaning of the attention operators, in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels.backends import derivatives
from velm_kernels.philox import dropout_keep, dropout_keep_at


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich, 2019)."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def visible_keys(
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    *,
    key_lengths: torch.Tensor | None = None,
    key_ranges: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Bool, broadcastable to ``(batch, heads, queries, keys)``: True where a query may attend to a key."""
    key = torch.arange(keys, device=device)
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if key_lengths is not None:
        visible = visible & (key < key_lengths[:, None, None, None])
    if key_ranges is not None:
        start, stop = key_ranges
        visible = visible & (key >= start[:, None, :, None]) & (key < stop[:, None, :, None])
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if mask is not None:
        visible = visible & mask
    if is_causal:
        visible = visible & (key <= torch.arange(queries, device=device)[:, None])
    return visible


# Terms of a product that may exist one by one.
MOST_TERMS = 1 << 24


def _one_by_one(seen: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dim: int, not_finite: bool) -> bool:
    """Whether terms of hidden pairs have to be left out of a product, since 0 times what is not finite is NaN.

    Only on the CPU and where there are few: elsewhere nothing may depend on what numbers are.
    """
    if seen.device.type != "cpu" or seen.numel() * dim > MOST_TERMS or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not_finite:
        return True
    return any(derivatives.readable(x) and not bool(x.isfinite().all()) for x in (a, b))


def _where(seen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(seen[..., None], x, x.new_zeros(()))


def products_of_rows(a: torch.Tensor, b: torch.Tensor, seen: torch.Tensor, not_finite: bool = False) -> torch.Tensor:
    """``a @ b^T`` where ``seen``; elsewhere a row of one does not meet that of the other, forward or backward.

    ``not_finite`` says that their gradients may hold NaN or infinity.
    """
    if _one_by_one(seen, a, b, a.shape[-1], not_finite):
        # Before they are multiplied, or the gradients of hidden ones would be 0 times what is not finite.
        return (_where(seen, a[..., :, None, :]) * _where(seen, b[..., None, :, :])).sum(-1)
    return a @ b.transpose(-1, -2)


def sums_of_rows(
    weights: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor, not_finite: bool = False
) -> torch.Tensor:
    """``weights @ rows`` over the rows that are ``seen``, in the same way."""
    if _one_by_one(seen, weights, rows, rows.shape[-1], not_finite):
        return (_where(seen, weights[..., None]) * _where(seen, rows[..., None, :, :])).sum(-2)
    return weights @ rows


def bias_on_grid(height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """``(..., queries, keys)``: for key ``row * key_width + column`` the bias of its row and that of its column."""
    return (height[..., :, None] + width[..., None, :]).flatten(-2)


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_lengths: torch.Tensor | None = None,
    key_ranges: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rel_pos_height: torch.Tensor | None = None,
    rel_pos_width: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    query_norm_weight: torch.Tensor | None = None,
    key_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    first_batch: int = 0,
    keep: torch.Tensor | None = None,
    not_finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, logsumexp and key mass of ``velm_kernels.cross_attention``; all arithmetic in the inputs' dtype.

    ``first_batch`` is the number of the first batch entry for the random numbers of dropout; with ``keep``, of the
    shape of the scores, dropout keeps what that says instead. ``not_finite`` says that gradients may be infinite or
    NaN.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    visible = visible_keys(
        batch,
        queries,
        keys,
        query.device,
        key_lengths=key_lengths,
        key_ranges=key_ranges,
        key_mask=key_mask,
        mask=mask,
        is_causal=is_causal,
    ).expand(batch, heads, queries, keys)
    if bias is not None:
        visible = visible & (bias != -torch.inf)

    # What nobody attends to, and who attends to nothing, is not read: zeros stand in for it.
    zero = query.new_zeros(())
    seen = visible.any(2).unflatten(1, (kv_heads, heads // kv_heads)).any(2)
    query = torch.where(visible.any(3)[..., None], query, zero)
    key = torch.where(seen[..., None], key, zero)
    value = torch.where(seen[..., None], value, zero)

    if query_norm_weight is not None:
        query = rms_norm(query, query_norm_weight, norm_eps)
    if key_norm_weight is not None:
        key = rms_norm(key, key_norm_weight, norm_eps)
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)

    scores = products_of_rows(query, key, visible, not_finite) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if rel_pos_height is not None:
        assert rel_pos_width is not None
        scores = scores + torch.where(visible, bias_on_grid(rel_pos_height, rel_pos_width), zero)
    if bias is not None:
        scores = scores + torch.where(visible, bias, zero)
    scores = scores.masked_fill(~visible, -torch.inf)

    empty = ~visible.any(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    logsumexp = torch.logsumexp(scores, -1)
    # Where a score is NaN or +inf, all weights of the row are NaN, but of the keys that it sees.
    weights = torch.where(visible, scores.softmax(-1), zero)
    key_mass = weights.detach().sum(2)
    if dropout_p > 0:
        if keep is None:
            assert seed is not None
            keep = dropout_keep(seed, batch, heads, queries, keys, dropout_p, first_batch)
        weights = torch.where(keep, weights / (1 - dropout_p), zero)
    out = sums_of_rows(weights.to(value.dtype), value, visible, not_finite)
    return out, logsumexp.masked_fill(empty, -torch.inf), key_mass


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention(a: Any, not_finite: bool = False) -> Results:
    """Output, logsumexp and key mass of the operator, from its arguments by name."""
    settings = {name: getattr(a, name) for name in ("query_norm_weight", "key_norm_weight", "scale", "norm_eps")}
    settings |= {"softcap": a.softcap or None, "dropout_p": a.dropout_p}
    if a.cu_seqlens_q is None:
        more = ("key_lengths", "key_mask", "mask", "bias", "rel_pos_height", "rel_pos_width", "is_causal", "seed")
        settings |= {name: getattr(a, name) for name in more}
        ranges = None if a.range_start is None else (a.range_start, a.range_stop)
        return cross_attention(a.query, a.key, a.value, key_ranges=ranges, not_finite=not_finite, **settings)
    if derivatives.readable(a.cu_seqlens_q) and derivatives.readable(a.cu_seqlens_k):
        return _one_by_one_packed(a, settings | {"not_finite": not_finite})
    return _all_at_once(a, settings)


def _packed(a: Any, rows: slice, cols: slice) -> list[torch.Tensor]:
    """Query, key and value of some packed tokens as those of a batch of one."""
    return [tensor.transpose(0, 1)[None] for tensor in (a.query[rows], a.key[cols], a.value[cols])]


def _one_by_one_packed(a: Any, settings: dict[str, Any]) -> Results:
    """Packed sequences one after the other."""
    outs = [a.query.new_zeros(0, a.query.shape[1], a.value.shape[2])]
    logsumexps, masses = [a.query.new_zeros(a.query.shape[1], 0)], [a.query.new_zeros(a.query.shape[1], 0)]
    offsets_q, offsets_k = a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist()
    for sequence in range(len(offsets_q) - 1):
        rows, cols = (slice(*offsets[sequence : sequence + 2]) for offsets in (offsets_q, offsets_k))
        ranges = None if a.range_start is None else (a.range_start[None, rows], a.range_stop[None, rows])
        settings |= {"key_ranges": ranges, "is_causal": a.is_causal, "seed": a.seed, "first_batch": sequence}
        out, logsumexp, mass = cross_attention(*_packed(a, rows, cols), **settings)
        outs.append(out[0].transpose(0, 1))
        logsumexps.append(logsumexp[0])
        masses.append(mass[0])
    return torch.cat(outs), torch.cat(logsumexps, 1), torch.cat(masses, 1)


def _all_at_once(a: Any, settings: dict[str, Any]) -> Results:
    """Packed sequences without reading where they begin: all queries and all keys, masked beyond their sequence."""
    of_query, i = _within(a.cu_seqlens_q.long(), a.query.shape[0])
    of_key, j = _within(a.cu_seqlens_k.long(), a.key.shape[0])
    i, of_query = i[:, None], of_query[:, None]
    mask = of_query == of_key
    if a.is_causal:
        mask = mask & (j <= i)
    if a.range_start is not None:
        mask = mask & (j >= a.range_start[:, None]) & (j < a.range_stop[:, None])
    keep = None
    if a.dropout_p > 0:
        heads = torch.arange(a.query.shape[1], device=a.query.device)[:, None, None]
        keep = dropout_keep_at(a.seed, i, j, of_query * a.query.shape[1] + heads, a.dropout_p)[None]
    packed = _packed(a, slice(None), slice(None))
    out, logsumexp, mass = cross_attention(*packed, mask=mask[None, None], keep=keep, **settings)
    return out[0].transpose(0, 1), logsumexp[0], mass[0]


def _within(bounds: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token its sequence, and its place in it."""
    token = torch.arange(tokens, device=bounds.device)
    sequence = (token[:, None] >= bounds[1:]).sum(1)
    return sequence, token - bounds[sequence]
