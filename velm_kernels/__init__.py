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
from velm_kernels.fusion import dropout_residual
from velm_kernels.integrations import patch, unpatch
from velm_kernels.linear import MLP, Linear, linear

__all__ = [
    "MLP",
    "BidirectionalAttention",
    "CoAttention",
    "CrossAttention",
    "GatedCrossAttention",
    "Linear",
    "__version__",
    "bidirectional_attention",
    "cross_attention",
    "cross_attention_varlen",
    "dropout_residual",
    "explain",
    "gated_residual",
    "linear",
    "merge_attention",
    "patch",
    "unpatch",
    "use_backend",
]
