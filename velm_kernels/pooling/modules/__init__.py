"""The nn.Modules that pool tokens and merge them."""

from velm_kernels.pooling.modules.pools import (
    AttentionalPooler,
    AttentionPool,
    AttentionPool2d,
    MaskedPool,
    ProbePool,
    SegmentPool,
    multihead_pool,
)
from velm_kernels.pooling.modules.tokens import PerceiverResampler, TokenMerge

__all__ = [
    "AttentionPool",
    "AttentionPool2d",
    "AttentionalPooler",
    "MaskedPool",
    "PerceiverResampler",
    "ProbePool",
    "SegmentPool",
    "TokenMerge",
    "multihead_pool",
]
