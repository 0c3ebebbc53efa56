"""Fewer and wider tokens."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks
from velm_kernels.linear.linear import linear


def pixel_shuffle_tokens(
    x: Tensor, height: int, width: int, factor: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Joins each square of ``factor`` x ``factor`` neighbouring tokens into one, in a single copy; with ``weight``,
    projects them.

    This is how InternVL (Chen et al., 2024, section 3.2) and Idefics3 (Laurencon et al., 2024, section 3.1) make their
    image tokens fewer; both order them as here (InternVL from its second version on).

    Args:
        x: ``(..., height * width, dim)``, floating point, tokens row by row.
        height, width: of the map, in tokens.
        factor: of the reduction in height and in width; divides both.
        weight: ``(out, factor^2 * dim)``, of the projection that follows in Idefics3 and SmolVLM. In InternVL a layer
            norm stands between the two.
        bias: ``(out,)``, only with ``weight``.

    Returns:
        ``(..., height * width / factor^2, factor^2 * dim)``, contiguous: the new tokens row by row, in each the old
        ones row by row. With ``weight`` :func:`velm_kernels.linear` of that, ``(..., height * width / factor^2, out)``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or a size no integer.
        ValueError: sizes do not fit.

    The copy stays beside the projection: it takes a hundredth of its time on a CPU at the sizes of these models, and
    one product for each row of the squares, which needs no copy, takes twice to four times as long.

    Example:
        >>> x = torch.arange(4.0).view(1, 4, 1)  # a map of 2 x 2 tokens of one feature
        >>> velm_kernels.pixel_shuffle_tokens(x, height=2, width=2, factor=2)
        tensor([[[0., 1., 2., 3.]]])
    """
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    for name, size in (("height", height), ("width", width), ("factor", factor)):
        checks.integer(name, size, 1, 2**31 - 1)
    if x.dim() < 2 or x.shape[-2] != height * width:
        raise ValueError(f"x: expected (..., {height} * {width} = {height * width}, dim), given {tuple(x.shape)}")
    if height % factor or width % factor:
        raise ValueError(f"factor: expected one that divides height = {height} and width = {width}, given {factor}")
    leading, dim = x.shape[:-2], x.shape[-1]
    rows, columns = height // factor, width // factor
    squares = x.reshape(*leading, rows, factor, columns, factor, dim).transpose(-4, -3)
    joined = squares.reshape(*leading, rows * columns, factor * factor * dim).contiguous()
    if weight is None:
        if bias is not None:
            raise ValueError(f"bias: expected None without weight, given {checks.describe(bias)}")
        return joined
    if checks.tensor("weight", weight).dim() != 2 or weight.shape[1] != joined.shape[-1]:
        raise ValueError(
            f"weight: expected (out, {factor}^2 * {dim} = {joined.shape[-1]}), given {tuple(weight.shape)}"
        )
    return linear(joined, weight, bias)
