"""The operator merge_attention: results over shards of the keys, (batch, heads, queries, head_dim) each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.merge_attention.reference import merge_attention
from velm_kernels.backends import Arguments
from velm_kernels.layout import empty_heads_last, unit_last_stride
from velm_kernels.operator import Operator

# One lane of a warp holds the logsumexp of one shard (csrc/attention/merge_attention/cuda.h).
CUDA_SHARDS = 32


def meaning(outs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return merge_attention(torch.stack(list(outs)), torch.stack(list(logsumexps)))


def gradients(a: Any, wanted: Sequence[Any]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """With w_s = exp(lse_s - lse): grad_out_s = w_s * grad_out, and
    grad_lse_s = w_s * (grad_out . out_s - sum_t w_t * (grad_out . out_t) + grad_lse)."""
    of_outs, of_lses = wanted
    lses = torch.stack(a.logsumexps)
    absent = lses == -torch.inf
    weights = torch.where(absent, 0.0, lses.softmax(0))
    grad_outs: list[Tensor | None] = [None] * len(of_outs)
    grad_lses: list[Tensor | None] = [None] * len(of_lses)
    if any(of_outs):
        grad_outs = list(torch.where(absent[..., None], 0.0, weights[..., None] * a.grad_out).unbind(0))
    if any(of_lses):
        outs = torch.stack(a.outs).masked_fill(absent[..., None], 0.0)
        products = (a.grad_out * outs).sum(-1).masked_fill(absent, 0.0)
        difference = products - (weights * products).sum(0)
        if a.grad_logsumexp is not None:
            difference = difference + a.grad_logsumexp
        grad_lses = list(torch.where(absent, 0.0, weights * difference).unbind(0))
    return grad_outs, grad_lses


def _empty(a: Any) -> tuple[Tensor, Tensor]:
    lse = a.logsumexps[0]
    return empty_heads_last(a.outs[0], a.outs[0].shape), lse.new_empty(lse.shape)


def _incoming(grad: Tensor, a: Any) -> Tensor:
    return unit_last_stride(grad) if grad.dim() == 4 else grad.contiguous()


def _too_many_shards(arguments: Arguments) -> list[str]:
    shards = len(arguments["logsumexps"])
    return [f"merges at most {CUDA_SHARDS} shards, given {shards}"] if shards > CUDA_SHARDS else []


# outs: (batch, heads, queries, head_dim) each, last stride 1, other strides arbitrary; logsumexps: (batch, heads,
# queries) each, contiguous, float32. Out and gradients of outs: heads next to each other in memory; logsumexp and its
# gradients contiguous.
OPERATOR = Operator(
    "merge_attention",
    "Tensor[] outs, Tensor[] logsumexps",
    shapes=_empty,
    reference=meaning,
    results=("out", "logsumexp"),
    may_lack=("logsumexp",),
    differentiable=("outs", "logsumexps"),
    saves={"outs": ("logsumexps", "logsumexp"), "logsumexps": ("outs", "logsumexps", "logsumexp")},
    gradients=gradients,
    gradient_shapes={"outs": lambda a, i: empty_heads_last(a.grad_out, a.grad_out.shape)},
    incoming=_incoming,
    triton="attention.merge_attention.triton",
    reasons={"cuda": _too_many_shards, "device_on_host": _too_many_shards},
)
