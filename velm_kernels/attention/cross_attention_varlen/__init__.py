"""Attention of packed sequences to one another, by the operator of :mod:`velm_kernels.attention.cross_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.cross_attention.arguments import NONE, heads, integers, ranges, results, shared
from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.backends import Arguments


def cross_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_logsumexp: bool = False,
    return_key_mass: bool = False,
) -> Any:
    """:func:`cross_attention` on sequences of different lengths packed one after the other, without padding.

    Args:
        query: ``(query_tokens, heads, head_dim)``, the sequences one after the other.
        key, value: ``(key_tokens, kv_heads, head_dim)`` and ``(key_tokens, kv_heads, value_dim)``.
        cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)`` integers: sequence s has the query tokens
            cu_seqlens_q[s] to cu_seqlens_q[s + 1] and attends to the key tokens cu_seqlens_k[s] to
            cu_seqlens_k[s + 1]. They start with 0, do not decrease and end with the number of tokens.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, by default the numbers of tokens (which is
            right, but on a GPU launches more blocks than needed).
        key_ranges: ``(start, stop)``, each ``(query_tokens,)``, counted within the sequence.

    The other arguments are those of :func:`cross_attention`; queries and keys are counted within their sequence.

    Returns:
        ``(query_tokens, heads, value_dim)``; with extras a tuple with logsumexp ``(heads, query_tokens)`` and key_mass
        ``(heads, key_tokens)``.

    Raises:
        ValueError, TypeError: as :func:`cross_attention`; also for lengths that do not fit the packed tokens.

    Example:
        >>> query = torch.randn(12, 8, 64)  # sequences of 5 and 7 queries
        >>> key = value = torch.randn(50, 8, 64)  # with 30 and 20 keys
        >>> bounds_q, bounds_k = torch.tensor([0, 5, 12]), torch.tensor([0, 30, 50])
        >>> velm_kernels.cross_attention_varlen(query, key, value, bounds_q, bounds_k).shape
        torch.Size([12, 8, 64])
    """
    arguments = canonical(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        key_ranges=key_ranges,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        query_norm_weight=query_norm_weight,
        key_norm_weight=key_norm_weight,
        norm_eps=norm_eps,
        dropout_p=dropout_p,
        seed=seed,
        return_logsumexp=return_logsumexp,
        return_key_mass=return_key_mass,
    )
    return results(OPERATOR(arguments), return_logsumexp, return_key_mass)


def canonical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> Arguments:
    """Checks the arguments of :func:`cross_attention_varlen` and gives those of its operator, in order."""
    checks.tensor("query", query, dims=3, layout="(query_tokens, heads, head_dim)")
    checks.tensor("key", key, dims=3, layout="(key_tokens, kv_heads, head_dim)")
    checks.tensor("value", value, dims=3, layout="(key_tokens, kv_heads, value_dim)")
    tokens, _, head_dim = query.shape
    key_tokens, kv_heads = key.shape[:2]
    checks.shape("key", key, "(key_tokens, kv_heads, head_dim)", (key_tokens, kv_heads, head_dim))
    checks.shape("value", value, "(key_tokens, kv_heads, value_dim)", (key_tokens, kv_heads, value.shape[2]))
    query, key, value = heads(query, key, value)

    checks.tensor("cu_seqlens_q", cu_seqlens_q, dims=1, layout="(sequences + 1,)")
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q: expected (sequences + 1,) with at least the leading 0, given (0,)")
    entries = (cu_seqlens_q.shape[0],)
    cu_seqlens_q = integers("cu_seqlens_q", cu_seqlens_q, query, "(sequences + 1,)", entries)
    cu_seqlens_k = integers("cu_seqlens_k", cu_seqlens_k, query, "(sequences + 1,)", entries)
    range_start, range_stop = ranges(key_ranges, query, "(query_tokens,)", (tokens,))
    for name, given in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if given is not None:
            checks.integer(name, given, 0, 2**31 - 1)
    return NONE | {
        "query": query,
        "key": key,
        "value": value,
        "range_start": range_start,
        "range_stop": range_stop,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": tokens if max_seqlen_q is None else max_seqlen_q,
        "max_seqlen_k": key_tokens if max_seqlen_k is None else max_seqlen_k,
        **shared(query, **settings),
    }


OPERATOR.serves("cross_attention_varlen", canonical)
