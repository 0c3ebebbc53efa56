"""What is checked of the arguments of both public functions, and what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.attention.cross_attention.small import MAX_HEAD_DIM
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride

# Of the operator, in their order.
NONE: Arguments = dict.fromkeys(OPERATOR.names) | {"max_seqlen_q": 0, "max_seqlen_k": 0}


def results(found: tuple[Tensor, ...], return_logsumexp: bool, return_key_mass: bool) -> Any:
    """What a public function returns of the operator's results."""
    out, logsumexp, key_mass = found
    if not (return_logsumexp or return_key_mass):
        return out
    return (out, *([logsumexp] if return_logsumexp else []), *([key_mass] if return_key_mass else []))


def heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as autocast wants them, if their dtypes, devices, heads and last dimensions are right."""
    query_heads, kv_heads = query.shape[1], key.shape[1]
    query, key, value = checks.autocast(query, key, value)
    checks.dtype_in("query", query, checks.FLOAT_DTYPES)
    for name, other in (("key", key), ("value", value)):
        checks.dtype_in(name, other, (query.dtype,))
        checks.same_device(name, other, "query", query)
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(
            f"key: expected a number of kv_heads that divides the {query_heads} heads of query, given {kv_heads}"
        )
    for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a last dimension from 1 to {MAX_HEAD_DIM}, given {size}")
    return query, key, value


def integers(name: str, given: Tensor, query: Tensor, layout: str, expected: tuple[int, ...]) -> Tensor:
    """``given`` as int32, if it has integers of the ``expected`` shape."""
    checks.tensor(name, given)
    checks.dtype_in(name, given, checks.INTEGER_DTYPES)
    checks.shape(name, given, layout, expected)
    checks.same_device(name, given, "query", query)
    return checks.as_int32(given)


def ranges(
    key_ranges: tuple[Tensor, Tensor] | None, query: Tensor, layout: str, expected: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The start and the stop of every query's range."""
    if key_ranges is None:
        return None, None
    checks.ranges("key_ranges", key_ranges)
    start = integers("key_ranges[0]", key_ranges[0], query, layout, expected)
    return start, integers("key_ranges[1]", key_ranges[1], query, layout, expected)


def rel_pos(query: Tensor, height: Tensor | None, width: Tensor | None, keys: int) -> tuple[Tensor, Tensor]:
    """The biases of the rows and of the columns of a grid of ``keys``, expanded to every query."""
    found = [_of_every_query(query, side, bias) for side, bias in (("height", height), ("width", width))]
    for one, other, bias in (("height", "width", found[0]), ("width", "height", found[1])):
        if bias is None:
            raise ValueError(f"rel_pos_{one}: expected a tensor, as rel_pos_{other} is one, given None")
    height, width = found
    assert height is not None and width is not None
    if height.shape[3] * width.shape[3] != keys:
        raise ValueError(
            f"rel_pos_height: expected key_height * key_width = {keys} keys, given {tuple(height.shape)} and "
            f"rel_pos_width {tuple(width.shape)}"
        )
    return height, width


def _of_every_query(query: Tensor, side: str, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    name, layout = f"rel_pos_{side}", f"(batch, heads, queries, key_{side})"
    checks.dtype_in(name, checks.tensor(name, bias, dims=4, layout=layout), checks.FLOAT_DTYPES)
    if checks.autocast_enabled(query.device) and bias.dtype != query.dtype:
        bias = bias.float()
    checks.dtype_in(name, bias, (query.dtype, torch.float32))
    checks.same_device(name, bias, "query", query)
    target = (*query.shape[:3], bias.shape[3])
    return unit_last_stride(checks.broadcastable(name, bias, layout, target).expand(target))


def shared(
    query: Tensor,
    *,
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
) -> Arguments:
    """What the operator is given of the arguments that both functions have; ``return_logsumexp`` costs it nothing."""
    head_dim = query.shape[-1]
    checks.flag("is_causal", is_causal)
    checks.flag("return_logsumexp", return_logsumexp)
    checks.flag("return_key_mass", return_key_mass)
    scale = head_dim**-0.5 if scale is None else checks.number("scale", scale, -1e30, 1e30, described="a finite number")
    if softcap is not None:
        softcap = checks.number("softcap", softcap, 1e-30, 1e30, described="a number greater than 0")
    norm_eps = checks.number("norm_eps", norm_eps, 1e-30, 1e30, described="a number greater than 0")
    dropout_p = checks.probability("dropout_p", dropout_p)
    weights = []
    for name, weight in (("query_norm_weight", query_norm_weight), ("key_norm_weight", key_norm_weight)):
        if weight is not None:
            checks.tensor(name, weight)
            checks.shape(name, weight, "(head_dim,)", (head_dim,))
            checks.same_device(name, weight, "query", query)
            if checks.autocast_enabled(query.device):
                weight = weight.to(query.dtype)
            checks.dtype_in(name, weight, (query.dtype,))
            weight = weight.contiguous()
        weights.append(weight)
    return {
        "query_norm_weight": weights[0],
        "key_norm_weight": weights[1],
        "seed": checks.seed_tensor(dropout_p, seed, query.device),
        "is_causal": is_causal,
        "scale": scale,
        "softcap": 0.0 if softcap is None else softcap,
        "norm_eps": norm_eps,
        "dropout_p": dropout_p,
        "return_key_mass": return_key_mass,
    }
