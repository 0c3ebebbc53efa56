"""Aria: the projector, in which learned queries attend over a picture's tokens. Its vision encoder is Idefics3's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels.linear.linear import linear

from .. import multihead
from ..calls import dropout_p, split_heads, too_wide
from ..interface import masked_attention
from ..patching import Replacement, plain_linears, replaces
from ..projections import is_plain, project

_MODULE = "transformers.models.aria.modeling_aria"


@replaces(_MODULE, "AriaCrossAttention", family="aria", by="cross_attention")
class CrossAttention(Replacement):
    """Queries, keys and values go through a projection, and through that of a `MultiheadAttention` behind it. The two
    are multiplied into one where there are more tokens than features, which halves the work on the tokens.

    The published models have 128 or 256 queries for heads of 72 columns, too many for folding them into the key weight.
    """

    num_heads: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    multihead_attn: nn.MultiheadAttention
    linear: nn.Module
    dropout: nn.Module
    layer_norm: nn.Module
    layer_norm_kv: nn.Module

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return multihead.unsuitable(module.multihead_attn)  # type: ignore[arg-type]

    def forward(self, key_value_states: Tensor, hidden_states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        inner = self.multihead_attn
        reason = multihead.why_original(inner, hidden_states, key_value_states, drops=True)
        if reason is None and inner.in_proj_weight is None:
            reason = "widths of queries, keys and values differ"
        if reason is None:
            reason = too_wide(inner.head_dim)
        if reason is None and attn_mask is not None and (attn_mask.dtype is not torch.bool or attn_mask.dim() != 3):
            reason = f"the mask is {attn_mask.dtype} with {attn_mask.dim()} dimensions"
        if reason is not None:
            return self.velm_original(reason, key_value_states, hidden_states, attn_mask)
        weights = inner.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3)
        tokens = self.layer_norm_kv(key_value_states)
        query = linear(self.q_proj(self.layer_norm(hidden_states)), weights[0], biases[0])
        key = _twice(self.k_proj, weights[1], biases[1], tokens)
        value = _twice(self.v_proj, weights[2], biases[2], tokens)
        query, key, value = (split_heads(x, inner.head_dim) for x in (query, key, value))
        mask = None
        if attn_mask is not None:
            # The same for all queries, as the model repeats it; True there means hidden.
            repeated = attn_mask.stride(1) == 0 and not torch.jit.is_tracing()
            rows = attn_mask[:, :1] if repeated else attn_mask
            mask = ~rows.unflatten(0, (-1, inner.num_heads))
        out = masked_attention(
            query, key, value, mask, scale=inner.head_dim**-0.5, dropout_p=dropout_p(inner, inner.dropout), binary=True
        )
        out = linear(out, inner.out_proj.weight, inner.out_proj.bias)
        return self.dropout(self.linear(out))


def _twice(first: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return `first(x) @ weight.T + bias`; `first` is one of Aria's projections."""
    if not is_plain(first) or first.bias is not None or x.numel() // x.shape[-1] <= x.shape[-1]:
        return linear(first(x), weight, bias)
    return linear(x, weight @ first.weight, bias)


@replaces(_MODULE, "AriaProjectorMLP", family="aria", by="linear with activation")
class ProjectorMLP(Replacement):
    linear_in: nn.Module
    linear_out: nn.Module
    act: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_out(project(self.linear_in, hidden_states, self.act))


plain_linears(_MODULE, "AriaProjector", family="aria")
