"""Fused kernels for vision-language models."""

from velm_kernels._version import __version__
from velm_kernels.attention import (
    BidirectionalAttention,
    CoAttention,
    CrossAttention,
    GatedCrossAttention,
    bidirectional_attention,
    cross_attention,
    cross_attention_varlen,
    gated_residual,
    merge_attention,
)
from velm_kernels.backends import explain, use_backend
from velm_kernels.fusion import (
    MFB,
    MLB,
    Bilinear,
    TensorFusion,
    bilinear,
    dropout_residual,
    factorized_pool,
    tensor_fusion,
)
from velm_kernels.integrations import patch, unpatch
from velm_kernels.linear import MLP, Linear, linear
from velm_kernels.pooling import (
    AttentionalPooler,
    AttentionPool,
    AttentionPool2d,
    MaskedPool,
    ProbePool,
    SegmentPool,
    attention_pool,
    masked_pool,
    pixel_shuffle_tokens,
    segment_pool,
)

__all__ = [
    "MFB",
    "MLB",
    "MLP",
    "AttentionPool",
    "AttentionPool2d",
    "AttentionalPooler",
    "BidirectionalAttention",
    "Bilinear",
    "CoAttention",
    "CrossAttention",
    "GatedCrossAttention",
    "Linear",
    "MaskedPool",
    "ProbePool",
    "SegmentPool",
    "TensorFusion",
    "__version__",
    "attention_pool",
    "bidirectional_attention",
    "bilinear",
    "cross_attention",
    "cross_attention_varlen",
    "dropout_residual",
    "explain",
    "factorized_pool",
    "gated_residual",
    "linear",
    "masked_pool",
    "merge_attention",
    "patch",
    "pixel_shuffle_tokens",
    "segment_pool",
    "tensor_fusion",
    "unpatch",
    "use_backend",
]
