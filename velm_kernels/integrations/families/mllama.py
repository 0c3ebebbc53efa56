"""Llama 3.2 Vision: cross-attention to image tiles with normed queries and keys, the text decoder, the tile encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import velm_kernels

from ..calls import split_heads
from ..interface import implied_causal, masked_attention, rms_norm, rotate, tells, why_original
from ..patching import Replacement, plain_linears, replaces

_MODULE = "transformers.models.mllama.modeling_mllama"


@replaces(_MODULE, "MllamaTextCrossAttention", family="mllama", by="cross_attention")
class CrossAttention(Replacement):
    """Without a mask every tile is visible, whatever the attention implementation.

    transformers' own sdpa path takes a missing mask of this class for a causal one, its eager path does not.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    layer_idx: int
    num_key_value_heads: int
    head_dim: int
    dropout: float
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        # From the replaced layer: the mask is the model's, in which rows without any picture see everything.
        binary = kwargs.pop("velm_binary", False)

        batch, queries, _ = hidden_states.shape
        reason = why_original(
            self,
            kwargs,
            attention_mask,
            head_dim=self.head_dim,
            batch=batch,
            queries=queries,
            binary=binary,
            norms=True,
        )
        if reason is not None:
            return self.velm_original(
                reason, hidden_states, cross_attention_states, past_key_values, attention_mask, use_cache, **kwargs
            )
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        query, query_weight, eps = rms_norm(self.q_norm, query)
        key_weight = None
        if cross_attention_states is not None:
            # The states come as (tiles of all samples, patches, dim), a row of projections belongs to one sample.
            key = self.k_proj(cross_attention_states).view(batch, -1, self.num_key_value_heads, self.head_dim)
            value = self.v_proj(cross_attention_states).view(batch, -1, self.num_key_value_heads, self.head_dim)
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            if past_key_values is None:
                key, key_weight, eps = rms_norm(self.k_norm, key, other=(query_weight, eps))
            else:
                # The cache holds keys that are normed already.
                key, value = past_key_values.update(self.k_norm(key), value, self.layer_idx)
        else:
            cached = past_key_values.layers[self.layer_idx]
            key, value = cached.keys, cached.values
        out = masked_attention(
            query,
            key,
            value,
            attention_mask,
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            binary=binary,
            query_norm_weight=query_weight,
            key_norm_weight=key_weight,
            norm_eps=eps,
        )
        return self.o_proj(out), None


@replaces(_MODULE, "MllamaTextSelfAttention", family="mllama", by="cross_attention")
class SelfAttention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    layer_idx: int
    head_dim: int
    dropout: float
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        batch, queries, _ = hidden_states.shape
        reason = why_original(self, kwargs, attention_mask, head_dim=self.head_dim, batch=batch, queries=queries)
        if reason is not None:
            return self.velm_original(
                reason, hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs
            )
        query = rotate(split_heads(self.q_proj(hidden_states), self.head_dim), *position_embeddings)
        key = rotate(split_heads(self.k_proj(hidden_states), self.head_dim), *position_embeddings)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out = masked_attention(
            query,
            key,
            value,
            attention_mask,
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=implied_causal(self, attention_mask, query.shape[2]),
        )
        return self.o_proj(out), None


@replaces(_MODULE, "MllamaVisionAttention", family="mllama", by="cross_attention")
class VisionAttention(Replacement):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        batch, queries, _ = hidden_states.shape
        reason = why_original(self, kwargs, attention_mask, head_dim=self.head_dim, batch=batch, queries=queries)
        if reason is not None:
            return self.velm_original(reason, hidden_states, attention_mask, **kwargs)
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        return self.o_proj(masked_attention(query, key, value, attention_mask, scale=self.scaling)), None


@replaces(_MODULE, "MllamaCrossAttentionDecoderLayer", family="mllama", by="gated_residual")
class CrossAttentionLayer(Replacement):
    cross_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    cross_attn_attn_gate: Tensor
    cross_attn_mlp_gate: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor,
        cross_attention_mask: Tensor,
        attention_mask: Tensor,
        full_text_row_masked_out_mask: Tensor | None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Where the second mask comes with the first, the model has made both: see `CrossAttention`.
        known = tells(self.cross_attn, CrossAttention, velm_binary=full_text_row_masked_out_mask is not None)
        attended, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states,
            past_key_values=past_key_values,
            **known,
            **kwargs,
        )
        hidden_states = velm_kernels.gated_residual(hidden_states, attended, self.cross_attn_attn_gate)
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        rows = None
        if full_text_row_masked_out_mask is not None:
            rows = full_text_row_masked_out_mask[:, 0, :, 0] != 0
        return velm_kernels.gated_residual(hidden_states, fed, self.cross_attn_mlp_gate, row_mask=rows)


@replaces(_MODULE, "MllamaVisionEncoderLayer", family="mllama", by="gated_residual")
class VisionLayer(Replacement):
    self_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    is_gated: bool
    gate_attn: Tensor
    gate_ffn: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Older encoders call it hidden_state; a decorator of the original forward renames it.
        if "hidden_state" in kwargs:
            kwargs["hidden_states"] = kwargs.pop("hidden_state")
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask=attention_mask)
        if not self.is_gated:
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = velm_kernels.gated_residual(hidden_states, attended, self.gate_attn)
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        return velm_kernels.gated_residual(hidden_states, fed, self.gate_ffn)


plain_linears(_MODULE, "MllamaSelfAttentionDecoderLayer", family="mllama")
plain_linears(_MODULE, "MllamaCrossAttentionDecoderLayer", family="mllama")
plain_linears(_MODULE, "MllamaVisionEncoderLayer", family="mllama")
