"""The written meaning of the pooling operators, in plain torch."""

from velm_kernels.pooling.attention_pool.reference import attention_pool as attention_pool
from velm_kernels.pooling.merge_tokens.reference import merge_tokens as merge_tokens
from velm_kernels.pooling.merge_tokens.reference import unmerge_tokens as unmerge_tokens
from velm_kernels.pooling.pool.reference import GEM_EPS as GEM_EPS
from velm_kernels.pooling.pool.reference import MODES as MODES
from velm_kernels.pooling.pool.reference import masked_pool as masked_pool
from velm_kernels.pooling.pool.reference import segment_pool as segment_pool
from velm_kernels.pooling.select_tokens.reference import select_tokens as select_tokens
