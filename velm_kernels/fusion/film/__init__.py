"""Feature-wise linear modulation."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.fusion.film.op import OPERATOR
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.processors import NEVER

# Elements of x up to which torch's form is the faster one, see velm_kernels.backends.small. With one region for each
# gamma every gradient is a product of elements, which torch's operators are never slower at.
SMALL = 1 << 19


def film(x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0) -> Tensor:
    """``(gamma_offset + gamma) * x + beta``, feature by feature: FiLM (Perez et al., 2018), one pass forward and one
    backward.

    Args:
        x: ``(batch, ..., dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend). With
            ``channels_first``: ``(batch, dim, *spatial)``; read without a copy, also in ``torch.channels_last``.
        gamma, beta: ``(batch, dim)``, the same for all regions or pixels of an entry, or ``(dim,)``; dtype of x.
        channels_first: see ``x``.
        gamma_offset: added to gamma, in float32: 1 for a gamma that is learned as a difference from the identity.

    Under autocast all are cast to its dtype.

    Returns:
        the shape, the dtype and the order in memory of x; everything in between is float32, except that small calls on
        the CPU round after each of torch's operators.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    The gradient of gamma is the sum of ``grad * x`` over the regions of an entry, that of beta the sum of ``grad``,
    both in float32. Backward keeps x and gamma, each only where a gradient needs it.

    Example:
        >>> x, gamma, beta = torch.ones(1, 2, 3), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> velm_kernels.film(x, gamma, beta)
        tensor([[[1., 2., 4.],
                 [1., 2., 4.]]])
    """
    small = plain(x, gamma, beta, channels_first=channels_first, gamma_offset=gamma_offset)
    if small is not None:
        return small
    if isinstance(x, Tensor):
        x, gamma, beta = checks.autocast(x, gamma, beta)
    arguments = canonical(x, gamma, beta, channels_first=channels_first, gamma_offset=gamma_offset)
    out: Tensor = OPERATOR(arguments)
    return (out.transpose(1, 2) if channels_first else out).view(x.shape)


def plain(
    x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    # Without regions nothing is summed, and torch's gradients are as good as the kernels'.
    has_regions = isinstance(x, Tensor) and x.dim() > 2 and isinstance(gamma, Tensor) and x.numel() != gamma.numel()
    recorded = SMALL if has_regions else NEVER
    if not takes_torch(SMALL, x, gamma, beta, dtype=ANY, recorded=recorded) or gamma_offset.__class__ is not float:
        return None
    dims = x.dim()
    if dims < 2 or not abs(gamma_offset) <= 1e30 or gamma.shape != beta.shape or not x.is_contiguous():
        return None
    shape = x.shape
    if channels_first is True:
        if gamma.shape != shape[:2]:
            return None
        for _ in range(dims - 2):
            gamma, beta = gamma.unsqueeze(-1), beta.unsqueeze(-1)
    elif channels_first is False:
        if gamma.shape == (shape[0], shape[-1]):
            for _ in range(dims - 2):
                gamma, beta = gamma.unsqueeze(1), beta.unsqueeze(1)
        elif gamma.shape != shape[-1:]:
            return None
    else:
        return None
    if gamma_offset != 0.0:
        gamma = gamma + gamma_offset
    # One operator rounds once, but reads what is repeated along a row one by one, and its gradient is slower.
    return gamma * x + beta if channels_first or torch.is_grad_enabled() else torch.addcmul(beta, gamma, x)


def canonical(
    x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0
) -> Arguments:
    """Checks the arguments of :func:`film` and returns those of the operator, ``(batch, regions, dim)``."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    layout = "(batch, dim, *spatial)" if checks.flag("channels_first", channels_first) else "(batch, ..., dim)"
    if x.dim() < 2:
        raise ValueError(f"x: expected {layout}, given {tuple(x.shape)}")
    batch, dim = x.shape[0], x.shape[1 if channels_first else -1]
    is_ordinary = checks.ordinary(x, gamma, beta)
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not is_ordinary:
            checks.dtype_in(name, checks.tensor(name, value), (x.dtype,))
            checks.same_device(name, value, "x", x)
        if tuple(value.shape) not in ((batch, dim), (dim,)):
            raise ValueError(
                f"{name}: expected (batch, dim) = {(batch, dim)} or (dim,) = {(dim,)}, given {tuple(value.shape)}"
            )
    gamma_offset = checks.number("gamma_offset", gamma_offset, -1e30, 1e30, described="a finite number")
    if channels_first:
        rows = x.reshape(batch, dim, product(x.shape[2:])).transpose(1, 2)
    else:
        # One gamma for all: then all rows are regions of one entry, and its gradient is one sum.
        leading = (1, *x.shape[:-1]) if gamma.dim() == beta.dim() == 1 else x.shape[:-1]
        batch = leading[0]
        rows = x.reshape(batch, product(leading[1:]), dim)
    # Which of the two last strides is 1; with one column or one region either may be said to be.
    regions_contiguous = rows.stride(1) == 1 and rows.stride(2) != 1 and dim > 1
    if not regions_contiguous and rows.stride(2) != 1 and dim > 1:
        rows = rows.contiguous()
    gamma, beta = (unit_last_stride(value.expand(batch, dim)) for value in (gamma, beta))
    return {
        "x": rows,
        "gamma": gamma,
        "beta": beta,
        "regions_contiguous": regions_contiguous,
        "gamma_offset": gamma_offset,
    }


OPERATOR.serves("film", canonical, plain)
