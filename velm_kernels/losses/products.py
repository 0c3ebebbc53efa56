"""What losses over all pairs of rows share around the products of torch: rows, tiles of scores, sums of gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from velm_kernels import processors

# Rows and columns of a tile of scores: 8 and 16 MiB. In 16 bits every product with a tile is rounded before it is added
# to others, which takes as long as the product where there are few rows.
ROWS, ROWS_OF_16_BITS, COLUMNS = 512, 2048, 4096
# Below this norm rows are divided by it, as torch.nn.functional.normalize does.
LEAST_NORM = 1e-12


def arithmetic(x: Tensor) -> torch.dtype:
    """What rows are multiplied in: their own dtype where the device has an instruction for it that adds in float32."""
    if x.device.type != "cpu":
        return x.dtype
    has_instruction = processors.this_processor().has("avx512bf16", "amx-bf16")
    return torch.bfloat16 if x.dtype is torch.bfloat16 and has_instruction else torch.float32


def unit_rows(x: Tensor, normalize: bool, inverse_norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows as they are multiplied, contiguous, and the inverse of their norms or, without ``normalize``, 1, float32."""
    dtype = arithmetic(x)
    if not normalize:
        ones = inverse_norms if inverse_norms is not None else x.new_ones(x.shape[:1], dtype=torch.float32)
        return x.to(dtype).contiguous(), ones
    if inverse_norms is None:
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        inverse_norms = norms.clamp_min_(LEAST_NORM).reciprocal_()
    unit = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(x, inverse_norms[:, None], out=unit)
    return unit, inverse_norms


class Scores:
    """The products of rows and columns, a tile at a time: (which rows, which columns, the tile). A tile lies where the
    last one did, and may be written on."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        count, others = len(self.rows), len(self.columns)
        step = ROWS if self.rows.dtype is torch.float32 else ROWS_OF_16_BITS
        memory = self.rows.new_empty(min(count, step) * min(others, COLUMNS))
        turned = self.columns.t()
        for i in range(0, count, step):
            r = slice(i, min(i + step, count))
            for j in range(0, others, COLUMNS):
                c = slice(j, min(j + COLUMNS, others))
                shape = (r.stop - r.start, c.stop - c.start)
                tile = memory[: shape[0] * shape[1]].view(shape)
                torch.mm(self.rows[r], turned[:, c], out=tile)
                yield r, c, tile


class Accumulator:
    """The sum over tiles of a product with each, float32, in the memory of ``to`` where it is that."""

    def __init__(self, like: Tensor, to: Tensor | None, wanted: bool, begun: bool = False) -> None:
        """``begun``: ``to`` holds a part of the sum already."""
        self._is_begun = begun
        self.total: Tensor | None = None
        self._begun: set[int] = set()
        self._product: Tensor | None = None
        if wanted:
            own = to is None or to.dtype is not torch.float32
            self.total = like.new_empty(like.shape, dtype=torch.float32) if own else to

    def add(self, tile: Tensor, others: Tensor, which: slice) -> None:
        """Adds ``tile @ others`` to the rows ``which``."""
        if self.total is None:
            return
        part = self.total[which]
        begun = self._is_begun or which.start in self._begun
        self._begun.add(which.start)
        if tile.dtype is torch.float32:
            torch.addmm(part, tile, others, beta=1 if begun else 0, out=part)
            return
        if self._product is None or self._product.shape != part.shape:
            self._product = others.new_empty(part.shape)
        torch.mm(tile, others, out=self._product)
        if begun:
            part += self._product
        else:
            part.copy_(self._product)

    def result(self) -> Tensor | None:
        """The sum, 0 without tiles; None where it is not wanted."""
        if self.total is not None and not self._begun:
            self.total.zero_()
        return self.total


def gradient_of_rows(
    total: Tensor, unit: Tensor, inverse_norms: Tensor | None, scale: Tensor, to: Tensor | None
) -> Tensor:
    """Writes the gradient of the rows that ``unit`` was made of, from ``total``, that of ``unit`` over ``scale``;
    returns the sum of the products of both, which is the gradient of the scale."""
    unit = unit.float()
    along = (unit * total).sum(1)
    of_scale = along.sum()
    if to is not None:
        if inverse_norms is None:
            torch.mul(total, scale, out=total)
        else:
            # A row that is not longer than the least norm is divided by that and not by its own.
            is_short = inverse_norms >= 1 / LEAST_NORM
            total.addcmul_(unit, torch.where(is_short, 0.0, along)[:, None], value=-1)
            total.mul_((scale * inverse_norms)[:, None])
        if to is not total:
            to.copy_(total)
    return of_scale
