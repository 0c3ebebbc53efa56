"""The operator pool_grid: means of squares of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.pooling.pool_grid.reference import by_windows, members


def result_rows(a: Any) -> int:
    """How many squares there are for each entry."""
    rows: int = (a.height // a.factor) * (a.width // a.factor) if a.windows is None else a.windows.shape[1]
    return rows


def _gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None]:
    if not wanted[0]:
        return (None,)
    return (spread((a.grad / a.factor**2)[:, :, None].expand(-1, -1, a.factor**2, -1), a),)


def spread(squares: Tensor, a: Any) -> Tensor:
    """``(batch, tokens, dim)``: zeros, and the tokens of squares ``(batch, rows, factor^2, dim)`` where they lie."""
    batch, rows, _, dim = squares.shape
    factor = a.factor
    if a.windows is None:
        down, across = a.height // factor, a.width // factor
        out = squares.new_zeros(batch, a.height, a.width, dim)
        maps = squares.reshape(batch, down, across, factor, factor, dim).transpose(2, 3)
        out[:, : down * factor, : across * factor] = maps.reshape(batch, down * factor, across * factor, dim)
        return out.view(batch, a.height * a.width, dim)
    token, live = members(a.windows, factor)
    # One token more, for squares of none.
    token = token.where(live, token.new_full((), a.tokens)).flatten(1)
    out = squares.new_zeros(batch, a.tokens + 1, dim)
    index = token[..., None].expand(*token.shape, dim)
    return out.scatter(1, index, squares.reshape(batch, rows * factor**2, dim))[:, : a.tokens]


# x: (batch, tokens, dim), last stride 1, other strides arbitrary. A square is factor rows of factor tokens. windows:
# None for the squares of a map of height * width = tokens, row by row, without what is left over at its ends; or
# (batch, rows, 2) int32, contiguous, of squares that have no token in common: the number of their first token, -1 for
# a row of zeros, and the width of their map. The result is contiguous, sums are float32.
OPERATOR = Operator(
    "pool_grid",
    "Tensor x, Tensor? windows, SymInt height, SymInt width, SymInt factor",
    shapes=lambda a: a.x.new_empty((a.x.shape[0], result_rows(a), a.x.shape[2])),
    reference=by_windows,
    differentiable=("x",),
    saves=("windows",),
    remembers={"SymInt tokens": lambda a: a.x.shape[1]},
    gradients=_gradients,
    gradient_shapes={"x": lambda a: a.grad.new_empty((a.grad.shape[0], a.tokens, a.grad.shape[2]))},
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="pooling.pool_grid.triton",
    cuda=False,
)
