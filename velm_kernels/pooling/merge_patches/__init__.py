"""Fewer and wider tokens, of maps of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.pooling.grids import LARGEST, as_entries, checked_tokens, described_grids, listed_grids, windows
from velm_kernels.pooling.merge_patches.op import OPERATOR

ORDERS = ("neighbours", "channels")
NAMES = ("grid_sizes", "grid_sizes")


def merge_patches(
    x: Tensor,
    grid_sizes: Tensor | Sequence[Any],
    factor: int,
    *,
    order: str = "neighbours",
    blocks: bool = False,
) -> Tensor:
    """Puts the tokens of each square of ``factor`` x ``factor`` beside each other, for the linear that follows, in one
    pass over maps of any sizes.

    Mistral 3's and LightOnOCR's mergers unfold each picture for itself: ``order="channels"``, the features of
    ``torch.nn.functional.unfold``. Swin's and the Qwen-VLs' mergers put whole tokens one behind the other:
    ``order="neighbours"``; the Qwen-VLs' processors have squares together already (``blocks=True``).

    Args:
        x: ``(tokens, dim)``, maps one behind the other, each row by row; or ``(batch, tokens, dim)``, a map in each
            entry, whose further tokens are padding. Floating point.
        grid_sizes: (height, width) of each map, in tokens, divisible by ``factor``: integers ``(grids, 2)`` or a list
            of pairs; or (frames, height, width), ``(grids, 3)``. With x ``(batch, tokens, dim)`` one pair ``(height,
            width)`` may stand for all.
        factor: 1 or more.
        order: of the features of a result: "neighbours", feature ``i * dim + c`` is feature c of the square's token i,
            counted row by row, or "channels", feature ``c * factor^2 + i`` is.
        blocks: tokens come square by square, not row by row.

    Returns:
        ``(tokens / factor^2, factor^2 * dim)``, or with a batch ``(batch, tokens // factor^2, factor^2 * dim)``, zeros
        behind the last square of a map; contiguous. Of tokens that lie in this way already (blocks, neighbours) it is x
        in another shape.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: sizes do not fit x, or ``factor`` does not divide them (those in tensors are looked at on the CPU,
            or with VELM_CHECK=1).

    Backward keeps no token; padding has the gradient 0.

    Example:
        >>> x = torch.tensor([[1, 10], [2, 20], [3, 30], [4, 40]]).float()  # a map of 2 x 2 tokens
        >>> velm_kernels.merge_patches(x, [(2, 2)], 2)
        tensor([[ 1., 10.,  2., 20.,  3., 30.,  4., 40.]])
        >>> velm_kernels.merge_patches(x, [(2, 2)], 2, order="channels")
        tensor([[ 1.,  2.,  3.,  4., 10., 20., 30., 40.]])
    """
    arguments, shape = _canonical(x, grid_sizes, factor, order, blocks)
    if blocks and order == "neighbours":
        entries = arguments["x"]
        count = factor * factor * (entries.shape[1] // (factor * factor))
        return entries[:, :count].reshape(shape)
    out: Tensor = OPERATOR(arguments)
    return out.view(shape)


def _canonical(x: Any, grid_sizes: Any, factor: Any, order: str, blocks: bool) -> tuple[Arguments, tuple[int, ...]]:
    checked_tokens(x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (tokens, dim) or (batch, tokens, dim), given {tuple(x.shape)}")
    checks.integer("factor", factor, 1, 2**15)
    checks.choice("order", order, ORDERS)
    checks.flag("blocks", blocks)
    entries = as_entries("x", x)
    tokens, dim = entries.shape[1:]
    given: Arguments = {"x": entries, "windows": None, "height": 0, "width": 0, "factor": factor}
    if x.dim() == 3 and not isinstance(grid_sizes, Tensor) and _is_pair(grid_sizes):
        height, width = (checks.integer("grid_sizes", size, 0, LARGEST) for size in grid_sizes)
        if height * width != tokens:
            raise ValueError(f"grid_sizes: expected {tokens} tokens, as x has, given {height} * {width}")
        if height % factor or width % factor:
            raise ValueError(f"grid_sizes: expected multiples of factor = {factor}, given ({height}, {width})")
        given |= {"height": height, "width": width}
        rows: Any = height * width // factor**2
    else:
        grids = described_grids(x, *_sides(grid_sizes, factor), factor, NAMES)
        rows = tokens // factor**2
        if not blocks:
            given["windows"] = windows(grids, factor)
            rows = given["windows"].shape[1]
    if blocks and order == "channels":
        # Squares one behind the other are the squares of a map that is one of them wide.
        given |= {"x": entries[:, : rows * factor**2], "windows": None, "height": rows * factor, "width": factor}
    return given | {"channels": order == "channels"}, (*x.shape[:-2], rows, factor**2 * dim)


def _is_pair(grid_sizes: Any) -> bool:
    return (
        isinstance(grid_sizes, Sequence)
        and len(grid_sizes) == 2
        and not any(isinstance(size, (Sequence, Tensor)) for size in grid_sizes)
    )


def _sides(grid_sizes: Any, factor: int) -> tuple[Any, Any]:
    """The heights and widths of maps, ``(grids,)``. The frames of a video are the map that they make one above the
    other."""
    if isinstance(grid_sizes, Tensor):
        checks.dtype_in("grid_sizes", checks.tensor("grid_sizes", grid_sizes), checks.INTEGER_DTYPES)
        if grid_sizes.dim() != 2 or grid_sizes.shape[1] not in (2, 3):
            raise ValueError(f"grid_sizes: expected (grids, 2) or (grids, 3), given {tuple(grid_sizes.shape)}")
        height, width = grid_sizes[:, -2], grid_sizes[:, -1]
        if grid_sizes.shape[1] == 3:
            if checks.reads_values(grid_sizes):
                for size in height.tolist():
                    if size % factor:
                        raise ValueError(f"grid_sizes: expected heights that factor = {factor} divides, given {size}")
            height = height * grid_sizes[:, 0]
        return height, width
    listed = listed_grids("grid_sizes", grid_sizes)
    for place, (_, *sizes) in enumerate(listed):
        if any(size % factor for size in sizes):
            raise ValueError(f"grid_sizes[{place}]: expected multiples of factor = {factor}, given {tuple(sizes)}")
    return [frames * height for frames, height, _ in listed], [width for _, _, width in listed]


def canonical(
    x: Tensor,
    grid_sizes: Tensor | Sequence[Any],
    factor: int,
    *,
    order: str = "neighbours",
    blocks: bool = False,
) -> Arguments:
    return _canonical(x, grid_sizes, factor, order, blocks)[0]


OPERATOR.serves("merge_patches", canonical)
