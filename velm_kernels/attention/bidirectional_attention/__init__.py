"""Attention in both directions between two sequences from one matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.bidirectional_attention.op import OPERATOR
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride


def bidirectional_attention(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_logsumexp: bool = False,
) -> tuple[Tensor, ...]:
    """Attention of a over b and of b over a with shared scores ``S = scale * query_a @ query_b^T``.

    ``out_a = softmax(S, over b) @ value_b`` and ``out_b = softmax(S^T, over a) @ value_a``: the bidirectional fusion
    of GLIP (Li et al., 2022) and Grounding DINO (Liu et al., 2023), and the shared cross-attention of LXMERT. S is
    never kept. The CPU kernels compute each tile of it once for both directions, forward and backward; those for GPUs
    once per direction forward, and backward once per side for both directions.

    Args:
        query_a: ``(batch, heads, a, head_dim)``; float32, bfloat16, float16, or float64 (reference backend).
        query_b: ``(batch, heads, b, head_dim)``, as all others in the dtype and on the device of ``query_a``.
        value_a: ``(batch, heads, a, value_dim_a)``, what b gathers from a.
        value_b: ``(batch, heads, b, value_dim_b)``, what a gathers from b.
        mask_a: bool ``(batch, a)``, True = may be attended by b. Elsewhere ``value_a`` is not read, and ``query_a``
            is read as a query over b only.
        mask_b: bool ``(batch, b)``, True = may be attended by a.
        scale: factor of the scores, by default ``head_dim ** -0.5``.
        dropout_p: probability in [0, 1) with which an attention weight is dropped, in each direction on its own.
        seed: integer or int64 scalar tensor that keys dropout; drawn from torch's generator if not given.
        return_logsumexp: also return the log-sum-exp of the scores over what each row may attend.

    Returns:
        ``(out_a, out_b)``, or ``(out_a, out_b, logsumexp_a, logsumexp_b)``: ``out_a (batch, heads, a, value_dim_b)``,
        ``out_b (batch, heads, b, value_dim_a)`` in the inputs' dtype (in memory, the heads of one query lie next to
        each other), ``logsumexp_a (batch, heads, a)``, ``logsumexp_b (batch, heads, b)`` in float32. Rows with nothing
        to attend are 0, their logsumexp -inf.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device or ``dropout_p`` is not as above.

    Under autocast, queries and values are cast to the autocast dtype. Gradients flow to queries and values, also from
    the logsumexps. Backward keeps the inputs, the outputs and one float per row in each direction.

    Example:
        >>> query_a, value_a = torch.randn(2, 4, 36, 16), torch.randn(2, 4, 36, 16)
        >>> query_b, value_b = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16)
        >>> out_a, out_b = velm_kernels.bidirectional_attention(query_a, query_b, value_a, value_b)
        >>> out_a.shape, out_b.shape
        (torch.Size([2, 4, 36, 16]), torch.Size([2, 4, 10, 16]))
        >>> torch.allclose(out_a, velm_kernels.cross_attention(query_a, query_b, value_b), atol=1e-5)
        True
    """
    arguments = canonical(
        query_a,
        query_b,
        value_a,
        value_b,
        mask_a=mask_a,
        mask_b=mask_b,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        return_logsumexp=return_logsumexp,
    )
    results = OPERATOR(arguments)
    return tuple(results) if return_logsumexp else tuple(results[:2])


def canonical(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_logsumexp: bool = False,
) -> Arguments:
    """Checks the arguments of :func:`bidirectional_attention` and returns those of the operator."""
    tensors = {"query_a": query_a, "query_b": query_b, "value_a": value_a, "value_b": value_b}
    if not (checks.ordinary(*tensors.values()) and all(value.dim() == 4 for value in tensors.values())):
        for name, value in tensors.items():
            checks.tensor(name, value, dims=4, layout="(batch, heads, sequence, head_dim)")
            checks.dtype_in(name, value, checks.FLOAT_DTYPES)
            checks.same_device(name, value, "query_a", query_a)
        tensors = dict(zip(tensors, checks.autocast(*tensors.values()), strict=True))
        for name, value in tensors.items():
            checks.dtype_in(name, value, (tensors["query_a"].dtype,))
    batch, heads, a, head_dim = query_a.shape
    b = query_b.shape[2]
    if head_dim == 0:
        raise ValueError(f"query_a: expected head_dim >= 1, given {tuple(query_a.shape)}")
    checks.shape("query_b", query_b, "(batch, heads, b, head_dim)", (batch, heads, b, head_dim))
    checks.shape("value_a", value_a, "(batch, heads, a, value_dim_a)", (batch, heads, a, value_a.shape[3]))
    checks.shape("value_b", value_b, "(batch, heads, b, value_dim_b)", (batch, heads, b, value_b.shape[3]))
    for name, mask, length in (("mask_a", mask_a, a), ("mask_b", mask_b, b)):
        if mask is not None:
            checks.dtype_in(name, checks.tensor(name, mask), (torch.bool,))
            checks.shape(name, mask, f"(batch, {name[-1]})", (batch, length))
            checks.same_device(name, mask, "query_a", query_a)
    dropout_p = checks.probability("dropout_p", dropout_p)
    scale = head_dim**-0.5 if scale is None else checks.number("scale", scale, -1e30, 1e30, described="a finite number")
    checks.flag("return_logsumexp", return_logsumexp)
    return {
        **{name: unit_last_stride(value) for name, value in tensors.items()},
        "mask_a": None if mask_a is None else mask_a.contiguous(),
        "mask_b": None if mask_b is None else mask_b.contiguous(),
        "seed": checks.seed_tensor(dropout_p, seed, query_a.device),
        "scale": scale,
        "dropout_p": dropout_p,
    }


OPERATOR.serves("bidirectional_attention", canonical)
