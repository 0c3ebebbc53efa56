"""From many tokens to one vector, or to fewer tokens."""

from velm_kernels.pooling.attention_pool import attention_pool
from velm_kernels.pooling.modules import (
    AttentionalPooler,
    AttentionPool,
    AttentionPool2d,
    MaskedPool,
    ProbePool,
    SegmentPool,
)
from velm_kernels.pooling.pool import masked_pool, segment_pool

__all__ = [
    "AttentionPool",
    "AttentionPool2d",
    "AttentionalPooler",
    "MaskedPool",
    "ProbePool",
    "SegmentPool",
    "attention_pool",
    "masked_pool",
    "segment_pool",
]
