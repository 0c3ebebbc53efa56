"""CLIP: text and vision share one attention class, which goes through transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls import dropout_p, interface_attend, interface_reason, split_heads
from ..patching import Replacement, plain_linears, replaces

_MODULE = "transformers.models.clip.modeling_clip"


@replaces(_MODULE, "CLIPAttention", family="clip", by="cross_attention")
class Attention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    dropout: float
    head_dim: int
    scale: float

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        reason = interface_reason(self, kwargs, attention_mask)
        if reason is not None:
            return self.velm_original(reason, hidden_states, attention_mask, **kwargs)
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        out = interface_attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout_p=dropout_p(self, self.dropout),
            scale=self.scale,
            is_causal=kwargs.get("is_causal"),
        )
        return self.out_proj(out), None


plain_linears(_MODULE, "CLIPEncoderLayer", family="clip")
