"""``residual + dropout(x)`` in one pass, its random numbers drawn again in backward instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.fusion import reference
from velm_kernels.layout import as_matrix, unit_last_stride


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

    Backward keeps the seed alone.
    """
    arguments = canonical(x, residual, dropout_p, seed)
    if arguments["seed"] is None:
        return x.contiguous() if residual is None else residual + x
    out: Tensor = call("dropout_residual_forward", arguments)
    return out.view(x.shape)


def canonical(
    x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.1, seed: int | Tensor | None = None
) -> Arguments:
    """Checks the arguments of :func:`dropout_residual` and returns those of the operator: rows of a matrix."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected (..., dim), given ()")
    if residual is not None:
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


def _fake_forward(x: Tensor, residual: Tensor | None, seed: Tensor, dropout_p: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, seed: Tensor, dropout_p: float, backend: str) -> Tensor:
    return grad.new_empty(grad.shape)


# x, residual, grad: (rows, dim), any row stride, last stride 1, one dtype; seed: int64 scalar. Results contiguous.
declare(
    "dropout_residual_forward", "Tensor x, Tensor? residual, Tensor seed, float dropout_p", "Tensor", fake=_fake_forward
)
declare("dropout_residual_backward", "Tensor grad, Tensor seed, float dropout_p", "Tensor", fake=_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, seed, ctx.dropout_p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        rows = unit_last_stride(grad)
        grad_x = ops.dropout_residual_backward(rows, seed, ctx.dropout_p, ctx.backend)
    return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None


def _reference_forward(x: Tensor, residual: Tensor | None, seed: Tensor, dropout_p: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_residual = None if residual is None else residual.to(wide)
    return reference.dropout_residual(x.to(wide), wide_residual, seed, dropout_p).to(x.dtype).contiguous()


def _reference_backward(grad: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    return _reference_forward(grad, None, seed, dropout_p)


register_autograd("dropout_residual_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
register("dropout_residual_forward", "reference", _reference_forward, lambda arguments: [])
register("dropout_residual_backward", "reference", _reference_backward, lambda arguments: [])
triton.register_triton("dropout_residual_forward", "fusion.triton_dropout")
triton.register_triton("dropout_residual_backward", "fusion.triton_dropout")
cpu.register_cpu("dropout_residual_forward")
cpu.register_cpu("dropout_residual_backward")
cuda.register_cuda("dropout_residual_forward")
cuda.register_cuda("dropout_residual_backward")
register_public("dropout_residual", "dropout_residual_forward", canonical)
