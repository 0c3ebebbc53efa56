"""What joins modalities, and elementwise work of a layer in one pass over memory."""

from velm_kernels.fusion.bilinear import bilinear
from velm_kernels.fusion.bilinear_attention import bilinear_attention, bilinear_attention_pool
from velm_kernels.fusion.compact_bilinear import Sketch, compact_bilinear, make_sketch
from velm_kernels.fusion.dropout_residual import dropout_residual
from velm_kernels.fusion.factorized_pool import factorized_pool
from velm_kernels.fusion.film import film
from velm_kernels.fusion.low_rank_fusion import low_rank_fusion
from velm_kernels.fusion.modules import (
    MCB,
    MFB,
    MFH,
    MLB,
    Bilinear,
    BilinearAttention,
    BilinearAttentionPool,
    Block,
    BlockTucker,
    ConcatMLP,
    FiLM,
    LinearSum,
    LowRankFusion,
    Mutan,
    TensorFusion,
    Tucker,
)
from velm_kernels.fusion.outer_product_fusion import outer_product_fusion
from velm_kernels.fusion.tensor_fusion import tensor_fusion
from velm_kernels.fusion.weighted_sum import weighted_sum

__all__ = [
    "MCB",
    "MFB",
    "MFH",
    "MLB",
    "Bilinear",
    "BilinearAttention",
    "BilinearAttentionPool",
    "Block",
    "BlockTucker",
    "ConcatMLP",
    "FiLM",
    "LinearSum",
    "LowRankFusion",
    "Mutan",
    "Sketch",
    "TensorFusion",
    "Tucker",
    "bilinear",
    "bilinear_attention",
    "bilinear_attention_pool",
    "compact_bilinear",
    "dropout_residual",
    "factorized_pool",
    "film",
    "low_rank_fusion",
    "make_sketch",
    "outer_product_fusion",
    "tensor_fusion",
    "weighted_sum",
]
