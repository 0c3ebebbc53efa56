"""``residual + tanh(gate) * x`` in one pass: the gated residual of Flamingo-style cross-attention layers."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.gated_residual.op import OPERATOR
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, takes_torch, value_of
from velm_kernels.layout import as_matrix

# Elements of x up to which torch's form is the faster one, see velm_kernels.backends.small.
SMALL = 1 << 16


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """Adds a gated branch to a residual stream: ``residual + tanh(gate) * x``, and ``residual`` alone in masked rows.

    This is how Flamingo (Alayrac et al., 2022, eq. 2), IDEFICS and Llama 3.2 Vision add a new branch to a pretrained
    model; with ``gate = 0`` the branch starts as nothing.

    Args:
        residual: ``(..., dim)``, floating point.
        x: ``(..., dim)``, the shape and device of ``residual``.
        gate: ``()``, ``(1,)`` or ``(dim,)``, floating point.
        row_mask: bool, broadcastable to ``(...)``, the shape without its last dimension. Where it is False the row of
            ``x`` is not read (it may hold NaN) and gets gradient 0.

    Returns:
        ``(..., dim)``, contiguous, in the dtype to which ``residual`` and ``x`` promote. The sum is computed in
        float32 (float64 for float64 inputs) and rounded once, except that small calls on the CPU
        round after each of torch's operators.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above.

    Gradients flow to ``residual``, ``x`` and ``gate``; what needs no gradient is not computed. Backward keeps ``gate``,
    ``row_mask`` and, only if ``gate`` needs a gradient, ``x``.

    Example:
        >>> residual, x = torch.ones(2, 3), torch.full((2, 3), 2.0)
        >>> gate, row_mask = torch.tensor(100.0), torch.tensor([True, False])  # tanh(100) is 1
        >>> velm_kernels.gated_residual(residual, x, gate, row_mask)
        tensor([[3., 3., 3.],
                [1., 1., 1.]])
    """
    small = plain(residual, x, gate, row_mask)
    if small is not None:
        return small
    arguments = canonical(residual, x, gate, row_mask)
    out: Tensor = OPERATOR(arguments)
    return out.view(x.shape)


def plain(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor | None:
    """The result of a small call by torch\'s own operators, or None."""
    if not takes_torch(SMALL, residual, x, gate, dtype=ANY, recorded=SMALL) or x.dim() == 0:
        return None
    if residual.shape != x.shape or gate.shape not in ((), (1,), x.shape[-1:]) or not x.is_contiguous():
        return None
    if not residual.is_contiguous():
        return None
    if row_mask is None:
        return residual + torch.tanh(gate) * x
    if not takes_torch(SMALL, row_mask, dtype=torch.bool) or row_mask.shape != x.shape[:-1]:
        return None
    row_mask = row_mask.unsqueeze(-1)
    if torch.is_grad_enabled():
        # The gradient of the gate would see zero times what is not read; x would see zero times a gate that is NaN.
        value = value_of(gate)
        return None if value != value else residual + torch.tanh(gate) * torch.where(row_mask, x, 0.0)
    return torch.where(row_mask, residual + torch.tanh(gate) * x, residual)


def canonical(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Arguments:
    """Checks the arguments of :func:`gated_residual` and returns those of the operator: rows of a matrix."""
    if not checks.ordinary(residual, x, gate):
        for name, value in (("residual", residual), ("x", x), ("gate", gate)):
            checks.dtype_in(name, checks.tensor(name, value), checks.FLOAT_DTYPES)
            checks.same_device(name, value, "residual", residual)
    if residual.dim() == 0:
        raise ValueError("residual: expected (..., dim), given ()")
    checks.shape("x", x, "the shape of residual", residual.shape)
    dim = x.shape[-1]
    if tuple(gate.shape) not in ((), (1,), (dim,)):
        raise ValueError(f"gate: expected (), (1,) or (dim,) = ({dim},), given {tuple(gate.shape)}")
    if row_mask is not None:
        checks.dtype_in("row_mask", checks.tensor("row_mask", row_mask), (torch.bool,))
        checks.same_device("row_mask", row_mask, "residual", residual)
        leading = x.shape[:-1]
        row_mask = checks.broadcastable("row_mask", row_mask, "the leading dimensions of x", leading)
        row_mask = row_mask.expand(leading).reshape(-1).contiguous()
    return {
        "residual": as_matrix(residual),
        "x": as_matrix(x),
        "gate": gate.reshape(-1).contiguous(),
        "row_mask": row_mask,
    }


OPERATOR.serves("gated_residual", canonical, plain)
