"""Losses as modules."""

from velm_kernels.losses.modules.linear_cross_entropy import LinearCrossEntropyLoss
from velm_kernels.losses.modules.pairs import CoCaLoss, ContrastiveLoss, SigmoidLoss

__all__ = ["CoCaLoss", "ContrastiveLoss", "LinearCrossEntropyLoss", "SigmoidLoss"]
