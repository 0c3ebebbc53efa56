"""Maps of tokens of different sizes, one behind the other or one for each entry: checks, and where windows lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.layout import unit_last_stride

LARGEST = 2**31 - 1


def as_entries(name: str, x: Tensor) -> Tensor:
    """``(batch, tokens, dim)``, neighbours in a row next to each other, of ``(..., tokens, dim)``."""
    if x.dim() == 3:
        return unit_last_stride(x)
    tokens, dim = x.shape[-2:]
    batch = 1
    for size in x.shape[:-2]:
        batch = batch * size
    return unit_last_stride(x.reshape(batch, tokens, dim))


def checked_tokens(x: Any) -> Tensor:
    """A floating-point tensor ``(..., tokens, dim)``."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
    return x


def listed_grids(name: str, given: Any, most: int = LARGEST) -> list[tuple[int, int, int]]:
    """(frames, height, width) of each map, read where they are in a tensor."""
    if isinstance(given, Tensor):
        checks.dtype_in(name, given, checks.INTEGER_DTYPES)
        if given.dim() != 2 or given.shape[1] not in (2, 3):
            raise ValueError(f"{name}: expected (grids, 2) or (grids, 3), given {tuple(given.shape)}")
        if given.is_meta:
            raise ValueError(f"{name}: expected sizes that can be read, given {checks.describe(given)}")
        given = given.tolist()
    elif isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: expected a tensor or a list of (height, width), given {checks.describe(given)}")
    found = []
    for place, sizes in enumerate(given):
        if isinstance(sizes, (str, Tensor)) or not isinstance(sizes, Sequence) or len(sizes) not in (2, 3):
            raise TypeError(
                f"{name}[{place}]: expected (height, width) or (frames, height, width), given {checks.describe(sizes)}"
            )
        checked = [checks.integer(f"{name}[{place}]", size, 0, most) for size in sizes]
        found.append((1, *checked) if len(checked) == 2 else tuple(checked))
    return found  # type: ignore[return-value]


class Grids(NamedTuple):
    """Sizes of maps on a device.

    Attributes:
        height, width: ``(grids,)`` int64.
        listed: the same as numbers, or None where they came in a tensor.
        packed: whether they lie one behind the other, not one in each entry.
        tokens: of all maps, or of an entry.
    """

    height: Tensor
    width: Tensor
    listed: list[tuple[int, int]] | None
    packed: bool
    tokens: int

    def rows(self, factor: int, up: bool) -> int:
        """How many tokens there are, in all or for each entry, where squares of ``factor`` become one."""
        least = self.tokens // factor**2
        if self.listed is None:
            return least
        counts = [smaller(height, factor, up) * smaller(width, factor, up) for height, width in self.listed]
        return sum(counts) if self.packed else max([least, *counts])

    def places(self, factor: int, up: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each token of the result, int64 ``(entries, rows)`` (one entry where packed): its map, -1 for none, the
        first token of that map, and the token's row and column."""
        device, rows = self.height.device, self.rows(factor, up)
        columns = smaller(self.width, factor, up)
        counts = smaller(self.height, factor, up) * columns
        place = torch.arange(rows, device=device)[None]
        if self.height.shape[0] == 0:
            none = torch.full((1 if self.packed else 0, rows), -1, device=device)
            return none, none, none, none
        if self.packed:
            ends = counts.cumsum(0)
            grid = torch.searchsorted(ends, place, right=True).clamp(max=self.height.shape[0] - 1)
            within, live = place - (ends - counts)[grid], place < ends[-1]
            areas = self.height * self.width
            start = (areas.cumsum(0) - areas)[grid]
        else:
            grid = torch.arange(self.height.shape[0], device=device)[:, None].expand(-1, rows)
            within, live, start = place, place < counts[:, None], torch.zeros_like(grid)
        of_row = columns[grid].clamp(min=1)
        return torch.where(live, grid, -1), start, within // of_row, within % of_row


def smaller(size: Any, factor: int, up: bool) -> Any:
    """A size divided by ``factor``, rounded up or down."""
    return -(-size // factor) if up else size // factor


def described_grids(x: Tensor, height: Any, width: Any, factor: int, names: tuple[str, str]) -> Grids:
    """Checks ``height`` and ``width``, tensors or lists ``(grids,)``, beside x ``(tokens, dim)`` or, with as many maps
    as entries, ``(batch, tokens, dim)``. What is in tensors is looked at where nothing waits for it, and has to be
    divisible by ``factor``."""
    packed = x.dim() == 2
    heights, widths = (_checked_sizes(name, given, x) for name, given in zip(names, (height, width), strict=True))
    if heights is None or widths is None:
        name, given = (names[0], height) if heights is None else (names[1], width)
        raise TypeError(f"{name}: expected sizes (grids,) as the other side has, given {checks.describe(given)}")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x: expected (tokens, dim) or (batch, tokens, dim) with maps of different sizes, given {tuple(x.shape)}"
        )
    grids = heights.shape[0]
    if widths.shape[0] != grids:
        raise ValueError(f"{names[1]}: expected as many sizes as {names[0]} has, {grids}, given {widths.shape[0]}")
    listed = None
    if not isinstance(height, Tensor) and not isinstance(width, Tensor):
        listed = list(zip(height, width, strict=True))
    if not packed and grids != x.shape[0]:
        raise ValueError(f"{names[0]}: expected a size for each of {x.shape[0]} entries of x, given {grids}")
    found = Grids(heights, widths, listed, packed, x.shape[-2])
    _check_sizes(found, factor, names)
    return found


def _checked_sizes(name: str, given: Any, x: Tensor) -> Tensor | None:
    """int64 ``(grids,)`` on the device of x, or None for what is neither a tensor nor a list."""
    if isinstance(given, Tensor):
        checks.dtype_in(name, checks.tensor(name, given, dims=1, layout="(grids,)"), checks.INTEGER_DTYPES)
        checks.same_device(name, given, "x", x)
        return given.long()
    if isinstance(given, str) or not isinstance(given, Sequence):
        return None
    sizes = [checks.integer(f"{name}[{place}]", size, 0, LARGEST) for place, size in enumerate(given)]
    return torch.tensor(sizes, dtype=torch.int64, device=x.device)


def _check_sizes(grids: Grids, factor: int, names: tuple[str, str]) -> None:
    listed = grids.listed
    if listed is None:
        if not (checks.reads_values(grids.height) and checks.reads_values(grids.width)):
            return
        listed = list(zip(grids.height.tolist(), grids.width.tolist(), strict=True))
        for sizes, name in zip(zip(*listed, strict=True), names, strict=False):
            for place, size in enumerate(sizes):
                if size < 0 or size % factor:
                    raise ValueError(
                        f"{name}: expected sizes in a tensor that factor = {factor} divides (a list may have others), "
                        f"given {size} at {place}"
                    )
    areas = [height * width for height, width in listed]
    if grids.packed and sum(areas) != grids.tokens:
        raise ValueError(
            f"{names[0]}: expected maps of {grids.tokens} tokens together, as x has, given {sum(areas)} tokens"
        )
    if not grids.packed and max(areas, default=0) > grids.tokens:
        raise ValueError(f"{names[0]}: expected maps of at most {grids.tokens} tokens, as x has, given {max(areas)}")


def windows(grids: Grids, factor: int) -> Tensor:
    """Where the squares lie that become one token: int32 ``(entries, rows, 2)``, the number of their first token and
    the width of their map; -1 where there is no square."""
    grid, start, row, column = grids.places(factor, up=False)
    if grids.height.shape[0] == 0:
        return torch.stack([grid, grid], -1).int()
    width = grids.width[grid.clamp(min=0)]
    first = start + (row * width + column) * factor
    return torch.where(grid[..., None] >= 0, torch.stack([first, width], -1), -1).int()
