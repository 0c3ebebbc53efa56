"""Projections with a fused epilogue: ``activation(x weight^T + bias) + residual``."""

from velm_kernels.linear.linear import linear
from velm_kernels.linear.linear.reference import ACTIVATIONS
from velm_kernels.linear.modules import MLP, Linear, apply_linear
from velm_kernels.products import faster_than_torch

__all__ = ["ACTIVATIONS", "MLP", "Linear", "apply_linear", "faster_than_torch", "linear"]
