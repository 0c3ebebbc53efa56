"""Idefics2: the perceiver that resamples pictures, and the attention of the vision encoders of IDEFICS 1 to 3, SmolVLM,
SigLIP and SigLIP 2, which all have the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..calls import split_heads
from ..interface import masked_attention, why_original
from ..patching import Replacement, plain_linears, replaces

_IDEFICS_VISION = "transformers.models.idefics.vision"
_IDEFICS2 = "transformers.models.idefics2.modeling_idefics2"
_IDEFICS3 = "transformers.models.idefics3.modeling_idefics3"
_SMOLVLM = "transformers.models.smolvlm.modeling_smolvlm"
_SIGLIP = "transformers.models.siglip.modeling_siglip"
_SIGLIP2 = "transformers.models.siglip2.modeling_siglip2"


@replaces(_IDEFICS2, "Idefics2PerceiverAttention", family="idefics2", by="cross_attention")
class PerceiverAttention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    attention_dropout: float
    scaling: float

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        batch, queries, _ = latents.shape
        reason = why_original(self, kwargs, attention_mask, head_dim=self.head_dim, batch=batch, queries=queries)
        if getattr(self, "past_key_values", past_key_values) is not None:
            reason = "a cache is given"
        if reason is not None:
            return self.velm_original(reason, latents, context, attention_mask, position_ids, past_key_values, **kwargs)
        states = torch.cat([context, latents], dim=-2)
        query = split_heads(self.q_proj(latents), self.head_dim)
        key = split_heads(self.k_proj(states), self.head_dim)
        value = split_heads(self.v_proj(states), self.head_dim)
        dropout = self.attention_dropout if self.training else 0.0
        return self.o_proj(
            masked_attention(query, key, value, attention_mask, scale=self.scaling, dropout_p=dropout)
        ), None


@replaces(_IDEFICS_VISION, "IdeficsVisionAttention", family="idefics", by="cross_attention")
@replaces(_IDEFICS2, "Idefics2VisionAttention", family="idefics2", by="cross_attention")
@replaces(_IDEFICS3, "Idefics3VisionAttention", family="idefics3", by="cross_attention")
@replaces(_SMOLVLM, "SmolVLMVisionAttention", family="smolvlm", by="cross_attention")
@replaces(_SIGLIP, "SiglipAttention", family="siglip", by="cross_attention")
@replaces(_SIGLIP2, "Siglip2Attention", family="siglip2", by="cross_attention")
class VisionAttention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    head_dim: int
    dropout: float
    scale: float

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        batch, queries, _ = hidden_states.shape
        reason = why_original(self, kwargs, attention_mask, head_dim=self.head_dim, batch=batch, queries=queries)
        if reason is not None:
            return self.velm_original(reason, hidden_states, attention_mask, **kwargs)
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            masked_attention(query, key, value, attention_mask, scale=self.scale, dropout_p=dropout)
        ), None


plain_linears(_IDEFICS2, "Idefics2EncoderLayer", family="idefics2")
plain_linears(_IDEFICS2, "Idefics2PerceiverLayer", family="idefics2")
plain_linears(_IDEFICS3, "Idefics3EncoderLayer", family="idefics3")
plain_linears(_SMOLVLM, "SmolVLMEncoderLayer", family="smolvlm")
