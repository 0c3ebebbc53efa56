"""Rows of the result as weighted sums of a few rows of the input: what interpolates tables and maps of tokens."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride
from velm_kernels.pooling.weighted_rows.op import weights_dtype


def weighted_rows_arguments(x: Tensor, indices: Tensor, weights: Tensor) -> Arguments:
    """The arguments of the operator for checked ones of any layout: x ``(batch, rows, dim)``, indices of any integer
    dtype and weights of any floating one ``(n, taps)``."""
    return {
        "x": unit_last_stride(x),
        "indices": indices.int().contiguous(),
        "weights": weights.to(weights_dtype(x)).contiguous(),
    }
