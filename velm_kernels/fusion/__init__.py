"""What joins modalities, and elementwise work of a layer in one pass over memory."""

from velm_kernels.fusion.bilinear import bilinear
from velm_kernels.fusion.dropout import dropout_residual
from velm_kernels.fusion.factorized import factorized_pool
from velm_kernels.fusion.modules import Bilinear

__all__ = ["Bilinear", "bilinear", "dropout_residual", "factorized_pool"]
