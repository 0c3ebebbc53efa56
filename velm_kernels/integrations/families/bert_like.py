"""VisualBERT, ViLT and FLAVA: BERT's self-attention written out by hand, mask added to the scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import dropout_p, merged_attention, split_heads, unsupported
from ..patching import Replacement, plain_linears, replaces
from ..plain import DROPOUTS

_MODELS = {
    "visual_bert": ("transformers.models.visual_bert.modeling_visual_bert", "VisualBert"),
    "vilt": ("transformers.models.vilt.modeling_vilt", "Vilt"),
    "flava": ("transformers.models.flava.modeling_flava", "Flava"),
}


class SelfAttention(Replacement):
    velm_absorbs = (("dropout", DROPOUTS),)

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> Any:
        if output_attentions:
            return self.velm_original("output_attentions=True", hidden_states, attention_mask, output_attentions)
        reason = unsupported(self.attention_head_size, attention_mask)
        if reason is not None:
            return self.velm_original(reason, hidden_states, attention_mask, output_attentions)
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        key = split_heads(self.key(hidden_states), self.attention_head_size)
        value = split_heads(self.value(hidden_states), self.attention_head_size)
        return (merged_attention(query, key, value, added=attention_mask, dropout_p=dropout_p(self, self.dropout)),)


for _family, (_module, _prefix) in _MODELS.items():
    replaces(_module, f"{_prefix}SelfAttention", family=_family, by="cross_attention")(SelfAttention)
    plain_linears(_module, f"{_prefix}Layer", family=_family)
