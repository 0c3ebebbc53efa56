"""Cross-modal attention: operators and modules."""

from velm_kernels.attention.bidirectional_attention import bidirectional_attention
from velm_kernels.attention.cross_attention import cross_attention
from velm_kernels.attention.cross_attention_varlen import cross_attention_varlen
from velm_kernels.attention.gated_residual import gated_residual
from velm_kernels.attention.merge_attention import merge_attention
from velm_kernels.attention.modules import BidirectionalAttention, CoAttention, CrossAttention, GatedCrossAttention
from velm_kernels.attention.multiscale_deformable_attention import multiscale_deformable_attention
from velm_kernels.attention.position_bias import decomposed_position_bias

__all__ = [
    "BidirectionalAttention",
    "CoAttention",
    "CrossAttention",
    "GatedCrossAttention",
    "bidirectional_attention",
    "cross_attention",
    "cross_attention_varlen",
    "decomposed_position_bias",
    "gated_residual",
    "merge_attention",
    "multiscale_deformable_attention",
]
