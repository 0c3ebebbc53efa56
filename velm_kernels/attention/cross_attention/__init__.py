"""Attention of the queries of one modality to the keys and values of another."""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels import checks
from velm_kernels.attention.cross_attention import small
from velm_kernels.attention.cross_attention.arguments import (
    MAX_HEAD_DIM,
    NONE,
    heads,
    integers,
    ranges,
    rel_pos,
    results,
    shared,
)
from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.backends import Arguments


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
    seed: int | torch.Tensor | None = None,
    return_logsumexp: bool = False,
    return_key_mass: bool = False,
) -> Any:
    """Scaled dot-product attention of queries to the keys and values of another modality.

    Computes, without ever forming the scores in memory (Vaswani et al., 2017; tiled as in Dao et al., 2022)::

        s = scale * query @ key^T            # after RMS norms of query and key over head_dim, where weights are given
        s = softcap * tanh(s / softcap)      # where softcap is given
        s = s + rel_pos_height[..., key // key_width] + rel_pos_width[..., key % key_width]    # where given
        s = s + bias, masked keys -> -inf
        out = dropout(softmax(s)) @ value

    On CPUs, sizes at which torch's own operators are known to be faster (:mod:`velm_kernels.processors`) are left to
    them: to its kernel, or where a gradient is recorded, to a softmax of scores that are then kept.

    Args:
        query: ``(batch, heads, queries, head_dim)``, float32, bfloat16, float16, or float64 (computed by the reference
            backend). head_dim from 1 to 512. Accumulation is in float32.
        key: ``(batch, kv_heads, keys, head_dim)``; kv_heads divides heads (grouped heads: query head h reads key
            head ``h // (heads // kv_heads)``).
        value: ``(batch, kv_heads, keys, value_dim)``, value_dim from 1 to 512.
        key_lengths: ``(batch,)`` integers: only the first key_lengths[b] keys are attended to.
        key_ranges: ``(start, stop)``, each ``(batch, queries)`` integers from 0 to keys: query i sees the keys from
            start (included) to stop (excluded), none if stop <= start. Tiles outside of every range are skipped.
        key_mask: ``(batch, keys)`` bool, True = may be attended.
        mask: bool, broadcastable to ``(batch, heads, queries, keys)``, True = may be attended.
        bias: float of query's dtype or float32, broadcastable to ``(batch, heads, queries, keys)``, added to the
            scores; differentiable, its gradient summed over broadcast dimensions. -inf masks.
        rel_pos_height, rel_pos_width: ``(batch, heads, queries, key_height)`` and ``(batch, heads, queries,
            key_width)``, the first three each that or 1, of query's dtype or float32: a bias of the row and one of the
            column in which a key stands, where the keys are a grid of ``key_height * key_width = keys``, row by row
            (the decomposed relative positions of MViTv2, Li et al., 2022, equation 4; ViTDet, SAM). Both or neither;
            differentiable. The ``(batch, heads, queries, keys)`` sums of the two never exist;
            :func:`velm_kernels.decomposed_position_bias` makes them from query and tables. They mask nothing.
        is_causal: query i sees keys 0..i, aligned at the top left like ``scaled_dot_product_attention``.
        scale: factor of the scores, default ``head_dim ** -0.5``.
        softcap: bound of the scores' magnitude before the bias (Gemma 2), default none.
        query_norm_weight, key_norm_weight: ``(head_dim,)``: RMS norm with this weight before the product;
            differentiable.
        norm_eps: added to the mean square in both norms.
        dropout_p: probability in [0, 1) with which an attention weight is dropped; those kept are divided by
            1 - dropout_p.
        seed: integer (or integer tensor with one element) that fixes which weights are dropped, the same ones on
            every backend; drawn from torch's generator where not given.
        return_logsumexp: also return the log of the sum of exp(s) of each query, ``(batch, heads, queries)`` float32,
            -inf where a query sees no key; differentiable.
        return_key_mass: also return the attention each key received, summed over queries before dropout,
            ``(batch, heads, keys)`` float32; not differentiable.

    Masks of all kinds combine with "and". A query that sees no key gives 0 and passes back 0. Keys and values that no
    query sees, and queries that see no key, are not read: what stands there changes nothing, NaN included.

    NaN and infinity come out, forward and backward, where plain PyTorch has them, and do not reach queries that do not
    see them. Rows that a finite bias such as the smallest number of a type hides altogether are the mean of all values,
    with the gradients of that; their logsumexp is known to a factor of 2.

    Returns:
        ``(batch, heads, queries, value_dim)`` in query's dtype; with extras a tuple ``(out, logsumexp, key_mass)`` of
        what was asked for, in this order.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range. Values of key_lengths and
            key_ranges are checked for CPU tensors, for others only under ``VELM_CHECK=1``; unchecked values outside
            of the keys are clamped.

    Example:
        >>> query, key, value = torch.randn(2, 8, 10, 64), torch.randn(2, 2, 50, 64), torch.randn(2, 2, 50, 64)
        >>> out = velm_kernels.cross_attention(query, key, value, key_lengths=torch.tensor([50, 20]))
        >>> out.shape
        torch.Size([2, 8, 10, 64])
        >>> start = torch.zeros(2, 10, dtype=torch.long)  # each query sees the first 25 keys
        >>> out, mass = velm_kernels.cross_attention(
        ...     query, key, value, key_ranges=(start, start + 25), return_key_mass=True
        ... )
        >>> mass.shape, float(mass[..., 25:].sum())
        (torch.Size([2, 8, 50]), 0.0)
    """
    if (
        not torch.compiler.is_compiling()
        and softcap is query_norm_weight is key_norm_weight is seed is None
        and norm_eps.__class__ is dropout_p.__class__ is float
        and dropout_p == 0.0
        and norm_eps == 1e-6
        and rel_pos_height is rel_pos_width is None
    ):
        hides = not (key_lengths is key_ranges is key_mask is mask is None)
        found: Any = None
        if not return_logsumexp is return_key_mass is False:
            if bias is None and is_causal is False and not hides:
                found = small.attend_with_extras(query, key, value, scale, return_logsumexp, return_key_mass)
        elif not hides:
            found = small.attend(query, key, value, is_causal, scale, bias)
        else:
            found = small.attend_where_visible(
                query,
                key,
                value,
                is_causal,
                scale,
                bias,
                key_lengths=key_lengths,
                key_ranges=key_ranges,
                key_mask=key_mask,
                mask=mask,
            )
        if found is not None:
            return found
        if return_logsumexp is return_key_mass is hides is False and bias is None:
            plain = _plain_arguments(query, key, value, is_causal, scale)
            if plain is not None:
                return results(OPERATOR(plain), return_logsumexp, return_key_mass)
    arguments = canonical(
        query,
        key,
        value,
        key_lengths=key_lengths,
        key_ranges=key_ranges,
        key_mask=key_mask,
        mask=mask,
        bias=bias,
        rel_pos_height=rel_pos_height,
        rel_pos_width=rel_pos_width,
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


def _by_torch(query: Any, key: Any, value: Any, **settings: Any) -> Any:
    """What :func:`cross_attention` asks of :mod:`~velm_kernels.attention.cross_attention.small`, for explain."""
    settings = dict.fromkeys(("key_lengths", "key_ranges", "key_mask", "mask", "bias", "scale")) | settings
    # It says nothing without the norms.
    settings.pop("norm_eps", None)
    asked = {name: bool(settings.pop(name, False)) for name in ("return_logsumexp", "return_key_mass")}
    is_causal = settings.pop("is_causal", False)
    hiding = {name: settings.pop(name) for name in ("key_lengths", "key_ranges", "key_mask", "mask", "bias")}
    scale = settings.pop("scale")
    if any(setting is not None and not (isinstance(setting, float) and not setting) for setting in settings.values()):
        return None
    if not any(asked.values()):
        return small.attend_where_visible(query, key, value, is_causal, scale, **hiding)
    if is_causal or any(hidden is not None for hidden in hiding.values()):
        return None
    return small.attend_with_extras(query, key, value, scale, **asked)


def canonical(
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
    **settings: Any,
) -> Arguments:
    """Checks the arguments of :func:`cross_attention` and gives those of its operator, in order."""
    checks.tensor("query", query, dims=4, layout="(batch, heads, queries, head_dim)")
    checks.tensor("key", key, dims=4, layout="(batch, kv_heads, keys, head_dim)")
    checks.tensor("value", value, dims=4, layout="(batch, kv_heads, keys, value_dim)")
    batch, query_heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    checks.shape("key", key, "(batch, kv_heads, keys, head_dim)", (batch, kv_heads, keys, head_dim))
    checks.shape("value", value, "(batch, kv_heads, keys, value_dim)", (batch, kv_heads, keys, value.shape[3]))
    query, key, value = heads(query, key, value)

    if key_lengths is not None:
        key_lengths = integers("key_lengths", key_lengths, query, "(batch,)", (batch,))
    range_start, range_stop = ranges(key_ranges, query, "(batch, queries)", (batch, queries))
    if key_mask is not None:
        checks.tensor("key_mask", key_mask)
        checks.dtype_in("key_mask", key_mask, (torch.bool,))
        checks.shape("key_mask", key_mask, "(batch, keys)", (batch, keys))
        checks.same_device("key_mask", key_mask, "query", query)
        key_mask = key_mask.contiguous()
    layout, target = "(batch, heads, queries, keys)", (batch, query_heads, queries, keys)
    if mask is not None:
        checks.tensor("mask", mask)
        checks.dtype_in("mask", mask, (torch.bool,))
        checks.same_device("mask", mask, "query", query)
        mask = checks.broadcastable("mask", mask, layout, target)
    if bias is not None:
        checks.dtype_in("bias", checks.tensor("bias", bias), checks.FLOAT_DTYPES)
        if checks.autocast_enabled(query.device) and bias.dtype != query.dtype:
            bias = bias.float()
        checks.dtype_in("bias", bias, (query.dtype, torch.float32))
        checks.same_device("bias", bias, "query", query)
        bias = checks.broadcastable("bias", bias, layout, target)
    if rel_pos_height is not None or rel_pos_width is not None:
        rel_pos_height, rel_pos_width = rel_pos(query, rel_pos_height, rel_pos_width, keys)
    return NONE | {
        "query": query,
        "key": key,
        "value": value,
        "key_lengths": key_lengths,
        "range_start": range_start,
        "range_stop": range_stop,
        "key_mask": key_mask,
        "mask": mask,
        "bias": bias,
        "rel_pos_height": rel_pos_height,
        "rel_pos_width": rel_pos_width,
        **shared(query, **settings),
    }


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What `canonical` makes of query, key and value alone.
_PLAIN_ARGUMENTS = NONE | {"softcap": 0.0, "norm_eps": 1e-6, "dropout_p": 0.0, "return_key_mass": False}


def _plain_arguments(query: Any, key: Any, value: Any, is_causal: Any, scale: Any) -> Arguments | None:
    """What :func:`canonical` gives for these alone, in a fifth of its time, where nothing is wrong with them and
    nothing is to be done about them; else None."""
    if not (query.__class__ in _PLAIN and key.__class__ in _PLAIN and value.__class__ in _PLAIN):
        return None
    dtype, device = query.dtype, query.device
    if not (dtype is key.dtype is value.dtype and dtype in checks.FLOAT_DTYPES):
        return None
    if not (device == key.device and device == value.device) or checks.autocast_enabled(device):
        return None
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if not len(of_query) == len(of_key) == len(of_value) == 4 or of_key[:3] != of_value[:3]:
        return None
    (batch, heads, _, head_dim), (key_batch, kv_heads, _, key_dim), value_dim = of_query, of_key, of_value[3]
    if batch != key_batch or head_dim != key_dim or kv_heads == 0 or heads % kv_heads:
        return None
    if not (0 < head_dim <= MAX_HEAD_DIM and 0 < value_dim <= MAX_HEAD_DIM) or is_causal.__class__ is not bool:
        return None
    if scale is None:
        scale = head_dim**-0.5
    elif scale.__class__ is not float or not -1e30 <= scale < 1e30:
        return None
    arguments = _PLAIN_ARGUMENTS.copy()
    arguments["query"], arguments["key"], arguments["value"] = query, key, value
    arguments["is_causal"], arguments["scale"] = is_causal, scale
    return arguments


OPERATOR.serves("cross_attention", canonical, _by_torch)
