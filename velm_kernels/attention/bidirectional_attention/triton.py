"""Bidirectional attention by Triton kernels: the launches, for tensors in canonical form.

Forward computes the scores twice, once for each direction; in one pass, every block of rows of `a` would leave partial
results of all of `b`. For Grounding DINO's 20,000 image and 256 text tokens of 256 dimensions per head recomputes
2.6 GFLOP, where partial results of 157 blocks of 128 rows would write and read again 256 KiB each, 82 MB: at the
200 TFLOP/s and 2 TB/s of a current GPU three times as long.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from velm_kernels.attention.bidirectional_attention.triton_kernels import grad_side_kernel
from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.attention.cross_attention.triton import delta_of, forward
from velm_kernels.attention.triton_problem import (
    GUARDED_PIECE,
    INT32_STRIDE,
    Problem,
    cdiv,
    dropout_of,
    pack_bits,
    prepare,
    row_strides,
)
from velm_kernels.backends.triton import Config, architecture, choose, launch, parts_of, piece, precision, sums_both
from velm_kernels.layout import unit_last_stride


def _direction(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    number: int,
) -> Problem:
    """One direction as ordinary attention with a key mask."""
    nothing, _ = OPERATOR.named([None] * len(OPERATOR.names))
    settings = {"is_causal": False, "scale": scale, "softcap": 0.0, "dropout_p": dropout_p}
    p = prepare(nothing._replace(value=value, key_mask=mask, seed=seed, **settings), query, key)
    if seed is None:
        return p
    return replace(p, dropout=dropout_of(seed, dropout_p, number))


def bidirectional_attention_forward(
    query_a: torch.Tensor,
    query_b: torch.Tensor,
    value_a: torch.Tensor,
    value_b: torch.Tensor,
    mask_a: torch.Tensor | None,
    mask_b: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    out_a: torch.Tensor,
    out_b: torch.Tensor,
    logsumexp_a: torch.Tensor,
    logsumexp_b: torch.Tensor,
) -> None:
    """The softmax of each direction runs along its own axis of the scores, so that each direction is a pass of the
    attention kernel."""
    forward(_direction(query_a, query_b, value_b, mask_b, seed, scale, dropout_p, 0), out_a, logsumexp_a)
    forward(_direction(query_b, query_a, value_a, mask_a, seed, scale, dropout_p, 1), out_b, logsumexp_b)


def _grad_side(
    x: dict[str, Any],
    y: dict[str, Any],
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    grad_query: torch.Tensor | None,
    grad_value: torch.Tensor | None,
) -> None:
    """Fills those gradients of the side `x`, whose other side is `y`, that are wanted."""
    query, value = x["query"], x["value"]
    batch, heads, length_x, head_dim = query.shape
    length_y = y["query"].shape[2]
    wanted = [grad for grad in (grad_query, grad_value) if grad is not None]
    if length_y == 0:
        for grad in wanted:
            grad.zero_()
        return
    tensors = (query, y["query"], value, y["value"], x["grad_out"], y["grad_out"])
    strides = [row_strides(tensor) for tensor in tensors]
    stored = [row_strides(grad) for grad in wanted]
    largest = max(stride for found in (*strides, *stored) for stride in found)

    def arguments(
        grad_query: torch.Tensor | None, grad_value: torch.Tensor | None, flags: torch.Tensor | None, blocks: int
    ) -> tuple[Any, ...]:
        return (
            *tensors,
            x["logsumexp"],
            y["logsumexp"],
            x["delta"],
            y["delta"],
            x["mask"],
            y["mask"],
            *(None if side["mask"] is None else side["mask"].stride(0) for side in (x, y)),
            *(dropout_of(seed, dropout_p, side["number"]) for side in (x, y)),
            grad_query,
            grad_value,
            flags,
            *strides,
            *(None if grad is None else row_strides(grad) for grad in (grad_query, grad_value)),
            heads,
            length_x,
            length_y,
            scale,
            blocks,
        )

    def run(config: Config) -> None:
        blocks = cdiv(length_x, config.block_m)
        constants = {
            "HAS_X": x["has_gradient"],
            "HAS_Y": y["has_gradient"],
            "GUARDED": False,
            "HEAD_DIM": head_dim,
            "DIM_X": value.shape[3],
            "DIM_Y": y["value"].shape[3],
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": piece(query.dtype, head_dim),
            "BLOCK_X": piece(query.dtype, value.shape[3]),
            "BLOCK_Y": piece(query.dtype, y["value"].shape[3]),
            "INT64": largest >= INT32_STRIDE,
            "PRECISION": precision(query.dtype),
        }
        # Where the registers do not hold both sums, each has its own pass.
        passes = {"grad_side": (grad_query, grad_value)}
        if len(stored) == 2 and not sums_both(query.dtype, head_dim + value.shape[3]):
            passes = {"grad_side_query": (grad_query, None), "grad_side_value": (None, grad_value)}
        for kind, grads in passes.items():
            parts = max(parts_of(config, query.dtype, grad.shape[-1]) for grad in grads if grad is not None)
            programs = batch * heads * blocks * parts
            constants["PARTS"] = parts
            # Where rows of x that are no keys do not see, as queries, what others see as keys.
            hides = x["mask"] is not None and y["has_gradient"] and (y["mask"] is not None or not x["has_gradient"])
            flags = (
                query.new_empty((programs * config.block_m,), dtype=torch.int8)
                if hides and grads[0] is not None
                else None
            )
            launch(kind, grad_side_kernel, programs, arguments(*grads, flags, blocks), constants, config)
            if flags is not None:
                # It rarely has anything to do: smaller tiles and rows in halves, which cost nothing.
                again = replace(config, block_n=max(16, config.block_n // 2), num_stages=1)
                if query.dtype == torch.float32 and architecture(query.device) == 80:
                    again = replace(again, num_warps=8, num_stages=2)
                of_x = constants | {"HAS_Y": False, "GUARDED": True, "BLOCK_N": again.block_n}
                for name in ("BLOCK_D", "BLOCK_X", "BLOCK_Y"):
                    of_x[name] = min(constants[name], max(GUARDED_PIECE, constants[name] // 2))
                given = arguments(grads[0], None, flags, blocks)
                launch("grad_side_guarded", grad_side_kernel, programs, given, of_x, again)

    widest = max(head_dim, value.shape[3], y["value"].shape[3])
    shape = (batch, heads, length_x, length_y)
    level = "plain" if seed is None else "loaded"
    run(choose("grad_side", level, query.dtype, widest, query.device, shape, level, run))


def bidirectional_attention_backward(
    grad_out_a: torch.Tensor | None,
    grad_out_b: torch.Tensor | None,
    grad_logsumexp_a: torch.Tensor | None,
    grad_logsumexp_b: torch.Tensor | None,
    query_a: torch.Tensor,
    query_b: torch.Tensor,
    value_a: torch.Tensor,
    value_b: torch.Tensor,
    mask_a: torch.Tensor | None,
    mask_b: torch.Tensor | None,
    seed: torch.Tensor | None,
    out_a: torch.Tensor,
    out_b: torch.Tensor,
    logsumexp_a: torch.Tensor,
    logsumexp_b: torch.Tensor,
    scale: float,
    dropout_p: float,
    grad_query_a: torch.Tensor | None,
    grad_query_b: torch.Tensor | None,
    grad_value_a: torch.Tensor | None,
    grad_value_b: torch.Tensor | None,
) -> None:
    """A pass over the scores for each side, which serves both directions."""
    sides = []
    for number, (query, key, value, other, mask, other_mask, out, lse, grad_out, grad_lse) in enumerate(
        (
            (query_a, query_b, value_a, value_b, mask_a, mask_b, out_a, logsumexp_a, grad_out_a, grad_logsumexp_a),
            (query_b, query_a, value_b, value_a, mask_b, mask_a, out_b, logsumexp_b, grad_out_b, grad_logsumexp_b),
        )
    ):
        has_gradient = grad_out is not None or grad_lse is not None
        grad = torch.zeros_like(out) if grad_out is None else unit_last_stride(grad_out)
        p = _direction(query, key, other, other_mask, seed, scale, dropout_p, number)
        delta = delta_of(p, grad, grad_lse, out, lse, None) if p.rows else torch.empty_like(lse)
        sides.append(
            {
                "number": number,
                "query": unit_last_stride(query),
                "value": unit_last_stride(value),
                "mask": None if mask is None else pack_bits(mask),
                "logsumexp": lse,
                "grad_out": grad,
                "delta": delta,
                "has_gradient": has_gradient,
            }
        )
    for x, y, grads in (
        (sides[0], sides[1], (grad_query_a, grad_value_a)),
        (sides[1], sides[0], (grad_query_b, grad_value_b)),
    ):
        if any(grad is not None for grad in grads):
            _grad_side(x, y, seed, scale, dropout_p, *grads)
