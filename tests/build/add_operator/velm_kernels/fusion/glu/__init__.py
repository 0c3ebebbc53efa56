"""The gated linear unit."""

from __future__ import annotations

from torch import Tensor
from velm_kernels.fusion.glu.op import OPERATOR

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.layout import as_matrix


def glu(x: Tensor, gate: Tensor) -> Tensor:
    """``x * sigmoid(gate)``: the gated linear unit (Dauphin et al., 2017, section 2), in one pass each way.

    Args:
        x: ``(..., dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        gate: ``(..., dim)``, the shape and dtype of x.

    Returns:
        ``(..., dim)``, contiguous, in x's dtype; computed in float32 and rounded once.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: shapes or devices do not fit together.

    Backward keeps ``gate``, and ``x`` only where the gradient of the gate is wanted.

    Example:
        >>> x, gate = torch.tensor([[1.0, 2.0]]), torch.tensor([[100.0, 0.0]])
        >>> velm_kernels.glu(x, gate)
        tensor([[1., 1.]])
    """
    out: Tensor = OPERATOR(canonical(x, gate))
    return out.view(x.shape)


def canonical(x: Tensor, gate: Tensor) -> Arguments:
    """Checks the arguments of :func:`glu` and returns those of the operator: rows of matrices."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    checks.dtype_in("gate", checks.tensor("gate", gate), (x.dtype,))
    if x.dim() == 0:
        raise ValueError("x: expected (..., dim), given ()")
    checks.same_device("gate", gate, "x", x)
    checks.shape("gate", gate, "the shape of x", x.shape)
    return {"x": as_matrix(x), "gate": as_matrix(gate)}


OPERATOR.serves("glu", canonical)
