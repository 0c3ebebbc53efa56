"""Projections with a fused epilogue: ``activation(x weight^T + bias) + residual``, and patch embeddings."""

from velm_kernels.linear.linear import linear
from velm_kernels.linear.linear.reference import ACTIVATIONS
from velm_kernels.linear.modules import MLP, Linear, PatchEmbed, apply_linear
from velm_kernels.linear.patch_embed import patch_embed
from velm_kernels.products import faster_than_torch

__all__ = ["ACTIVATIONS", "MLP", "Linear", "PatchEmbed", "apply_linear", "faster_than_torch", "linear", "patch_embed"]
