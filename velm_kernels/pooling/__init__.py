"""From many tokens to one vector, or to fewer tokens."""

from velm_kernels.pooling.attention_pool import attention_pool
from velm_kernels.pooling.interpolated_embedding import grid_positions, interpolated_embedding, resize_taps
from velm_kernels.pooling.merge_patches import merge_patches
from velm_kernels.pooling.merge_tokens import MergedTokens, merge_tokens, unmerge_tokens
from velm_kernels.pooling.modules import (
    AttentionalPooler,
    AttentionPool,
    AttentionPool2d,
    MaskedPool,
    PerceiverResampler,
    ProbePool,
    SegmentPool,
    TokenMerge,
)
from velm_kernels.pooling.pixel_shuffle_tokens import pixel_shuffle_tokens
from velm_kernels.pooling.pool import masked_pool, segment_pool
from velm_kernels.pooling.pool_grid import pool_grid
from velm_kernels.pooling.select_tokens import SelectedTokens, select_tokens

__all__ = [
    "AttentionPool",
    "AttentionPool2d",
    "AttentionalPooler",
    "MaskedPool",
    "MergedTokens",
    "PerceiverResampler",
    "ProbePool",
    "SegmentPool",
    "SelectedTokens",
    "TokenMerge",
    "attention_pool",
    "grid_positions",
    "interpolated_embedding",
    "masked_pool",
    "merge_patches",
    "merge_tokens",
    "pixel_shuffle_tokens",
    "pool_grid",
    "resize_taps",
    "segment_pool",
    "select_tokens",
    "unmerge_tokens",
]
