"""The bilinear form ``z_k = x^T W_k y + b_k`` and its gradients, the outer product of x and y never formed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, flops, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.fusion import bilinear_rule, folded
from velm_kernels.layout import as_matrix, product, unit_last_stride

GRAD_X, GRAD_Y, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4, 8


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
        ``(..., out)`` over the broadcast leading dimensions, contiguous, in x's dtype; sums accumulate in float32. Of
        small calls on the CPU the products of x and y are formed, in their dtype.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Backward keeps x, y and weight, and computes only what needs a gradient. Three products of ``batch * out * dx * dy``
    multiplications make forward and backward: the gradients of x and y are read off one product ``g W``. Where x has
    one row for several regions it is multiplied into the weight first, whatever the sizes: that is a product for every
    row of x instead of one for every region (``1 / dx + 1 / regions`` of the multiplications). On the CPU, small
    calls are left to torch by a fixed rule: :mod:`velm_kernels.fusion.bilinear_rule`.
    """
    of_outer = bilinear_rule.small(x, y, weight, bias)
    if of_outer is not None:
        return of_outer
    if isinstance(x, Tensor):
        x, y, weight, bias = checks.autocast(x, y, weight, bias)
    arguments = canonical(x, y, weight, bias)
    folds = arguments["y"].dim() == 3
    out: Tensor = call("folded_bilinear_forward" if folds else "bilinear_forward", arguments)
    return out.view(*_leading(x, y), weight.shape[0])


def _leading(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """The leading dimensions of the result; those of a row of x for every region of y count as broadcast."""
    return checks.broadcast_shapes(beside(x, y), y.shape[:-1])


def beside(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """The leading dimensions of x as they stand beside those of y."""
    leading = tuple(x.shape[:-1])
    if len(leading) == 1 and y.dim() == 3 and leading[0] == y.shape[0]:
        return (*leading, 1)
    return leading


def canonical(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    """Checks the arguments of :func:`bilinear` and returns those of the operator: rows of matrices, or for the folded
    operator ``x (batch, dx)`` and ``y (batch, regions, dy)``."""
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
    of_x = beside(x, y)
    # One row of x for all regions: the last leading dimension.
    if len(leading) >= 1 and leading[-1] > 1 and (len(of_x) == 0 or of_x[-1] == 1):
        batch, regions = leading[:-1], leading[-1]
        x = x.reshape(*(of_x[:-1] if of_x else ()), dx).expand(*batch, dx)
        y = y.expand(*leading, dy).reshape(product(batch), regions, dy)
        return {"x": as_matrix(x), "y": unit_last_stride(y), "weight": weight, "bias": _contiguous(bias)}
    x = x.reshape(*of_x, dx).expand(*leading, dx)
    y = y.expand(*leading, dy)
    return {"x": as_matrix(x), "y": as_matrix(y), "weight": weight, "bias": _contiguous(bias)}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fake_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*y.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, grad_mask: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, y.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if grad_mask >> bit & 1 else (0,)) for bit, shape in enumerate(shapes))  # type: ignore[return-value]


# bilinear: x (rows, dx), y (rows, dy), any row stride, last stride 1. folded_bilinear: x (batch, dx) and
# y (batch, regions, dy). weight (out, dx, dy), last stride 1; bias contiguous; all of one dtype. Out (rows, out), or
# (batch, regions, out), and all gradients contiguous. What grad_mask does not ask for has shape (0,).
for _name in ("bilinear", "folded_bilinear"):
    declare(f"{_name}_forward", "Tensor x, Tensor y, Tensor weight, Tensor? bias", "Tensor", fake=_fake_forward)
    declare(
        f"{_name}_backward",
        "Tensor grad, Tensor x, Tensor y, Tensor weight, int grad_mask",
        "(Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_backward,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, y, weight)


def _differentiate(name: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs[:4]
        grad_mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
        operator = getattr(ops, f"{name}_backward")
        grads = operator(unit_last_stride(grad), *ctx.saved_tensors, grad_mask, ctx.backend)
        return (*(value if want else None for value, want in zip(grads, wanted, strict=True)), None)

    register_autograd(f"{name}_forward", backward, setup_context=_setup_context, meaning=folded.reference_forward)


_differentiate("bilinear")
_differentiate("folded_bilinear")


def _flops_forward(x_shape: Any, y_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * product(weight_shape))


def _flops_backward(
    grad_shape: Any, x_shape: Any, y_shape: Any, weight_shape: Any, grad_mask: int, *args: Any, **kwargs: Any
) -> int:
    products = bool(grad_mask & (GRAD_X | GRAD_Y)) + bool(grad_mask & GRAD_WEIGHT)
    return int(2 * x_shape[0] * product(weight_shape) * products)


def _flops_folded_forward(x_shape: Any, y_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    out, _, dy = weight_shape
    return int(2 * x_shape[0] * (product(weight_shape) + y_shape[1] * out * dy))


def _flops_folded_backward(
    grad_shape: Any, x_shape: Any, y_shape: Any, weight_shape: Any, grad_mask: int, *args: Any, **kwargs: Any
) -> int:
    out, _, dy = weight_shape
    of_weight = bool(grad_mask & GRAD_X) + bool(grad_mask & GRAD_Y) + bool(grad_mask & GRAD_WEIGHT)
    of_regions = bool(grad_mask & GRAD_Y) + bool(grad_mask & (GRAD_X | GRAD_WEIGHT))
    return int(2 * x_shape[0] * (product(weight_shape) * of_weight + y_shape[1] * out * dy * of_regions))


for _name, _formula in (
    ("bilinear_forward", _flops_forward),
    ("bilinear_backward", _flops_backward),
    ("folded_bilinear_forward", _flops_folded_forward),
    ("folded_bilinear_backward", _flops_folded_backward),
):
    flops.register(_name, _formula)


def _cpu_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bilinear_rule.torchs_forward(x.shape[0], weight):
        return F.bilinear(x, y, weight, bias)
    z: Tensor = cpu.op("bilinear_forward")(x, y, weight, bias)
    return z


register("bilinear_forward", "reference", folded.reference_forward)
register("bilinear_backward", "reference", folded.reference_backward)
cpu.register_cpu("bilinear_forward", _cpu_forward)
cpu.register_cpu("bilinear_backward")
cuda.register_cuda("bilinear_forward")
cuda.register_cuda("bilinear_backward")
triton.register_triton("bilinear_forward", "fusion.triton_bilinear")
triton.register_triton("bilinear_backward", "fusion.triton_bilinear")
# Nothing but products of matrices: torch's, on every device.
_reasons: dict[str, Callable[[Arguments], list[str]]] = {
    **{name: functools.partial(cuda.common_reasons, name) for name in cuda.NAMESPACES},
    "triton": triton.common_reasons,
    "cpu": cpu.common_reasons,
}
for _backend in _reasons:
    register("folded_bilinear_forward", _backend, folded.forward, _reasons[_backend])
    register("folded_bilinear_backward", _backend, folded.backward, _reasons[_backend])
register("folded_bilinear_forward", "reference", folded.reference_forward)
register("folded_bilinear_backward", "reference", folded.reference_backward)
register_public("bilinear", "bilinear_forward", canonical, bilinear_rule.small)
