"""open_clip: its poolers, and the blocks of its transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from velm_kernels.linear.linear import linear
from velm_kernels.pooling import AttentionPool2d as OurAttentionPool2d
from velm_kernels.pooling import masked_pool
from velm_kernels.pooling.modules import multihead_pool as pool

from .. import multihead
from ..calls import WIDEST_HEAD, dropout_p, split_heads, too_wide
from ..interface import masked_attention
from ..patching import Replacement, plain_linears, replaces
from ..plain import are_plain, is_bare, under_autocast
from ..projections import project

FAMILY = "open_clip"
_TRANSFORMER = "open_clip.transformer"
_RESNET = "open_clip.modified_resnet"
_HF = "open_clip.hf_model"


@replaces(_TRANSFORMER, "AttentionalPooler", family=FAMILY, by="attention_pool")
class AttentionalPooler(Replacement):
    """Of CoCa: learned queries attend over the picture's tokens."""

    query: Tensor
    attn: nn.MultiheadAttention
    ln_q: nn.Module
    ln_k: nn.Module

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return multihead.unsuitable(module.attn)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        reason = multihead.why_original(self.attn, self.query[None], x)
        if reason is not None:
            return self.velm_original(reason, x)
        tokens = self.ln_k(x)
        return pool(self.attn, self.ln_q(self.query), tokens)


@replaces(_RESNET, "AttentionPool2d", family=FAMILY, by="attention_pool")
class AttentionPool2d(Replacement):
    """Of CLIP's residual networks. The original forms the attention of all pixels, and throws all but one row away."""

    q_proj: nn.Linear
    positional_embedding: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # The original reads their weights and calls none of them: who listens to one hears nothing.
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            projection = getattr(self, name)
            if not is_bare(projection, nn.Linear) or not are_plain(projection.weight, projection.bias):
                return self.velm_original(f"{name} is more than a linear projection", x)
        weight = self.q_proj.weight
        if x.dim() != 4 or (x.dtype != weight.dtype and not under_autocast(x)):
            return self.velm_original(f"inputs of {x.dim()} dimensions and {x.dtype}, weights of {weight.dtype}", x)
        return OurAttentionPool2d.forward(self, x)  # type: ignore[arg-type]


@replaces(_TRANSFORMER, "ResidualAttentionBlock", family=FAMILY, by="cross_attention, linear")
class ResidualAttentionBlock(Replacement):
    """Self-attention, or in CoCa's text decoder attention over the picture, and a feed-forward block."""

    attn: nn.MultiheadAttention
    ln_1: nn.Module
    ln_2: nn.Module
    ls_1: nn.Module
    ls_2: nn.Module
    mlp: nn.Sequential

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return multihead.unsuitable(module.attn)  # type: ignore[arg-type]

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        # The original looks at other tokens only where it has a norm for them.
        context = k_x if hasattr(self, "ln_1_kv") else None
        reason = self._why_original(q_x, context, v_x if context is not None else None, attn_mask)
        if reason is not None:
            return self.velm_original(reason, q_x, k_x, v_x, attn_mask)
        x, inner = self.ln_1(q_x), self.attn
        weight, bias = inner.in_proj_weight, inner.in_proj_bias
        if context is None:
            query, key, value = linear(x, weight, bias).chunk(3, -1)
        else:
            sizes = (inner.embed_dim, 2 * inner.embed_dim)
            weights, biases = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
            query = linear(x, weights[0], biases[0])
            key, value = linear(self.ln_1_kv(context), weights[1], biases[1]).chunk(2, -1)  # type: ignore[operator]
        query, key, value = (split_heads(part, inner.head_dim) for part in (query, key, value))
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        drops = dropout_p(inner, inner.dropout)
        out = masked_attention(query, key, value, mask, scale=inner.head_dim**-0.5, dropout_p=drops)
        x = self._add(q_x, self.ls_1, inner.out_proj, out)
        return self._feed_forward(x)

    def _why_original(
        self, x: Tensor, context: Tensor | None, values: Tensor | None, mask: Tensor | None
    ) -> str | None:
        inner = self.attn
        reason = multihead.why_original(inner, x, x if context is None else context, drops=True)
        if reason is not None:
            return reason
        if context is not values:
            return "keys and values of different tokens"
        if inner.in_proj_weight is None:
            return "widths of queries, keys and values differ"
        if inner.head_dim > WIDEST_HEAD:
            return too_wide(inner.head_dim)
        if mask is not None and (mask.dim() not in (2, 3) or mask.requires_grad):
            return f"the mask has {mask.dim()} dimensions, or a gradient"
        return None

    def _feed_forward(self, x: Tensor) -> Tensor:
        mlp, normed = self.mlp, self.ln_2(x)
        if not is_bare(mlp, nn.Sequential) or [*mlp._modules] != ["c_fc", "gelu", "c_proj"]:
            return x + self.ls_2(mlp(normed))
        first, activation, second = mlp
        hidden = project(first, normed, activation)
        if _does_nothing(self.ls_2):
            return project(second, hidden, residual=x)
        return x + self.ls_2(project(second, hidden))

    @staticmethod
    def _add(x: Tensor, scale: nn.Module, projection: nn.Linear, out: Tensor) -> Tensor:
        """Return `x + scale(projection(out))`; like `MultiheadAttention`, without calling its projection."""
        if _does_nothing(scale):
            return linear(out, projection.weight, projection.bias, residual=x)
        return x + scale(linear(out, projection.weight, projection.bias))


def _does_nothing(module: nn.Module) -> bool:
    return is_bare(module, nn.Identity)


@replaces(_HF, "MeanPooler", family=FAMILY, by="masked_pool")
class MeanPooler(Replacement):
    """The masked mean over the text. A text of padding only gives 0 where the original divides by 0."""

    def forward(self, x: Any, attention_mask: Tensor) -> Tensor:
        states = x.last_hidden_state
        if attention_mask.is_floating_point() or attention_mask.shape != states.shape[:-1] or states.dim() != 3:
            return self.velm_original("a mask that is not 0 or 1 for each token", x, attention_mask)
        return masked_pool(states, mask=attention_mask.bool())


plain_linears(_TRANSFORMER, "ResidualAttentionBlock", family=FAMILY)
