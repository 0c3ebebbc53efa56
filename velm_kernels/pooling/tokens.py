"""Fewer and wider tokens."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks


def pixel_shuffle_tokens(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Joins each square of ``factor`` x ``factor`` neighbouring tokens into one, in a single copy.

    This is how InternVL (Chen et al., 2024, section 3.2) and Idefics3 (Laurencon et al., 2024, section 3.1) make their
    image tokens fewer; both order them as here (InternVL from its second version on).

    Args:
        x: ``(..., height * width, dim)``, tokens row by row.
        height, width: of the map, in tokens. factor: divides both.

    Returns:
        ``(..., height * width / factor^2, factor^2 * dim)``, contiguous: the new tokens row by row, in each the old
        ones row by row.

    Raises:
        TypeError: ``x`` is no tensor, or a size no integer.
        ValueError: sizes do not fit.
    """
    checks.tensor("x", x)
    for name, size in (("height", height), ("width", width), ("factor", factor)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an integer, given {checks.describe(size)}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, given {size}")
    if x.dim() < 2 or x.shape[-2] != height * width:
        raise ValueError(f"x: expected (..., {height} * {width} = {height * width}, dim), given {tuple(x.shape)}")
    if height % factor or width % factor:
        raise ValueError(f"factor: expected one that divides height = {height} and width = {width}, given {factor}")
    leading, dim = x.shape[:-2], x.shape[-1]
    rows, columns = height // factor, width // factor
    squares = x.reshape(*leading, rows, factor, columns, factor, dim).transpose(-4, -3)
    return squares.reshape(*leading, rows * columns, factor * factor * dim).contiguous()
