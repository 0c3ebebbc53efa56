"""Fused kernels for vision-language models."""

from velm_kernels._version import __version__
from velm_kernels.attention import cross_attention, cross_attention_varlen
from velm_kernels.backends import explain, use_backend

__all__ = [
    "__version__",
    "cross_attention",
    "cross_attention_varlen",
    "explain",
    "use_backend",
]
