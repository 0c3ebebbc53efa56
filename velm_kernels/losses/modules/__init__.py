"""Losses as modules."""

from velm_kernels.losses.modules.linear_cross_entropy import LinearCrossEntropyLoss

__all__ = ["LinearCrossEntropyLoss"]
