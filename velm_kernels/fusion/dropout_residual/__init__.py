"""``residual + dropout(x)`` in one pass, its random numbers drawn again in backward instead of kept."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.fusion.dropout_residual.op import OPERATOR
from velm_kernels.layout import as_matrix


def dropout_residual(
    x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.1, seed: int | Tensor | None = None
) -> Tensor:
    """Dropout as at the end of a transformer's sublayers: ``residual + dropout(x)``, or ``dropout(x)`` alone.

    Each element of ``x`` is zeroed with probability ``dropout_p``; those kept are divided by ``1 - dropout_p``
    (Srivastava et al., 2014). Which ones depends on ``seed`` and on the position alone, so that every backend drops the
    same ones; the random numbers are those of Philox4x32-10 (Salmon et al., 2011).

    Args:
        x: ``(..., dim)``, floating point.
        residual: ``(..., dim)``, the shape, dtype and device of ``x``, or None.
        dropout_p: in [0, 1).
        seed: integer, or integer tensor with one element; drawn from torch's generator where not given.

    Returns:
        ``(..., dim)``, contiguous, in x's dtype; the sum is rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device or ``dropout_p`` is not as above.

    Backward keeps only the seed.

    Example:
        >>> x, residual = torch.ones(2, 4), torch.zeros(2, 4)
        >>> out = velm_kernels.dropout_residual(x, residual, dropout_p=0.5, seed=1)
        >>> sorted(set(out.flatten().tolist()))  # dropped, or divided by 1 - 0.5
        [0.0, 2.0]
        >>> torch.equal(out, velm_kernels.dropout_residual(x, residual, dropout_p=0.5, seed=1))
        True
    """
    arguments = canonical(x, residual, dropout_p, seed)
    if arguments["seed"] is None:
        return x.contiguous() if residual is None else residual + x
    out: Tensor = OPERATOR(arguments)
    return out.view(x.shape)


def canonical(
    x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.1, seed: int | Tensor | None = None
) -> Arguments:
    """Checks the arguments of :func:`dropout_residual` and returns those of the operator: rows of a matrix."""
    is_ordinary = checks.ordinary(x, or_none=residual)
    if not is_ordinary:
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected (..., dim), given ()")
    if residual is not None:
        if not is_ordinary:
            checks.dtype_in("residual", checks.tensor("residual", residual), (x.dtype,))
            checks.same_device("residual", residual, "x", x)
        checks.shape("residual", residual, "the shape of x", x.shape)
    dropout_p = checks.probability("dropout_p", dropout_p)
    return {
        "x": as_matrix(x),
        "residual": None if residual is None else as_matrix(residual),
        "seed": checks.seed_tensor(dropout_p, seed, x.device),
        "dropout_p": dropout_p,
    }


OPERATOR.serves("dropout_residual", canonical)
