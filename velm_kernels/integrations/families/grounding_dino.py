"""Grounding DINO and MM Grounding DINO: fusion of picture and text in both directions, text and query attention.

The layers always ask their attention for weights and mostly drop them. Only the encoder and the decoder layer know
whether somebody reads them; they leave word of it in the attention modules, where a layer that is checkpointed finds it
again when backward runs it a second time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import velm_kernels

from .. import masks
from ..calls import WIDEST_HEAD, dropout_p, split_heads, too_wide, weights_wanted
from ..interface import masked_attention
from ..patching import Replacement, plain_linears, replaces
from ..plain import DROPOUTS

_MODELS = {
    "grounding_dino": ("transformers.models.grounding_dino.modeling_grounding_dino", "GroundingDino"),
    "mm_grounding_dino": ("transformers.models.mm_grounding_dino.modeling_mm_grounding_dino", "MMGroundingDino"),
}


class _WeightsMayBeUnread(Replacement):
    velm_weights_unread: bool = False


class Attention(_WeightsMayBeUnread):
    velm_absorbs = (("dropout", DROPOUTS),)

    query: nn.Module
    key: nn.Module
    value: nn.Module
    out_proj: nn.Module
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        reason = masks.why_not(attention_mask)
        if output_attentions and (not self.velm_weights_unread or weights_wanted(self)):
            reason = "output_attentions=True"
        elif self.attention_head_size > WIDEST_HEAD:
            reason = too_wide(self.attention_head_size)
        elif attention_mask is not None and not attention_mask.is_floating_point():
            reason = f"the mask is {attention_mask.dtype}, which the original adds to the scores"
        if reason is not None:
            return self.velm_original(reason, queries, keys, values, attention_mask, output_attentions)
        query = split_heads(self.query(queries), self.attention_head_size)
        key = split_heads(self.key(keys), self.attention_head_size)
        value = split_heads(self.value(values), self.attention_head_size)
        scale = self.attention_head_size**-0.5
        out = masked_attention(query, key, value, attention_mask, scale=scale, dropout_p=dropout_p(self, self.dropout))
        out = self.out_proj(out)
        return (out, None) if output_attentions else (out,)


class BidirectionalAttention(_WeightsMayBeUnread):
    """Scores shared by both directions.

    The original also subtracts the largest score of the batch and clamps the rest at -50000, against overflow in
    float16. Neither changes a softmax whose scores lie closer together than that; the operator keeps scores in float32.
    A sample whose pixels or tokens are all masked gives zeros, where the original gives NaN.
    """

    vision_proj: nn.Module
    text_proj: nn.Module
    values_vision_proj: nn.Module
    values_text_proj: nn.Module
    out_vision_proj: nn.Module
    out_text_proj: nn.Module
    head_dim: int
    dropout: float
    scale: float

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> Any:
        reason = None
        if not self.velm_weights_unread or weights_wanted(self):
            reason = "the attention weights are returned"
        if reason is None:
            reason = too_wide(self.head_dim)
        if reason is not None:
            return self.velm_original(
                reason, vision_features, text_features, vision_attention_mask, text_attention_mask
            )
        vision, text = velm_kernels.bidirectional_attention(
            split_heads(self.vision_proj(vision_features), self.head_dim),
            split_heads(self.text_proj(text_features), self.head_dim),
            split_heads(self.values_vision_proj(vision_features), self.head_dim),
            split_heads(self.values_text_proj(text_features), self.head_dim),
            mask_a=None if vision_attention_mask is None else ~vision_attention_mask,
            mask_b=None if text_attention_mask is None else ~text_attention_mask,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        vision = self.out_vision_proj(vision.transpose(1, 2).flatten(2))
        text = self.out_text_proj(text.transpose(1, 2).flatten(2))
        return (vision, None), (text, None)


class Encoder(Replacement):
    config: Any
    layers: nn.ModuleList

    def forward(
        self,
        vision_features: Tensor,
        vision_attention_mask: Tensor,
        vision_position_embedding: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        valid_ratios: Any = None,
        text_features: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        text_position_embedding: Tensor | None = None,
        text_self_attention_masks: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        wanted = output_attentions if output_attentions is not None else self.config.output_attentions
        for layer in self.layers:
            _leave_word(layer, "fusion_layer.attn", wanted)
            _leave_word(layer, "text_enhancer_layer.self_attn", wanted)
        return self.velm_original_class.forward(
            self,
            vision_features,
            vision_attention_mask,
            vision_position_embedding,
            spatial_shapes,
            spatial_shapes_list,
            level_start_index,
            valid_ratios,
            text_features,
            text_attention_mask,
            text_position_embedding,
            text_self_attention_masks,
            text_position_ids,
            output_attentions,
            output_hidden_states,
            return_dict,
            **kwargs,
        )


class DecoderLayer(Replacement):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        vision_encoder_hidden_states: Tensor | None = None,
        vision_encoder_attention_mask: Tensor | None = None,
        text_encoder_hidden_states: Tensor | None = None,
        text_encoder_attention_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        _leave_word(self, "self_attn", output_attentions)
        _leave_word(self, "encoder_attn_text", output_attentions)
        return self.velm_original_class.forward(
            self,
            hidden_states,
            position_embeddings,
            reference_points,
            spatial_shapes,
            spatial_shapes_list,
            level_start_index,
            vision_encoder_hidden_states,
            vision_encoder_attention_mask,
            text_encoder_hidden_states,
            text_encoder_attention_mask,
            self_attn_mask,
            output_attentions,
        )


def _leave_word(layer: nn.Module, path: str, wanted: Any) -> None:
    module: Any = layer
    for name in path.split("."):
        module = getattr(module, name, None)
    if isinstance(module, _WeightsMayBeUnread):
        module.velm_weights_unread = not wanted


for _family, (_module, _prefix) in _MODELS.items():
    _attention = replaces(_module, f"{_prefix}MultiheadAttention", family=_family, by="cross_attention")
    _attention(Attention)
    _fusion = replaces(_module, f"{_prefix}BiMultiHeadAttention", family=_family, by="bidirectional_attention")
    _fusion(BidirectionalAttention)
    replaces(_module, f"{_prefix}Encoder", family=_family, by="keeps no attention weights")(Encoder)
    replaces(_module, f"{_prefix}DecoderLayer", family=_family, by="keeps no attention weights")(DecoderLayer)
    plain_linears(_module, f"{_prefix}EncoderLayer", family=_family)
    plain_linears(_module, f"{_prefix}DecoderLayer", family=_family)
