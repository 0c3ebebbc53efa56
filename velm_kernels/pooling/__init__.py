"""From many tokens to one vector, or to fewer tokens."""

from velm_kernels.pooling.pool import masked_pool, segment_pool

__all__ = ["masked_pool", "segment_pool"]
