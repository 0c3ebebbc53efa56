"""``residual + tanh(gate) * x`` in one pass: the gated residual of Flamingo-style cross-attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention import reference_small as reference
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.small import ANY, takes_torch, value_of
from velm_kernels.layout import as_matrix

GRAD_X, GRAD_GATE = 1, 2
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
        float32 (float64 for float64 inputs) and rounded once, but in a small call on the CPU, where torch's operators
        round each their result.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above.

    Gradients flow to ``residual``, ``x`` and ``gate``; what needs no gradient is not computed. Backward keeps ``gate``,
    ``row_mask`` and, only if ``gate`` needs a gradient, ``x``.
    """
    small = _small(residual, x, gate, row_mask)
    if small is not None:
        return small
    arguments = canonical(residual, x, gate, row_mask)
    out: Tensor = call("gated_residual_forward", arguments)
    return out.view(x.shape)


def _small(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor | None:
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


def _out_dtype(residual: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(residual.dtype, x.dtype)


def _fake_forward(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=_out_dtype(residual, x))


def _fake_backward(
    grad: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None, grad_mask: int, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(grad.shape if grad_mask & GRAD_X else (0,)),
        gate.new_empty(gate.shape if grad_mask & GRAD_GATE else (0,)),
    )


# residual, x: (rows, dim), any row stride, last stride 1, dtypes of their own; gate: (1,) or (dim,) contiguous, a dtype
# of its own; row_mask: (rows,) bool contiguous. Out: (rows, dim) contiguous, the promoted dtype.
declare(
    "gated_residual_forward",
    "Tensor residual, Tensor x, Tensor gate, Tensor? row_mask",
    "Tensor",
    fake=_fake_forward,
)
# grad: (rows, dim) contiguous. x: as in forward if grad_mask & GRAD_GATE, else an empty (0,) tensor that carries its
# dtype. grad_x: (rows, dim) contiguous in x's dtype; grad_gate: gate's shape and dtype, summed in float32 or better in
# an order that depends on the shape alone. What grad_mask does not ask for has shape (0,).
declare(
    "gated_residual_backward",
    "Tensor grad, Tensor x, Tensor gate, Tensor? row_mask, int grad_mask",
    "(Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, x, gate, row_mask, backend = inputs
    ctx.save_for_backward(x if ctx.needs[2] else None, gate, row_mask)
    ctx.dtypes = residual.dtype, x.dtype
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, gate, row_mask = ctx.saved_tensors
    residual_dtype, x_dtype = ctx.dtypes
    wants_residual, wants_x, wants_gate = ctx.needs[:3]
    grad_x = grad_gate = None
    if wants_x or wants_gate:
        grad_mask = GRAD_X * wants_x + GRAD_GATE * wants_gate
        if x is None:
            x = grad.new_empty((0,), dtype=x_dtype)
        grad_x, grad_gate = ops.gated_residual_backward(grad.contiguous(), x, gate, row_mask, grad_mask, ctx.backend)
    return (
        grad.to(residual_dtype) if wants_residual else None,
        grad_x if wants_x else None,
        grad_gate if wants_gate else None,
        None,
        None,
    )


def _reference_forward(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    dtype = _out_dtype(residual, x)
    wide = torch.promote_types(dtype, torch.float32)
    out = reference.gated_residual(residual.to(wide), x.to(wide), gate.to(wide), row_mask)
    return out.to(dtype).contiguous()


def _reference_backward(
    grad: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None, grad_mask: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_branch = grad.to(wide)
    if row_mask is not None:
        grad_branch = grad_branch.masked_fill(~row_mask[:, None], 0.0)
    tanh = torch.tanh(gate.to(wide))
    grad_x, grad_gate = x.new_empty((0,)), gate.new_empty((0,))
    if grad_mask & GRAD_X:
        grad_x = tanh * grad_branch
        if row_mask is not None:
            grad_x = grad_x.masked_fill(~row_mask[:, None], 0.0)
        grad_x = grad_x.to(x.dtype)
    if grad_mask & GRAD_GATE:
        branch = x.to(wide)
        if row_mask is not None:
            branch = branch.masked_fill(~row_mask[:, None], 0.0)
        products = grad_branch * branch
        total = products.sum(0) if gate.numel() == x.shape[1] else products.sum().view(1)
        # In float64, since 1 - tanh^2 cancels where the gate is wide open.
        grad_gate = ((1 - torch.tanh(gate.double()).square()) * total).to(gate.dtype)
    return grad_x, grad_gate


register_autograd("gated_residual_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
register("gated_residual_forward", "reference", _reference_forward)
register("gated_residual_backward", "reference", _reference_backward)
cpu.register_cpu("gated_residual_forward")
cpu.register_cpu("gated_residual_backward")
cuda.register_cuda("gated_residual_forward")
cuda.register_cuda("gated_residual_backward")
triton.register_triton("gated_residual_forward", "attention.triton_small")
triton.register_triton("gated_residual_backward", "attention.triton_small")
register_public("gated_residual", "gated_residual_forward", canonical, _small)
