"""The common tail of factorised bilinear fusions: product, sum over the factor, signed square root, L2 norm."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.fusion.factorized_pool.op import LAYOUTS, OPERATOR
from velm_kernels.layout import as_regions

# Elements of a up to which torch's form is the faster one, see velm_kernels.backends.small: with root or norm, and
# without.
SMALL, SMALL_PLAIN = 1 << 13, 1 << 18


def factorized_pool(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``normalize(signed_sqrt(sum over the factor of dropout(a * b)))``, one pass forward and one backward.

    The tail of the fusions that replace a bilinear form by a product of projections: MLB (Kim et al., 2017) with
    factor 1, MFB and MFH (Yu et al., 2017) with the factor innermost, MUTAN (Ben-younes et al., 2017) and BLOCK
    (Ben-younes et al., 2019) with the factor outermost.

    Args:
        a: ``(..., factor * dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        b: ``(..., factor * dim)``, dtype of a. The leading dimensions of a and b broadcast.
        factor: how many products are summed for one output.
        layout: ``"inner"``: output o is the sum of the products ``[o * factor, (o + 1) * factor)``; ``"outer"``: of
            the products ``o, dim + o, 2 * dim + o, ...``
        power_norm: the signed square root ``sign(z) * sqrt(|z|)`` of the sums z.
        l2_norm: the outputs of a row are divided by their L2 norm, or by 1e-12 if that is larger.
        dropout_p: in [0, 1), of the products: those kept are divided by ``1 - dropout_p``. The random numbers are
            those of :func:`velm_kernels.dropout_residual` for rows of ``factor * dim``.
        seed: integer, or integer tensor with one element; drawn from torch's generator where not given.

    Under autocast a and b are cast to its dtype.

    Returns:
        ``(..., dim)`` over the broadcast leading dimensions, contiguous, in a's dtype; everything in between is
        float32, except that small calls on
        the CPU round after each of torch's operators.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, factor does not divide, or layout is unknown.

    The gradient of the signed root is ``1 / (2 sqrt|z|)``, infinite at 0: there it counts as 0. Of root and norm
    together it is ``dz = (g - u (u . g)) / (2 n^2 |u|)`` with u the output and ``n^2 = sum |z|``, computed in that
    form. A row of zeros gives 0 and passes back 0. Backward keeps only a and b.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4)
        >>> velm_kernels.factorized_pool(a, b, factor=2)  # neighbours are summed
        tensor([[3., 7.]])
        >>> velm_kernels.factorized_pool(a, b, factor=2, layout="outer")
        tensor([[4., 6.]])
    """
    small = plain(a, b, factor, layout, power_norm, l2_norm, dropout_p, seed)
    if small is not None:
        return small
    if isinstance(a, Tensor):
        a, b = checks.autocast(a, b)
    arguments = canonical(a, b, factor, layout, power_norm, l2_norm, dropout_p, seed)
    out: Tensor = OPERATOR(arguments)
    return out.view(*checks.broadcast_shapes(a.shape[:-1], b.shape[:-1]), out.shape[-1])


def plain(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    limit = SMALL_PLAIN if power_norm is l2_norm is False else SMALL
    if not takes_torch(limit, a, b, dtype=ANY, recorded=limit if limit == SMALL else 2 * limit) or a.shape != b.shape:
        return None
    if dropout_p.__class__ is not float or dropout_p != 0.0 or seed is not None or factor.__class__ is not int:
        return None
    if a.dim() == 0 or a.numel() == 0 or factor < 1 or a.shape[-1] % factor or layout not in LAYOUTS:
        return None
    if (
        power_norm.__class__ is not bool
        or l2_norm.__class__ is not bool
        or not (a.is_contiguous() and b.is_contiguous())
    ):
        return None
    records = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    # A row of zeros passes nothing back, which of norm alone torch's form does not know; 1e-12 is 0 in float16.
    if l2_norm and (a.dtype is torch.float16 or (records and not power_norm)):
        return None
    z = a * b
    if factor > 1:
        size = a.shape[-1] // factor
        z = z.unflatten(-1, (size, factor)).sum(-1) if layout == "inner" else z.unflatten(-1, (factor, size)).sum(-2)
    if power_norm:
        if records:
            # The gradient at 0 counts as 0.
            is_zero = z == 0.0
            z = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, z.abs()).sqrt().copysign(z))
        else:
            z = z.abs().sqrt_().copysign_(z)
    return torch.nn.functional.normalize(z, dim=-1) if l2_norm else z


def canonical(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`factorized_pool` and returns those of the operator, ``(batch, regions, ...)``."""
    if not checks.ordinary(a, b):
        checks.dtype_in("a", checks.tensor("a", a), checks.FLOAT_DTYPES)
        checks.dtype_in("b", checks.tensor("b", b), (a.dtype,))
        checks.same_device("b", b, "a", a)
    if a.dim() == 0:
        raise ValueError("a: expected (..., factor * dim), given ()")
    try:
        if b.dim() == 0 or b.shape[-1] != a.shape[-1]:
            raise RuntimeError
        leading = checks.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"b: expected (..., {a.shape[-1]}) with leading dimensions that broadcast with those of a "
            f"{tuple(a.shape)}, given {tuple(b.shape)}"
        ) from None
    if checks.integer("factor", factor, 1) and a.shape[-1] % factor:
        raise ValueError(f"factor: expected a positive divisor of {a.shape[-1]} features, given {factor}")
    checks.choice("layout", layout, LAYOUTS)
    dropout_p = checks.probability("dropout_p", dropout_p)
    checks.flag("power_norm", power_norm)
    checks.flag("l2_norm", l2_norm)
    return {
        "a": as_regions(a, leading[:-1], leading[-1:], repeated=True),
        "b": as_regions(b, leading[:-1], leading[-1:], repeated=True),
        "seed": checks.seed_tensor(dropout_p, seed, a.device),
        "factor": factor,
        "inner": layout == "inner",
        "power_norm": power_norm,
        "l2_norm": l2_norm,
        "dropout_p": dropout_p,
    }


OPERATOR.serves("factorized_pool", canonical, plain)
