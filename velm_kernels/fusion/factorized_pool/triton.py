"""factorized_pool by Triton kernels: the launches."""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.factorized_pool.triton_kernels import factorized_pool_backward_kernel, factorized_pool_kernel
from velm_kernels.triton.launches import cdiv

TILE = Config(4, 128, 4, 1)


def _shared(
    a: torch.Tensor, b: torch.Tensor, seed: torch.Tensor | None, factor: int, dropout_p: float
) -> tuple[Any, ...]:
    keep_scale = 1.0 / (1.0 - dropout_p)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    sizes = (a.shape[0] * a.shape[1], a.shape[1], a.shape[2] // factor, factor)
    return (seed, int(dropout_p * 2**32), keep_scale, *strides, *sizes)


def _constants(inner: bool, power_norm: bool, l2_norm: bool) -> dict[str, Any]:
    return {
        "INNER": inner,
        "POWER": power_norm,
        "L2": l2_norm,
        "BLOCK_M": TILE.block_m,
        "BLOCK_N": TILE.block_n,
    }


def factorized_pool_forward(
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    out: torch.Tensor,
) -> None:
    arguments = (a, b, out, *_shared(a, b, seed, factor, dropout_p))
    grid = cdiv(a.shape[0] * a.shape[1], TILE.block_m)
    launch("factorized_pool", factorized_pool_kernel, grid, arguments, _constants(inner, power_norm, l2_norm), TILE)


def factorized_pool_backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
) -> None:
    arguments = (grad, a, b, grad_a, grad_b, *_shared(a, b, seed, factor, dropout_p))
    grid = cdiv(a.shape[0] * a.shape[1], TILE.block_m)
    constants = _constants(inner, power_norm, l2_norm)
    launch("factorized_pool_backward", factorized_pool_backward_kernel, grid, arguments, constants, TILE)
