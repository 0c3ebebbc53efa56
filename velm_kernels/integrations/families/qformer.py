"""BLIP-2, InstructBLIP and InstructBLIP-Video: the Q-Former and the vision encoder before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import split_heads
from ..interface import masked_attention, why_original
from ..patching import Replacement, plain_linears, replaces

_MODELS = {
    "blip_2": ("transformers.models.blip_2.modeling_blip_2", "Blip2"),
    "instructblip": ("transformers.models.instructblip.modeling_instructblip", "InstructBlip"),
    "instructblipvideo": ("transformers.models.instructblipvideo.modeling_instructblipvideo", "InstructBlipVideo"),
}


class QFormerAttention(Replacement):
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_head_size: int
    attention_dropout: float
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        states, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            states, mask = encoder_hidden_states, encoder_attention_mask
        # A batch of one query may meet a batch of pictures.
        batch = max(hidden_states.shape[0], states.shape[0])
        queries, head_dim = hidden_states.shape[1], self.attention_head_size
        reason = why_original(self, kwargs, mask, head_dim=head_dim, batch=batch, queries=queries)
        if reason is not None:
            return self.velm_original(
                reason, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        key = split_heads(self.key(states), self.attention_head_size)
        value = split_heads(self.value(states), self.attention_head_size)
        dropout = self.attention_dropout if self.training else 0.0
        return masked_attention(query, key, value, mask, scale=self.scaling, dropout_p=dropout), None


class VisionAttention(Replacement):
    qkv: nn.Module
    projection: nn.Module
    head_dim: int
    attention_dropout: float
    scale: float

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        batch, queries, _ = hidden_states.shape
        reason = why_original(self, kwargs, None, head_dim=self.head_dim, batch=batch, queries=queries)
        if reason is not None:
            return self.velm_original(reason, hidden_states, **kwargs)
        query, key, value = (split_heads(x, self.head_dim) for x in self.qkv(hidden_states).chunk(3, dim=-1))
        dropout = self.attention_dropout if self.training else 0.0
        return self.projection(masked_attention(query, key, value, None, scale=self.scale, dropout_p=dropout)), None


for _family, (_module, _prefix) in _MODELS.items():
    replaces(_module, f"{_prefix}QFormerMultiHeadAttention", family=_family, by="cross_attention")(QFormerAttention)
    replaces(_module, f"{_prefix}Attention", family=_family, by="cross_attention")(VisionAttention)
    plain_linears(_module, f"{_prefix}QFormerLayer", family=_family)
    plain_linears(_module, f"{_prefix}EncoderLayer", family=_family)
