"""The bilinear form ``z_k = x^T W_k y + b_k``, the outer product of x and y never formed."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.fusion.bilinear.op import BILINEAR, operator_for
from velm_kernels.fusion.bilinear.rule import plain
from velm_kernels.layout import as_matrix, as_regions, leading_dims


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z[..., k] = sum_ij x[..., i] weight[k, i, j] y[..., j] + bias[k]``, as ``torch.nn.functional.bilinear``.

    The form of bilinear pooling (Tenenbaum and Freeman, 2000) that visual question answering multiplies its question
    and its picture with.

    Args:
        x: ``(..., dx)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        y: ``(..., dy)``, dtype of x. The leading dimensions of x and y broadcast; ``x (batch, dx)`` also goes with
            ``y (batch, regions, dy)``, and then every region of an entry meets the one row of x.
        weight: ``(out, dx, dy)``, dtype of x.
        bias: ``(out,)``, dtype of x.

    Under autocast all four are cast to its dtype.

    Returns:
        ``(..., out)`` over the broadcast leading dimensions, contiguous, in x's dtype; sums accumulate in float32.
        Small calls on the CPU form the products of x and y, in their dtype.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Backward keeps x, y and weight, and computes only what needs a gradient. Three products of ``batch * out * dx * dy``
    multiplications make forward and backward: the gradients of x and y are read off one product ``g W``. Where x has
    one row for several regions it is multiplied into the weight first, whatever the sizes: that is a product for every
    row of x instead of one for every region (``1 / dx + 1 / regions`` of the multiplications). On the CPU, small
    calls are left to torch by a fixed rule: :mod:`velm_kernels.fusion.bilinear.rule`.

    Example:
        >>> x, y, weight = torch.randn(4, 32), torch.randn(4, 48), torch.randn(16, 32, 48)
        >>> z = velm_kernels.bilinear(x, y, weight)
        >>> torch.allclose(z, torch.nn.functional.bilinear(x, y, weight), atol=1e-2)
        True
        >>> velm_kernels.bilinear(x, torch.randn(4, 36, 48), weight).shape  # one row of x with 36 regions of y
        torch.Size([4, 36, 16])
    """
    small = plain(x, y, weight, bias)
    return by_operator(x, y, weight, bias) if small is None else small


def by_operator(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`bilinear`, whatever the sizes."""
    if isinstance(x, Tensor):
        x, y, weight, bias = checks.autocast(x, y, weight, bias)
    arguments = canonical(x, y, weight, bias)
    out: Tensor = operator_for(arguments)(arguments)
    return out.view(*_leading(x, y), weight.shape[0])


def _leading(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """The leading dimensions of the result; those of a row of x for every region of y count as broadcast."""
    return checks.broadcast_shapes(leading_dims((x, y))[0], y.shape[:-1])


def canonical(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    """Checks the arguments of :func:`bilinear` and returns those of the operator: rows of matrices, or for the folded
    operator ``x (batch, dx)`` and ``y (batch, regions, dy)``."""
    if not checks.ordinary(x, y, weight, or_none=bias):
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
        others = {"y": y, "weight": weight} | ({} if bias is None else {"bias": bias})
        for name, value in others.items():
            checks.dtype_in(name, checks.tensor(name, value), (x.dtype,))
            checks.same_device(name, value, "x", x)
    checks.tensor("weight", weight, dims=3, layout="(out, dx, dy)")
    out, dx, dy = weight.shape
    for name, value, dim in (("x", x, dx), ("y", y, dy)):
        if value.dim() == 0 or value.shape[-1] != dim:
            raise ValueError(
                f"{name}: expected (..., d{name}) with d{name} = {dim} as in weight {tuple(weight.shape)}, "
                f"given {tuple(value.shape)}"
            )
    if bias is not None:
        checks.shape("bias", bias, "(out,)", (out,))
    try:
        leading = _leading(x, y)
    except RuntimeError:
        raise ValueError(
            f"y: expected leading dimensions that broadcast with those of x {tuple(x.shape)}, given {tuple(y.shape)}"
        ) from None
    if weight.stride(2) != 1 and dy > 1:
        weight = weight.contiguous()
    of_x = leading_dims((x, y))[0]
    batch, regions = leading[:-1], leading[-1:]
    if regions and regions[0] > 1 and (not of_x or of_x[-1] == 1):
        # One row of x for all regions.
        x, y = as_regions(x, batch, regions, of_x)[:, 0], as_regions(y, batch, regions, repeated=True)
    else:
        x = as_matrix(as_regions(x, batch, regions, of_x, repeated=True))
        y = as_matrix(as_regions(y, batch, regions, repeated=True))
    return {"x": x, "y": y, "weight": weight, "bias": _contiguous(bias)}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


BILINEAR.serves("bilinear", canonical, plain, operator_for)
