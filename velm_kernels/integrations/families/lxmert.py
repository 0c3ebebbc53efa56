"""LXMERT: one hand-written attention class for self-attention and for both directions of cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import dropout_p, merged_attention, split_heads, unsupported
from ..patching import Replacement, plain_linears, replaces
from ..plain import DROPOUTS

_MODULE = "transformers.models.lxmert.modeling_lxmert"


@replaces(_MODULE, "LxmertAttention", family="lxmert", by="cross_attention")
class Attention(Replacement):
    velm_absorbs = (("dropout", DROPOUTS),)

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        if output_attentions:
            return self.velm_original(
                "output_attentions=True", hidden_states, context, attention_mask, output_attentions
            )
        reason = unsupported(self.attention_head_size, attention_mask)
        if reason is not None:
            return self.velm_original(reason, hidden_states, context, attention_mask, output_attentions)
        query = split_heads(self.query(hidden_states), self.attention_head_size)
        key = split_heads(self.key(context), self.attention_head_size)
        value = split_heads(self.value(context), self.attention_head_size)
        return (merged_attention(query, key, value, added=attention_mask, dropout_p=dropout_p(self, self.dropout)),)


plain_linears(_MODULE, "LxmertLayer", family="lxmert")
plain_linears(_MODULE, "LxmertXLayer", family="lxmert")
