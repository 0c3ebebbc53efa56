"""glu by Triton kernels: the launches."""

from __future__ import annotations

from torch import Tensor
from velm_kernels.fusion.glu.triton_kernels import glu_backward_kernel, glu_kernel

from velm_kernels.backends.triton import Config, launch
from velm_kernels.triton.launches import cdiv

TILE = Config(8, 256, 4, 1)
CONSTANTS = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}


def glu_forward(x: Tensor, gate: Tensor, out: Tensor) -> None:
    rows, dim = x.shape
    blocks = cdiv(dim, TILE.block_n)
    arguments = (x, gate, out, x.stride(0), gate.stride(0), rows, dim, blocks)
    launch("glu", glu_kernel, cdiv(rows, TILE.block_m) * blocks, arguments, CONSTANTS, TILE)


def glu_backward(grad: Tensor, x: Tensor | None, gate: Tensor, grad_x: Tensor | None, grad_gate: Tensor | None) -> None:
    rows, dim = grad.shape
    blocks = cdiv(dim, TILE.block_n)
    strides = (0 if x is None else x.stride(0), gate.stride(0))
    arguments = (grad, x, gate, grad_x, grad_gate, *strides, rows, dim, blocks)
    launch("glu_backward", glu_backward_kernel, cdiv(rows, TILE.block_m) * blocks, arguments, CONSTANTS, TILE)
