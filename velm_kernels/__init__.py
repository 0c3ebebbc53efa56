"""Fused kernels for vision-language models."""

from velm_kernels.attention import cross_attention, cross_attention_varlen
from velm_kernels.backends import explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "cross_attention",
    "cross_attention_varlen",
    "explain",
    "use_backend",
]
