"""IDEFICS: gated cross-attention to pictures, the decoder around it and the perceiver. Its vision encoder has the
attention of `.idefics2`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import velm_kernels

from ..calls import split_heads, too_wide
from ..interface import implied_causal, masked_attention, rms_norm, rotate, tells, why_original
from ..patching import Replacement, plain_linears, replaces

_MODULE = "transformers.models.idefics.modeling_idefics"
_VISION = "transformers.models.idefics.vision"
_PERCEIVER = "transformers.models.idefics.perceiver"


@replaces(_MODULE, "IdeficsAttention", family="idefics", by="cross_attention")
class Attention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    rotary_emb: nn.Module
    q_layer_norm: nn.Module
    k_layer_norm: nn.Module
    is_cross_attention: bool
    qk_layer_norms: bool
    layer_idx: int
    head_dim: int
    dropout: float
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        # From the replaced layer: the mask is the model's, and rows without any picture are zeroed afterwards.
        binary = kwargs.pop("velm_binary", False)
        crossing = self.is_cross_attention or key_value_states is not None
        batch, queries, _ = hidden_states.shape
        reason = why_original(
            self,
            kwargs,
            attention_mask,
            head_dim=self.head_dim,
            batch=batch,
            queries=queries,
            binary=binary,
            norms=self.qk_layer_norms,
        )
        if reason is None and crossing and attention_mask is None:
            reason = "cross-attention without a mask"
        if reason is not None:
            return self.velm_original(
                reason, hidden_states, key_value_states, attention_mask, position_ids, past_key_values, **kwargs
            )
        states = key_value_states if crossing else hidden_states
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(states), self.head_dim)
        value = split_heads(self.v_proj(states), self.head_dim)
        if not crossing:
            cos, sin = self._rotation(value, position_ids, past_key_values)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        norms: dict[str, Any] = {}
        if self.qk_layer_norms:
            query, query_weight, eps = rms_norm(self.q_layer_norm, query)
            key, key_weight, eps = rms_norm(self.k_layer_norm, key, other=(query_weight, eps))
            norms = {"query_norm_weight": query_weight, "key_norm_weight": key_weight, "norm_eps": eps}
        out = masked_attention(
            query,
            key,
            value,
            attention_mask,
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=implied_causal(self, attention_mask, query.shape[2]),
            binary=binary,
            **norms,
        )
        return self.o_proj(out), None

    def _rotation(self, value: Tensor, position_ids: Any, past_key_values: Any) -> tuple[Tensor, Tensor]:
        if type(self.rotary_emb).__name__ == "IdeficsRotaryEmbedding":
            return self.rotary_emb(value, position_ids)
        # Older transformers keep a table of all positions.
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        cos, sin = self.rotary_emb(value, seq_len=value.shape[2] + past)
        return cos[position_ids], sin[position_ids]


@replaces(_MODULE, "IdeficsGatedCrossAttentionLayer", family="idefics", by="gated_residual")
class GatedCrossAttentionLayer(Replacement):
    velm_absorbs = (("act_cross_attn", (nn.Tanh,)), ("act_dense", (nn.Tanh,)))

    cross_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    config: float
    alpha_cross_attn: Tensor
    alpha_dense: Tensor

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        for name in ("act_cross_attn", "act_dense"):
            gate = getattr(module, name)
            if type(gate) is not nn.Tanh:
                return f"its gate {name} is a {type(gate).__name__}, not a tanh"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if image_hidden_states is None or cross_attention_gate is None or past_key_values is not None:
            return self.velm_original(
                "arguments the original refuses",
                hidden_states,
                attention_mask,
                image_hidden_states,
                image_attention_mask,
                cross_attention_gate,
                past_key_values,
                **kwargs,
            )
        attended, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden_states),
            key_value_states=image_hidden_states,
            attention_mask=image_attention_mask,
            **tells(self.cross_attn, Attention, velm_binary=True),
            **kwargs,
        )
        # `config` is the name under which the original keeps its dropout probability.
        attended = nn.functional.dropout(attended, p=self.config, training=self.training)
        hidden_states = velm_kernels.gated_residual(
            hidden_states, attended, self.alpha_cross_attn.reshape(-1), row_mask=cross_attention_gate != 0
        )
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        fed = nn.functional.dropout(fed, p=self.config, training=self.training)
        return velm_kernels.gated_residual(hidden_states, fed, self.alpha_dense.reshape(-1))


@replaces(_PERCEIVER, "IdeficsPerceiverAttention", family="idefics", by="cross_attention")
class PerceiverAttention(Replacement):
    context_layer_norm: nn.Module
    latents_layer_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    output_proj: nn.Module
    q_layer_norm: nn.Module
    k_layer_norm: nn.Module
    qk_layer_norms: bool
    head_dim: int
    qk_scale: float

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return too_wide(module.head_dim)  # type: ignore[arg-type]

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        states = torch.cat([self.context_layer_norm(context), latents], dim=-2)
        query = split_heads(self.q_proj(latents), self.head_dim)
        key = split_heads(self.k_proj(states), self.head_dim)
        value = split_heads(self.v_proj(states), self.head_dim)
        if self.qk_layer_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        return self.output_proj(masked_attention(query, key, value, None, scale=self.qk_scale))


plain_linears(_MODULE, "IdeficsDecoderLayer", family="idefics")
plain_linears(_MODULE, "IdeficsGatedCrossAttentionLayer", family="idefics")
plain_linears(_VISION, "IdeficsVisionEncoderLayer", family="idefics")
plain_linears(_PERCEIVER, "IdeficsPerceiverResampler", family="idefics")
