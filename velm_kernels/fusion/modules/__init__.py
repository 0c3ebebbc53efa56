"""The nn.Modules that join modalities."""

from velm_kernels.fusion.modules.bilinear_attention import BilinearAttention, BilinearAttentionPool
from velm_kernels.fusion.modules.blocks import Block, BlockTucker, Tucker
from velm_kernels.fusion.modules.compact import MCB
from velm_kernels.fusion.modules.factorized import MFB, MFH, MLB, Mutan
from velm_kernels.fusion.modules.film import FiLM
from velm_kernels.fusion.modules.products import Bilinear, LowRankFusion, TensorFusion
from velm_kernels.fusion.modules.sums import ConcatMLP, LinearSum

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
    "TensorFusion",
    "Tucker",
]
