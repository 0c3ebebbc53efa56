"""The operator in the middle of attention_pool: rows that attend over the tokens of their segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.layout import product
from velm_kernels.operator import Operator
from velm_kernels.pooling.tokens import check_values, live_tokens, padded


def _shapes(a: Any) -> tuple[Tensor, Tensor]:
    segments = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    compute_dtype = torch.promote_types(a.x.dtype, torch.float32)
    return a.x.new_empty(segments, *a.rows.shape[1:]), a.x.new_empty(segments, a.rows.shape[1], dtype=compute_dtype)


def meaning(
    x: Tensor, rows: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, live, _ = _rows_of_tokens(x, lengths, mask, cu_seqlens)
    scores = _scores(rows, x, live)
    some = live.any(-1)[:, None, None]
    logsumexp = torch.where(some, scores.detach().logsumexp(-1, keepdim=True), -torch.inf)[..., 0]
    weights = torch.where(live[:, None], scores.softmax(-1), 0.0)
    return weights @ x, logsumexp


def _scores(rows: Tensor, x: Tensor, live: Tensor) -> Tensor:
    """-inf where a token is not live; of no token at all those of others, whose softmax has a gradient."""
    return torch.where(live[:, None] | ~live.any(-1)[:, None, None], rows @ x.transpose(1, 2), -torch.inf)


def _rows_of_tokens(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    source = None
    if cu_seqlens is not None:
        x, source = padded(x, cu_seqlens)
        mask = source >= 0
    live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)
    return torch.where(live[..., None], x, 0.0), live, source


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    of_x, of_rows = wanted
    x, live, source = _rows_of_tokens(a.x, a.lengths, a.mask, a.cu_seqlens)
    weights = torch.where(live[:, None], _scores(a.rows, x, live).softmax(-1), 0.0)
    products = a.grad @ x.transpose(1, 2)
    # Less that of the largest weight: of a row that is nearly one token, the digits of what the others have are left.
    center = products.gather(-1, weights.argmax(-1, keepdim=True)) if x.shape[1] else products
    products = torch.where(center.isfinite(), products - center, products)
    delta = (weights * products).sum(-1, keepdim=True)
    grad_scores = torch.where(live[:, None], weights * (products - delta), 0.0)
    grad_x = grad_rows = None
    if of_x:
        grad_x = weights.transpose(1, 2) @ a.grad + grad_scores.transpose(1, 2) @ a.rows
        grad_x = torch.where(live[..., None], grad_x, 0.0)
        if source is not None:
            grad_x = a.x.new_empty(a.x.shape).index_copy_(0, source[source >= 0], grad_x[source >= 0])
    if of_rows:
        grad_rows = grad_scores @ x
        if a.rows.shape[0] == 1:
            grad_rows = grad_rows.sum(0, keepdim=True)
    return grad_x, grad_rows


def _flops(a: Any) -> int:
    """Two products; packed tokens belong to one segment each."""
    return 4 * a.rows[1] * product(a.x)


def _backward_flops(a: Any) -> int:
    """Scores and gradients of weights, then two products for x and one for the rows where they are wanted."""
    products = 2 + 2 * (a.wanted & 1) + (a.wanted >> 1 & 1)
    return 2 * products * a.rows[1] * product(a.x)


# x: (segments, tokens, d), or (tokens, d) with cu_seqlens, last stride 1. rows: (segments or 1, M, d) contiguous, x's
# dtype. lengths, mask, cu_seqlens: as of the operator pool. With p = softmax over the tokens of rows . x:
# out = p x, (segments, M, d) contiguous; logsumexp of the scores, (segments, M), float32. Without tokens 0 and -inf.
# grad: (segments, M, d) contiguous. grad_x and grad_rows: contiguous, the shapes of x and rows.
OPERATOR = Operator(
    "attention_pool",
    "Tensor x, Tensor rows, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens",
    results=("out", "logsumexp"),
    without_gradient=("logsumexp",),
    shapes=_shapes,
    reference=meaning,
    differentiable=("x", "rows"),
    saves=("x", "rows", "lengths", "mask", "cu_seqlens", "out", "logsumexp"),
    gradients=gradients,
    triton="pooling.attention_pool.triton",
    check=lambda arguments: check_values(arguments, arguments["x"].shape[-2]),
    flops=_flops,
    backward_flops=_backward_flops,
)
