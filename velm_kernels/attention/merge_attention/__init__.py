"""Exact merge of attention results computed over disjoint shards of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.merge_attention.op import OPERATOR
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride


def merge_attention(outs: Tensor | Sequence[Tensor], logsumexps: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over shards of the keys into attention over all of them.

    With ``logsumexp = log(sum_s exp(logsumexps[s]))``, the result is
    ``out = sum_s exp(logsumexps[s] - logsumexp) * outs[s]``: what one call over all keys gives. Flash-Decoding (Dao et
    al., 2023) merges so, and ring attention (Liu et al., 2023); the formula is that of the online softmax (Milakov and
    Gimelshein, 2018). A shard whose logsumexp is -inf for a row (it had no key for it) adds nothing
    to the row, whatever its ``outs`` holds; a row that no shard has keys for gives 0 and -inf.

    Args:
        outs: one tensor per shard, all of one shape, dtype and device, floating point, with what
            ``cross_attention`` returns: ``(batch, heads, queries, head_dim)``, or packed ``(tokens, heads, head_dim)``
            as ``cross_attention_varlen`` returns it. Or all stacked in one tensor: ``(shards, batch, heads, queries,
            head_dim)`` or ``(shards, tokens, heads, head_dim)``.
        logsumexps: of the same shards, float32 (float64 if ``outs`` is): ``(batch, heads, queries)`` each, packed
            ``(heads, tokens)`` each; or all stacked in one tensor with the shards first.

    Returns:
        ``(out, logsumexp)``: the shape and dtype of one shard of ``outs`` (in memory, the heads of one query lie next
        to each other) and of one of ``logsumexps``.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: there is no shard, or shapes, devices or numbers of shards do not agree.

    Gradients flow to ``outs`` and ``logsumexps``, from ``out`` and ``logsumexp``.

    Example:
        >>> query, key, value = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 50, 16), torch.randn(2, 4, 50, 16)
        >>> shards = [slice(0, 30), slice(30, 50)]
        >>> parts = [
        ...     velm_kernels.cross_attention(query, key[:, :, one], value[:, :, one], return_logsumexp=True)
        ...     for one in shards
        ... ]
        >>> out, logsumexp = velm_kernels.merge_attention([out for out, _ in parts], [total for _, total in parts])
        >>> torch.allclose(out, velm_kernels.cross_attention(query, key, value), atol=1e-5)
        True
    """
    arguments = canonical(outs, logsumexps)
    out, logsumexp = OPERATOR(arguments)
    if _packed(outs):
        return out[0].transpose(0, 1), logsumexp[0]
    return out, logsumexp


def _packed(outs: Tensor | Sequence[Tensor]) -> bool:
    return outs.dim() == 4 if isinstance(outs, Tensor) else outs[0].dim() == 3


def _shards(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise ValueError(f"{name}: expected shards in the first dimension, given shape ()")
        checks.dtype_in(name, value, checks.FLOAT_DTYPES)
        return list(value.unbind(0))
    shards = checks.tensors(name, value, 1)
    for i, shard in enumerate(shards):
        checks.dtype_in(f"{name}[{i}]", shard, checks.FLOAT_DTYPES)
    return shards


def canonical(outs: Tensor | Sequence[Tensor], logsumexps: Tensor | Sequence[Tensor]) -> Arguments:
    """Checks the arguments of :func:`merge_attention` and returns those of the operator: 4-D and 3-D tensors."""
    out_shards = _shards("outs", outs)
    lse_shards = _shards("logsumexps", logsumexps)
    if not out_shards:
        raise ValueError(f"outs: expected at least one shard, given {checks.describe(outs)}")
    if len(lse_shards) != len(out_shards):
        raise ValueError(
            f"logsumexps: expected as many shards as outs ({len(out_shards)}), given {checks.describe(logsumexps)}"
        )
    first = out_shards[0]
    if first.dim() not in (3, 4):
        raise ValueError(
            "outs: expected shards of shape (batch, heads, queries, head_dim) or "
            f"(tokens, heads, head_dim), given {tuple(first.shape)}"
        )
    shape = tuple(first.shape)
    lse_shape = shape[:3] if first.dim() == 4 else (shape[1], shape[0])
    lse_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for out in out_shards:
        checks.shape("outs", out, "shards of one shape", shape)
        checks.dtype_in("outs", out, (first.dtype,))
        checks.same_device("outs", out, "its first shard", first)
    for lse in lse_shards:
        checks.shape("logsumexps", lse, f"the shape for outs of {shape}", lse_shape)
        checks.dtype_in("logsumexps", lse, (lse_dtype,))
        checks.same_device("logsumexps", lse, "outs", first)
    if first.dim() == 3:
        out_shards = [out.transpose(0, 1).unsqueeze(0) for out in out_shards]
        lse_shards = [lse.unsqueeze(0) for lse in lse_shards]
    return {
        "outs": [unit_last_stride(out) for out in out_shards],
        "logsumexps": [lse.contiguous() for lse in lse_shards],
    }


OPERATOR.serves("merge_attention", canonical)
