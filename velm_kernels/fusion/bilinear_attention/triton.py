"""bilinear_attention and bilinear_attention_pool by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.fusion.bilinear_attention.reference import live_rows
from velm_kernels.fusion.bilinear_attention.triton_kernels import (
    joint_kernel,
    score_gradient_kernel,
    scores_kernel,
    side_kernel,
    softmax_kernel,
)
from velm_kernels.triton.launches import cdiv, sum_partials

# Rows of two sides in a tile; and columns, by element size.
TILE = Config(32, 16, 4, 2)
COLUMNS = {2: 64, 4: 32}
SOFTMAX = Config(256, 0, 4, 1)

Optional = torch.Tensor | None


def _live(x: torch.Tensor, lengths: Optional, mask: Optional) -> Optional:
    return None if lengths is None and mask is None else live_rows(x, lengths, mask).view(torch.uint8)


class _Pairs:
    """What the kernels of one call share."""

    def __init__(
        self,
        v: torch.Tensor,
        q: torch.Tensor,
        glimpses: int,
        v_lengths: Optional,
        q_lengths: Optional,
        v_mask: Optional,
        q_mask: Optional,
    ) -> None:
        self.v, self.q, self.glimpses = v, q, glimpses
        self.batch, self.regions, self.k = v.shape
        self.words = q.shape[1]
        self.v_live = _live(v, v_lengths, v_mask)
        self.q_live = _live(q, q_lengths, q_mask)
        self.constants: dict[str, Any] = {
            "PRECISION": precision(v.dtype),
            "BLOCK_M": TILE.block_m,
            "BLOCK_N": TILE.block_n,
            "BLOCK_K": COLUMNS[v.element_size()],
        }
        self.column_blocks = cdiv(self.k, self.constants["BLOCK_K"])

    def empty(self) -> torch.Tensor:
        """float32 for every pair."""
        return self.v.new_empty((self.batch, self.glimpses, self.regions, self.words), dtype=torch.float32)

    def scores(self, h: torch.Tensor, bias: Optional, masked: float, out: torch.Tensor) -> None:
        """h: (glimpses, k), or (batch, glimpses, k)."""
        v, q = self.v, self.q
        blocks = cdiv(self.regions, TILE.block_m), cdiv(self.words, TILE.block_n)
        strides = (v.stride(0), v.stride(1), q.stride(0), q.stride(1), self.glimpses * self.k if h.dim() == 3 else 0)
        sizes = (self.glimpses, self.regions, self.words, self.k, *blocks, masked)
        arguments = (v, q, h, bias, out, self.v_live, self.q_live, *strides, *sizes)
        grid = self.batch * self.glimpses * blocks[0] * blocks[1]
        # Of wider pieces of half precision the compiler spills some.
        constants = self.constants | {"BLOCK_K": 32}
        launch("bilinear_attention_scores", scores_kernel, grid, arguments, constants, TILE)

    def side(self, weights: torch.Tensor, h: torch.Tensor, of_v: bool, out: Optional) -> None:
        """The gradient of v or that of q, if it is wanted."""
        if out is None:
            return
        mine, other = (self.v, self.q) if of_v else (self.q, self.v)
        live, other_live = (self.v_live, self.q_live) if of_v else (self.q_live, self.v_live)
        row_blocks = cdiv(mine.shape[1], TILE.block_m)
        strides = (self.words, 1) if of_v else (1, self.words)
        h_batch = self.glimpses * self.k if h.dim() == 3 else 0
        arguments = (
            weights,
            other,
            h,
            out,
            live,
            other_live,
            *strides,
            other.stride(0),
            other.stride(1),
            h_batch,
            self.glimpses,
            mine.shape[1],
            other.shape[1],
            self.k,
            row_blocks,
            self.column_blocks,
        )
        grid = self.batch * row_blocks * self.column_blocks
        # A second stage of wide rows spills on sm_120.
        tile = replace(TILE, num_stages=1) if architecture(self.v.device) == 120 else TILE
        launch("bilinear_attention_side", side_kernel, grid, arguments, self.constants, tile)

    def joint(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """The features of pairs summed with weights, (batch, glimpses, k)."""
        v, q = self.v, self.q
        strides = (v.stride(0), v.stride(1), q.stride(0), q.stride(1))
        sizes = (self.glimpses, self.regions, self.words, self.k, self.column_blocks)
        arguments = (weights, v, q, out, self.v_live, self.q_live, *strides, *sizes)
        grid = self.batch * self.glimpses * self.column_blocks
        launch("bilinear_attention_joint", joint_kernel, grid, arguments, self.constants, TILE)


def bilinear_attention_forward(
    v: torch.Tensor,
    q: torch.Tensor,
    h: torch.Tensor,
    bias: Optional,
    v_lengths: Optional,
    q_lengths: Optional,
    v_mask: Optional,
    q_mask: Optional,
    return_logits: bool,
    maps: torch.Tensor,
    logits: Optional,
) -> None:
    p = _Pairs(v, q, h.shape[0], v_lengths, q_lengths, v_mask, q_mask)
    scores = p.empty()
    p.scores(h, bias, float("-inf"), scores)
    grid = p.batch * p.glimpses if p.regions * p.words else 0
    arguments = (scores, maps, logits, p.v_live, p.q_live, p.glimpses, p.regions, p.words)
    constants = {"BLOCK": SOFTMAX.block_m}
    launch("bilinear_attention_softmax", softmax_kernel, grid, arguments, constants, SOFTMAX)


def bilinear_attention_backward(
    grad_maps: Optional,
    grad_logits: Optional,
    v: torch.Tensor,
    q: torch.Tensor,
    h: torch.Tensor,
    v_lengths: Optional,
    q_lengths: Optional,
    v_mask: Optional,
    q_mask: Optional,
    maps: torch.Tensor,
    return_logits: bool,
    grad_v: Optional,
    grad_q: Optional,
    grad_h: Optional,
    grad_bias: Optional,
) -> None:
    p = _Pairs(v, q, h.shape[0], v_lengths, q_lengths, v_mask, q_mask)
    slopes = p.empty()
    of_bias = v.new_empty((p.batch, p.glimpses), dtype=torch.float32)
    arguments = (maps, grad_maps, grad_logits, slopes, of_bias, p.v_live, p.q_live, p.glimpses, p.regions, p.words)
    constants = {"BLOCK": SOFTMAX.block_m}
    kernel = score_gradient_kernel
    launch("bilinear_attention_slopes", kernel, p.batch * p.glimpses, arguments, constants, SOFTMAX)
    p.side(slopes, h, True, grad_v)
    p.side(slopes, h, False, grad_q)
    if grad_h is not None:
        joint = v.new_empty((p.batch, p.glimpses, p.k), dtype=torch.float32)
        p.joint(slopes, joint)
        sum_partials(joint, grad_h)
    if grad_bias is not None:
        sum_partials(of_bias, grad_bias)


def bilinear_attention_pool_forward(
    v: torch.Tensor,
    q: torch.Tensor,
    attention: torch.Tensor,
    v_lengths: Optional,
    q_lengths: Optional,
    v_mask: Optional,
    q_mask: Optional,
    out: torch.Tensor,
) -> None:
    _Pairs(v, q, attention.shape[1], v_lengths, q_lengths, v_mask, q_mask).joint(attention, out)


def bilinear_attention_pool_backward(
    grad: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    attention: torch.Tensor,
    v_lengths: Optional,
    q_lengths: Optional,
    v_mask: Optional,
    q_mask: Optional,
    grad_v: Optional,
    grad_q: Optional,
    grad_attention: Optional,
) -> None:
    p = _Pairs(v, q, attention.shape[1], v_lengths, q_lengths, v_mask, q_mask)
    p.side(attention, grad, True, grad_v)
    p.side(attention, grad, False, grad_q)
    if grad_attention is not None:
        p.scores(grad, None, 0.0, grad_attention)
