"""BridgeTower: text and cross-modal attention go through transformers' attention interface.

The vision tower is built from `torch.nn.MultiheadAttention` and keeps it. Its feed-forward projections are replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import interface_attend, interface_reason, split_heads
from ..patching import Replacement, plain_linears, replaces

_MODULE = "transformers.models.bridgetower.modeling_bridgetower"


class _Attention(Replacement):
    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int
    scaling: float
    layer_idx: int

    # Set by the patched BridgeTowerModel: it returns the weights of its cross-modal layers as they come.
    velm_weights_wanted = False

    def _reason(self, kwargs: dict[str, Any], mask: Any) -> str | None:
        if self.velm_weights_wanted:
            return "output_attentions=True"
        return interface_reason(self, kwargs, mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        out = interface_attend(
            self,
            query,
            key,
            value,
            mask,
            # Its dropout is no more than the place where the probability is kept.
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.scaling,
            is_causal=kwargs.get("is_causal"),
        )
        return out, None


@replaces(_MODULE, "BridgeTowerSelfAttention", family="bridgetower", by="cross_attention")
class SelfAttention(_Attention):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        reason = self._reason(kwargs, attention_mask)
        if reason is not None:
            return self.velm_original(reason, hidden_states, attention_mask, past_key_values, **kwargs)
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        key = split_heads(self.key(hidden_states), self.attention_head_size)
        value = split_heads(self.value(hidden_states), self.attention_head_size)
        if past_key_values is not None:
            # transformers' EncoderDecoderCache holds two caches; other caches are the self-attention's own.
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            key, value = cache.update(key, value, self.layer_idx)
        return self._attend(query, key, value, attention_mask, kwargs)


@replaces(_MODULE, "BridgeTowerCrossAttention", family="bridgetower", by="cross_attention")
class CrossAttention(_Attention):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        reason = self._reason(kwargs, attention_mask)
        if reason is not None:
            return self.velm_original(
                reason, hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs
            )
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key = split_heads(self.key(encoder_hidden_states), self.attention_head_size)
            value = split_heads(self.value(encoder_hidden_states), self.attention_head_size)
            if past_key_values is not None:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        return self._attend(query, key, value, attention_mask, kwargs)


@replaces(_MODULE, "BridgeTowerModel", family="bridgetower", by="attention weights only where asked for")
class Model(Replacement):
    """Tells the attention modules whether weights are wanted: the model does not hand `output_attentions` down.

    With eager attention the original returns the weights of its cross-modal layers in `attentions` also when nobody
    asked; the patched model then has None there.
    """

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        pixel_values: Any = None,
        pixel_mask: Any = None,
        inputs_embeds: Any = None,
        image_embeds: Any = None,
        image_token_type_idx: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        arguments = (
            *(input_ids, attention_mask, token_type_ids, pixel_values, pixel_mask, inputs_embeds, image_embeds),
            *(image_token_type_idx, labels, interpolate_pos_encoding),
        )
        forward = self.velm_original_class.forward
        wanted = kwargs.get("output_attentions")
        if not (self.config.output_attentions if wanted is None else wanted):  # type: ignore[union-attr]
            return forward(self, *arguments, **kwargs)
        attentions = [module for module in self.modules() if isinstance(module, _Attention)]
        try:
            for module in attentions:
                module.velm_weights_wanted = True
            return forward(self, *arguments, **kwargs)
        finally:
            for module in attentions:
                del module.velm_weights_wanted


for _layer in ("BridgeTowerTextLayer", "BridgeTowerBertCrossLayer", "BridgeTowerResidualAttention"):
    plain_linears(_MODULE, _layer, family="bridgetower")
