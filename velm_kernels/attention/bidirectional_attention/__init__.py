"""Attention in both directions between two sequences from one matrix of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.bidirectional_attention import reference
from velm_kernels.backends import Arguments, cpu, cuda, flops, register, register_public
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.triton import register_triton
from velm_kernels.layout import empty_heads_last, unit_last_stride
from velm_kernels.philox import dropout_keep

GRAD_QUERY_A, GRAD_QUERY_B, GRAD_VALUE_A, GRAD_VALUE_B = 1, 2, 4, 8


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
    results: tuple[Tensor, ...] = call("bidirectional_attention_forward", arguments)
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


def _logsumexp_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake_forward(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = _logsumexp_dtype(query_a)
    return (
        empty_heads_last(query_a, (*query_a.shape[:3], value_b.shape[3])),
        empty_heads_last(query_b, (*query_b.shape[:3], value_a.shape[3])),
        query_a.new_empty(query_a.shape[:3], dtype=dtype),
        query_b.new_empty(query_b.shape[:3], dtype=dtype),
    )


def _fake_backward(
    grad_out_a: Tensor | None,
    grad_out_b: Tensor | None,
    grad_logsumexp_a: Tensor | None,
    grad_logsumexp_b: Tensor | None,
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    out_a: Tensor,
    out_b: Tensor,
    logsumexp_a: Tensor,
    logsumexp_b: Tensor,
    scale: float,
    dropout_p: float,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (query_a, query_b, value_a, value_b)
    return tuple(
        empty_heads_last(tensor, tensor.shape) if grad_mask >> bit & 1 else tensor.new_empty((0,))
        for bit, tensor in enumerate(inputs)
    )


_INPUTS = "Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, Tensor? mask_a, Tensor? mask_b, Tensor? seed"
# query_*, value_*: last stride 1, other strides arbitrary (may be 0). masks: (batch, a), (batch, b) bool, contiguous.
# seed: int64 scalar, given iff dropout_p > 0. Outs: (batch, heads, rows, dim) stored as (batch, rows, heads, dim);
# logsumexps contiguous float32.
declare(
    "bidirectional_attention_forward",
    f"{_INPUTS}, float scale, float dropout_p",
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
# grad_out_*: last stride 1; None if the output was not used (then so is its direction, but for grad_logsumexp_*,
# which is contiguous). Gradients are stored like the outs; what grad_mask does not ask for has shape (0,).
declare(
    "bidirectional_attention_backward",
    "Tensor? grad_out_a, Tensor? grad_out_b, Tensor? grad_logsumexp_a, Tensor? grad_logsumexp_b, "
    f"{_INPUTS}, Tensor out_a, Tensor out_b, Tensor logsumexp_a, Tensor logsumexp_b, "
    "float scale, float dropout_p, int grad_mask",
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, dropout_p, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale, ctx.dropout_p, ctx.backend = scale, dropout_p, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if all(grad is None for grad in grads):
        return (None,) * 4 + nothing
    grad_outs = [None if grad is None else unit_last_stride(grad) for grad in grads[:2]]
    grad_lses = [None if grad is None else grad.contiguous() for grad in grads[2:]]
    wanted = ctx.needs[:4]
    grad_mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
    results = ops.bidirectional_attention_backward(
        *grad_outs, *grad_lses, *ctx.saved_tensors, ctx.scale, ctx.dropout_p, grad_mask, ctx.backend
    )
    return tuple(grad if want else None for grad, want in zip(results, wanted, strict=True)) + nothing


def _flops_forward(query_a: Any, query_b: Any, value_a: Any, value_b: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, a, head_dim = query_a
    return int(2 * batch * heads * a * query_b[2] * (head_dim + value_a[3] + value_b[3]))


def _flops_backward(*args: Any, **kwargs: Any) -> int:
    query_a, query_b, value_a, value_b = args[4:8]
    batch, heads, a, head_dim = query_a
    return int(2 * batch * heads * a * query_b[2] * (3 * head_dim + 2 * value_a[3] + 2 * value_b[3]))


flops.register("bidirectional_attention_forward", _flops_forward)
flops.register("bidirectional_attention_backward", _flops_backward)


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _reference_forward(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    dtype, compute_dtype = query_a.dtype, _logsumexp_dtype(query_a)
    out_a, out_b, logsumexp_a, logsumexp_b = reference.bidirectional_attention(
        *(tensor.to(compute_dtype) for tensor in (query_a, query_b, value_a, value_b)),
        mask_a=mask_a,
        mask_b=mask_b,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )
    return (
        _heads_last(out_a.to(dtype)),
        _heads_last(out_b.to(dtype)),
        logsumexp_a.contiguous(),
        logsumexp_b.contiguous(),
    )


def _grad_of_direction(
    scores: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    grad_out: Tensor | None,
    grad_logsumexp: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores and of the values of one direction: ``dS = P * (dP - sum(P * dP))``, ``dV = P^T dO``."""
    compute_dtype = scores.dtype
    if grad_out is None:
        grad_out = value.new_zeros(*scores.shape[:-1], value.shape[-1])
    grad = grad_out.to(compute_dtype)
    hidden = scores.new_zeros((), dtype=torch.bool)
    if mask is not None:
        hidden = ~mask[:, None, None, :]
        value = value.masked_fill(hidden.transpose(-1, -2), 0.0)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    grad_weights = (grad @ value.to(compute_dtype).transpose(-1, -2)).masked_fill(hidden, 0.0)
    dropped = weights
    if keep is not None:
        dropped = torch.where(keep, weights / (1 - dropout_p), 0.0)
        grad_weights = torch.where(keep, grad_weights / (1 - dropout_p), 0.0)
    delta = (weights * grad_weights).sum(-1)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    grad_scores = (weights * (grad_weights - delta[..., None])).masked_fill(hidden, 0.0)
    return grad_scores, dropped.transpose(-1, -2) @ grad


def _reference_backward(
    grad_out_a: Tensor | None,
    grad_out_b: Tensor | None,
    grad_logsumexp_a: Tensor | None,
    grad_logsumexp_b: Tensor | None,
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    seed: Tensor | None,
    out_a: Tensor,
    out_b: Tensor,
    logsumexp_a: Tensor,
    logsumexp_b: Tensor,
    scale: float,
    dropout_p: float,
    grad_mask: int,
) -> tuple[Tensor, ...]:
    compute_dtype = logsumexp_a.dtype
    rows_a, rows_b = query_a.to(compute_dtype), query_b.to(compute_dtype)
    scores = rows_a @ rows_b.transpose(-1, -2) * scale
    batch, heads, a, b = scores.shape
    keep_a = keep_b = None
    if seed is not None:
        keep_a = dropout_keep(seed, batch, heads, a, b, dropout_p, direction=0)
        keep_b = dropout_keep(seed, batch, heads, b, a, dropout_p, direction=1)
    grad_a, grad_value_b = _grad_of_direction(scores, value_b, mask_b, keep_a, grad_out_a, grad_logsumexp_a, dropout_p)
    grad_b, grad_value_a = _grad_of_direction(
        scores.transpose(-1, -2), value_a, mask_a, keep_b, grad_out_b, grad_logsumexp_b, dropout_p
    )
    grad_scores = (grad_a + grad_b.transpose(-1, -2)) * scale
    results = (
        lambda: grad_scores @ rows_b,
        lambda: grad_scores.transpose(-1, -2) @ rows_a,
        lambda: grad_value_a,
        lambda: grad_value_b,
    )
    return tuple(
        _heads_last(result().to(query_a.dtype)) if grad_mask >> bit & 1 else query_a.new_empty((0,))
        for bit, result in enumerate(results)
    )


def _too_wide(arguments: Arguments) -> list[str]:
    names = ("query_a", "value_a", "value_b")
    return [f"{name} has {size} features, more than 256" for name in names if (size := arguments[name].shape[3]) > 256]


register_autograd(
    "bidirectional_attention_forward", _backward, setup_context=_setup_context, meaning=_reference_forward
)
register("bidirectional_attention_forward", "reference", _reference_forward)
register("bidirectional_attention_backward", "reference", _reference_backward)
register_triton("bidirectional_attention_forward", "attention.bidirectional_attention.triton", _too_wide)
register_triton("bidirectional_attention_backward", "attention.bidirectional_attention.triton", _too_wide)
cpu.register_cpu("bidirectional_attention_forward")
cpu.register_cpu("bidirectional_attention_backward")
cuda.register_cuda("bidirectional_attention_forward", _too_wide)
cuda.register_cuda("bidirectional_attention_backward", _too_wide)
register_public("bidirectional_attention", "bidirectional_attention_forward", canonical)
