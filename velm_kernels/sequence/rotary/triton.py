"""rotary and normed_rotary by Triton kernels: the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.layout import empty_like
from velm_kernels.sequence.rotary.triton_kernels import (
    normed_rotary_backward_kernel,
    normed_rotary_kernel,
    rotary_kernel,
    rotary_tables_kernel,
)
from velm_kernels.triton.launches import cdiv, sum_partials

TILE = Config(4, 0, 4, 1)


def _power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _constants(layout: int, head_dim: int, rotated: int) -> dict[str, Any]:
    """Blocks of all pairs, and of all columns that are not rotated."""
    blocks = {"BLOCK_M": TILE.block_m, "BLOCK_P": _power_of_2(rotated // 2), "BLOCK_R": _power_of_2(head_dim - rotated)}
    return {"LAYOUT": layout, **blocks}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:-1])


def _rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: int,
    rotated_query: Tensor | None,
    rotated_key: Tensor | None,
    back: bool,
) -> None:
    batch, _, tokens, head_dim = query.shape
    rotated, blocks = cos.shape[2], cdiv(tokens, TILE.block_m)
    query_heads = 0 if rotated_query is None else query.shape[1]
    key_heads = 0 if rotated_key is None else key.shape[1]
    # What has no heads is not written.
    to_query = query if rotated_query is None else rotated_query
    to_key = key if rotated_key is None else rotated_key
    sizes = (query_heads, key_heads, tokens, head_dim, rotated, blocks)
    arguments = (query, key, cos, sin, to_query, to_key, *_strides(query, key, to_query, to_key, cos, sin), *sizes)
    constants = {"BACK": back, **_constants(layout, head_dim, rotated)}
    launch("rotary", rotary_kernel, batch * blocks, arguments, constants, TILE)


def _tables(
    grads: tuple[Tensor, Tensor],
    given: tuple[Tensor, Tensor],
    layout: int,
    rotated: int,
    grad_cos: Tensor | None,
    grad_sin: Tensor | None,
) -> None:
    batch, query_heads, tokens, head_dim = grads[0].shape
    blocks = cdiv(tokens, TILE.block_m)
    sizes = (query_heads, grads[1].shape[1], tokens, rotated, blocks)
    constants = _constants(layout, head_dim, rotated)
    del constants["BLOCK_R"]
    arguments = (*grads, *given, grad_cos, grad_sin, *_strides(*grads, *given), *sizes)
    launch("rotary_tables", rotary_tables_kernel, batch * blocks, arguments, constants, TILE)


def rotary_forward(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: int,
    query_heads_last: bool,
    key_heads_last: bool,
    rotated_query: Tensor,
    rotated_key: Tensor,
) -> None:
    _rotate(query, key, cos, sin, layout, rotated_query, rotated_key, back=False)


def rotary_backward(
    grad_rotated_query: Tensor,
    grad_rotated_key: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: int,
    query_heads_last: bool,
    key_heads_last: bool,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_cos: Tensor | None,
    grad_sin: Tensor | None,
) -> None:
    grads = grad_rotated_query, grad_rotated_key
    if grad_query is not None or grad_key is not None:
        _rotate(*grads, cos, sin, layout, grad_query, grad_key, back=True)
    if query is not None and key is not None and not grad_cos is grad_sin is None:
        _tables(grads, (query, key), layout, cos.shape[2], grad_cos, grad_sin)


def _is_over_heads(weight: Tensor, x: Tensor) -> bool:
    return weight.numel() != x.shape[3]


def _normed(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, norm_eps: float, layout: int, out: Tensor) -> None:
    batch, heads, tokens, head_dim = x.shape
    rotated, blocks = cos.shape[2], cdiv(tokens, TILE.block_m)
    sizes = (norm_eps, heads, tokens, head_dim, rotated, blocks)
    constants = {"OVER_HEADS": _is_over_heads(weight, x), **_constants(layout, head_dim, rotated)}
    arguments = (x, weight, cos, sin, out, *_strides(x, out, cos, sin), *sizes)
    launch("normed_rotary", normed_rotary_kernel, batch * blocks, arguments, constants, TILE)


def normed_rotary_forward(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm_weight: Tensor | None,
    key_norm_weight: Tensor | None,
    norm_eps: float,
    layout: int,
    query_heads_last: bool,
    key_heads_last: bool,
    rotated_query: Tensor,
    rotated_key: Tensor,
) -> None:
    if query_norm_weight is not None:
        _normed(query, query_norm_weight, cos, sin, norm_eps, layout, rotated_query)
    if key_norm_weight is not None:
        _normed(key, key_norm_weight, cos, sin, norm_eps, layout, rotated_key)
    plain_query = rotated_query if query_norm_weight is None else None
    plain_key = rotated_key if key_norm_weight is None else None
    if not plain_query is plain_key is None:
        _rotate(query, key, cos, sin, layout, plain_query, plain_key, back=False)


def _normed_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
    layout: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    batch, heads, tokens, head_dim = x.shape
    rotated, blocks = cos.shape[2], cdiv(tokens, TILE.block_m)
    partial = None
    if grad_weight is not None:
        partial = grad.new_empty((batch * blocks, grad_weight.numel()), dtype=torch.float32)
    to = x if grad_x is None else grad_x
    sizes = (norm_eps, heads, tokens, head_dim, rotated, blocks)
    constants = {"OVER_HEADS": _is_over_heads(weight, x), **_constants(layout, head_dim, rotated)}
    arguments = (grad, x, weight, cos, sin, grad_x, partial, *_strides(grad, x, to, cos, sin), *sizes)
    launch("normed_rotary_backward", normed_rotary_backward_kernel, batch * blocks, arguments, constants, TILE)
    if partial is not None and grad_weight is not None:
        sum_partials(partial, grad_weight)


def normed_rotary_backward(
    grad_rotated_query: Tensor,
    grad_rotated_key: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm_weight: Tensor | None,
    key_norm_weight: Tensor | None,
    norm_eps: float,
    layout: int,
    query_heads_last: bool,
    key_heads_last: bool,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_cos: Tensor | None,
    grad_sin: Tensor | None,
    grad_query_norm_weight: Tensor | None,
    grad_key_norm_weight: Tensor | None,
) -> None:
    grads = grad_rotated_query, grad_rotated_key
    sides = (
        (grads[0], query, query_norm_weight, grad_query, grad_query_norm_weight),
        (grads[1], key, key_norm_weight, grad_key, grad_key_norm_weight),
    )
    for grad, x, weight, grad_x, grad_weight in sides:
        if weight is not None and not grad_x is grad_weight is None:
            _normed_backward(grad, x, weight, cos, sin, norm_eps, layout, grad_x, grad_weight)
    plain_query = grad_query if query_norm_weight is None else None
    plain_key = grad_key if key_norm_weight is None else None
    if not plain_query is plain_key is None:
        _rotate(*grads, cos, sin, layout, plain_query, plain_key, back=True)
    if not grad_cos is grad_sin is None:
        # What was rotated is made again: a norm without rotation.
        nothing = cos[..., :0]
        normed = []
        for _, x, weight, _, _ in sides:
            if weight is not None:
                given, x = x, empty_like(x)
                _normed(given, weight, nothing, nothing, norm_eps, 0, x)
            normed.append(x)
        _tables(grads, (normed[0], normed[1]), layout, cos.shape[2], grad_cos, grad_sin)
