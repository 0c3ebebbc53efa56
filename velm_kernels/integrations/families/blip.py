"""BLIP: hand-written attention of the vision encoder, and of the text model, which is encoder and cached decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import dropout_p, merged_attention, split_heads, unsupported, weights_wanted
from ..patching import Replacement, plain_linears, replaces
from ..plain import DROPOUTS

_VISION = "transformers.models.blip.modeling_blip"
_TEXT = "transformers.models.blip.modeling_blip_text"


@replaces(_VISION, "BlipAttention", family="blip", by="cross_attention")
class VisionAttention(Replacement):
    velm_absorbs = (("dropout", DROPOUTS),)

    qkv: nn.Module
    projection: nn.Module
    dropout: nn.Dropout
    head_dim: int
    scale: float

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        reason = "output_attentions=True" if weights_wanted(self, kwargs) else unsupported(self.head_dim)
        if reason is not None:
            return self.velm_original(reason, hidden_states, **kwargs)
        # unbind and not three indexings: its backward writes one gradient for the whole projection, once.
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        out = merged_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=dropout_p(self, self.dropout),
            scale=self.scale,
        )
        return self.projection(out), None


@replaces(_TEXT, "BlipTextSelfAttention", family="blip", by="cross_attention")
class TextAttention(Replacement):
    """Self-attention, or cross-attention to an encoder, with or without a key and value cache."""

    velm_absorbs = (("dropout", DROPOUTS),)

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if cross else attention_mask
        reason = "output_attentions=True" if weights_wanted(self, kwargs) else None
        reason = reason or unsupported(self.attention_head_size, mask)
        if reason is not None:
            return self.velm_original(
                reason,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                **kwargs,
            )
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        key, value = self._keys_and_values(encoder_hidden_states if cross else hidden_states, cross, past_key_values)
        if mask is not None:
            mask = mask.to(query.device)
        return merged_attention(query, key, value, added=mask, dropout_p=dropout_p(self, self.dropout)), None

    def _keys_and_values(self, states: Any, cross: bool, past_key_values: Any) -> tuple[Tensor, Tensor]:
        """Project `states`, or take from the cache what an earlier step projected; return (key, value) by heads."""
        cache, seen = past_key_values, False
        paired = hasattr(past_key_values, "cross_attention_cache")  # transformers' EncoderDecoderCache
        if paired:
            seen = bool(past_key_values.is_updated.get(self.layer_idx))
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
        if cross and seen:
            return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        key = split_heads(self.key(states), self.attention_head_size)
        value = split_heads(self.value(states), self.attention_head_size)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if cross and paired:
                past_key_values.is_updated[self.layer_idx] = True
        return key, value


plain_linears(_VISION, "BlipEncoderLayer", family="blip")
plain_linears(_TEXT, "BlipTextLayer", family="blip")
