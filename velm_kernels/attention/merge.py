"""Exact merge of attention results computed over disjoint shards of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention import reference_small as reference
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.layout import unit_last_stride

GRAD_OUTS, GRAD_LOGSUMEXPS = 1, 2
# One lane of a warp holds the logsumexp of one shard (csrc/attention/merge_cuda.h).
CUDA_SHARDS = 32


def merge_attention(outs: Tensor | Sequence[Tensor], logsumexps: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over shards of the keys into attention over all of them.

    With ``logsumexp = log(sum_s exp(logsumexps[s]))``, the result is
    ``out = sum_s exp(logsumexps[s] - logsumexp) * outs[s]``: what one call over all keys gives, as in the split of
    FlashDecoding and ring attention. A shard whose logsumexp is -inf for a row (it had no key for it) adds nothing
    to the row, whatever its ``outs`` holds; a row that no shard has keys for gives 0 and -inf.

    Args:
        outs: one tensor a shard, all of one shape, dtype and device, floating point, with what
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
    """
    arguments = canonical(outs, logsumexps)
    out, logsumexp = call("merge_attention_forward", arguments)
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


def empty_heads_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised ``(batch, heads, rows, dim)`` whose memory is ``(batch, rows, heads, dim)``."""
    batch, heads, rows, dim = shape
    return like.new_empty((batch, rows, heads, dim)).transpose(1, 2)


def _fake_forward(outs: list[Tensor], logsumexps: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    return empty_heads_last(outs[0], outs[0].shape), logsumexps[0].new_empty(logsumexps[0].shape)


def _fake_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    outs: list[Tensor],
    logsumexps: list[Tensor],
    logsumexp: Tensor,
    grad_mask: int,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    grad_outs = [empty_heads_last(grad_out, grad_out.shape) for _ in logsumexps] if grad_mask & GRAD_OUTS else []
    grad_lses = [lse.new_empty(lse.shape) for lse in logsumexps] if grad_mask & GRAD_LOGSUMEXPS else []
    return grad_outs, grad_lses


# outs: (batch, heads, queries, head_dim) each, last stride 1, other strides arbitrary; logsumexps: (batch, heads,
# queries) each, contiguous, float32. Out: heads next to each other in memory; logsumexp contiguous.
declare(
    "merge_attention_forward",
    "Tensor[] outs, Tensor[] logsumexps",
    "(Tensor, Tensor)",
    fake=_fake_forward,
)
# grad_out: last stride 1; grad_logsumexp: contiguous. outs may be empty if grad_mask has no GRAD_LOGSUMEXPS. What
# grad_mask does not ask for is an empty list. With w_s = exp(lse_s - lse): grad_out_s = w_s * grad_out, and
# grad_lse_s = w_s * (grad_out . out_s - sum_t w_t * (grad_out . out_t) + grad_lse).
declare(
    "merge_attention_backward",
    "Tensor grad_out, Tensor? grad_logsumexp, Tensor[] outs, Tensor[] logsumexps, Tensor logsumexp, int grad_mask",
    "(Tensor[], Tensor[])",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, logsumexps, backend = inputs
    wants_lses = any(lse.requires_grad for lse in logsumexps)
    ctx.grad_mask = GRAD_OUTS * any(out.requires_grad for out in outs) + GRAD_LOGSUMEXPS * wants_lses
    ctx.shards = len(logsumexps)
    ctx.backend = backend
    ctx.save_for_backward(*logsumexps, output[1], *(outs if wants_lses else ()))


def _backward(
    ctx: Any, grad_out: Tensor, grad_logsumexp: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    saved = ctx.saved_tensors
    logsumexps, logsumexp, outs = saved[: ctx.shards], saved[ctx.shards], saved[ctx.shards + 1 :]
    nothing: list[Tensor | None] = [None] * ctx.shards
    grad_outs, grad_lses = ops.merge_attention_backward(
        unit_last_stride(grad_out),
        grad_logsumexp.contiguous(),
        list(outs),
        list(logsumexps),
        logsumexp,
        ctx.grad_mask,
        ctx.backend,
    )
    return grad_outs or nothing, grad_lses or nothing, None


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _reference_forward(outs: list[Tensor], logsumexps: list[Tensor]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    out, logsumexp = reference.merge_attention(torch.stack(outs).to(wide), torch.stack(logsumexps))
    return _heads_last(out.to(outs[0].dtype)), logsumexp.contiguous()


def _reference_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    outs: list[Tensor],
    logsumexps: list[Tensor],
    logsumexp: Tensor,
    grad_mask: int,
) -> tuple[list[Tensor], list[Tensor]]:
    wide = logsumexp.dtype
    lses = torch.stack(logsumexps)
    absent = lses == -torch.inf
    weights = torch.where(absent, 0.0, lses.softmax(0))
    grad = grad_out.to(wide)
    grad_outs: list[Tensor] = []
    grad_lses: list[Tensor] = []
    if grad_mask & GRAD_OUTS:
        scaled = torch.where(absent[..., None], 0.0, weights[..., None] * grad)
        grad_outs = [_heads_last(part.to(grad_out.dtype)) for part in scaled.unbind(0)]
    if grad_mask & GRAD_LOGSUMEXPS:
        stacked = torch.stack(outs).to(wide)
        products = (grad * stacked.masked_fill(absent[..., None], 0.0)).sum(-1).masked_fill(absent, 0.0)
        difference = products - (weights * products).sum(0)
        if grad_logsumexp is not None:
            difference = difference + grad_logsumexp
        grad_lses = list(torch.where(absent, 0.0, weights * difference).unbind(0))
    return grad_outs, grad_lses


register_autograd("merge_attention_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
register("merge_attention_forward", "reference", _reference_forward)
register("merge_attention_backward", "reference", _reference_backward)
cpu.register_cpu("merge_attention_forward")
cpu.register_cpu("merge_attention_backward")


def _too_many_shards(arguments: Arguments) -> list[str]:
    shards = len(arguments["logsumexps"])
    return [f"merges at most {CUDA_SHARDS} shards, given {shards}"] if shards > CUDA_SHARDS else []


cuda.register_cuda("merge_attention_forward", _too_many_shards)
cuda.register_cuda("merge_attention_backward", _too_many_shards)
triton.register_triton("merge_attention_forward", "attention.triton_small")
triton.register_triton("merge_attention_backward", "attention.triton_small")
register_public("merge_attention", "merge_attention_forward", canonical)
