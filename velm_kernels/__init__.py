"""Fused kernels for vision-language models."""

from velm_kernels._version import __version__
from velm_kernels.attention import (
    bidirectional_attention,
    cross_attention,
    cross_attention_varlen,
    gated_residual,
    merge_attention,
)
from velm_kernels.backends import explain, use_backend
from velm_kernels.integrations import patch, unpatch

__all__ = [
    "__version__",
    "bidirectional_attention",
    "cross_attention",
    "cross_attention_varlen",
    "explain",
    "gated_residual",
    "merge_attention",
    "patch",
    "unpatch",
    "use_backend",
]
