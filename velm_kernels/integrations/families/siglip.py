"""SigLIP, SigLIP 2 and the like: the head that pools a picture by a learned probe.

Neither keys nor values are formed in it, see `velm_kernels.attention_pool`. The attention and the feed-forward blocks
of their towers are replaced in `.idefics2` and `.feed_forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from velm_kernels.pooling.modules import multihead_pool

from .. import multihead
from ..interface import SERVED
from ..patching import Replacement, plain_linears, replaces
from ..plain import may_read

_SIGLIP = "transformers.models.siglip.modeling_siglip"
_SIGLIP2 = "transformers.models.siglip2.modeling_siglip2"
_IDEFICS2 = "transformers.models.idefics2.modeling_idefics2"


class _Head(Replacement):
    probe: Tensor
    attention: nn.MultiheadAttention
    layernorm: nn.Module
    mlp: nn.Module

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return multihead.unsuitable(module.attention)  # type: ignore[arg-type]

    def _finish(self, pooled: Tensor) -> Tensor:
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


# Idefics2's is in transformers, but none of its models has one.
@replaces(_IDEFICS2, "Idefics2MultiheadAttentionPoolingHead", family="idefics2", by="attention_pool")
@replaces(_SIGLIP, "SiglipMultiheadAttentionPoolingHead", family="siglip", by="attention_pool")
class PoolingHead(_Head):
    def forward(self, hidden_state: Tensor) -> Tensor:
        reason = multihead.why_original(self.attention, self.probe, hidden_state)
        if reason is not None:
            return self.velm_original(reason, hidden_state)
        return self._finish(multihead_pool(self.attention, self.probe[0], hidden_state))


@replaces(_SIGLIP2, "Siglip2MultiheadAttentionPoolingHead", family="siglip2", by="attention_pool")
class MaskedPoolingHead(_Head):
    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        reason = multihead.why_original(self.attention, self.probe, hidden_state)
        mask = even = None
        if reason is None and attention_mask is not None:
            reason = self._why_not_mask(attention_mask)
            if reason is None:
                # A row in which every token is hidden counts them all evenly, as in the model.
                mask = attention_mask.bool()
                even = ~mask.any(1)[:, None, None]
                if may_read(even) and not bool(even.any()):
                    even = None
                elif may_read(even) and torch.is_grad_enabled():
                    reason = "gradient through a row in which every key is masked"
                else:
                    mask = mask | even[:, 0]
        if reason is not None:
            return self.velm_original(reason, hidden_state, attention_mask)
        return self._finish(multihead_pool(self.attention, self.probe[0], hidden_state, mask=mask, even=even))

    def _why_not_mask(self, mask: Tensor) -> str | None:
        implementation = self.config._attn_implementation  # type: ignore[union-attr]
        if implementation not in SERVED:
            return f"attn_implementation={implementation!r}"
        return None if mask.dim() == 2 else f"the mask has {mask.dim()} dimensions"


plain_linears(_SIGLIP, "SiglipEncoderLayer", family="siglip")
plain_linears(_SIGLIP, "SiglipMultiheadAttentionPoolingHead", family="siglip")
plain_linears(_SIGLIP2, "Siglip2EncoderLayer", family="siglip2")
plain_linears(_SIGLIP2, "Siglip2MultiheadAttentionPoolingHead", family="siglip2")
