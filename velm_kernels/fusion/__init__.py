"""Elementwise work of a layer in one pass over memory."""

from velm_kernels.fusion.dropout import dropout_residual

__all__ = ["dropout_residual"]
