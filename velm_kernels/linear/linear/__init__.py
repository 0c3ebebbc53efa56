"""``activation(x weight^T + bias) + residual`` as one operator: the projection of a layer with its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks, processors, products
from velm_kernels.backends import Arguments, cpu, flops, forced, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.layout import as_matrix, unit_last_stride
from velm_kernels.linear.linear import cpu_products, reference, torch_products  # noqa: F401, which registers itself
from velm_kernels.linear.linear.reference import ACTIVATIONS
from velm_kernels.processors import NEVER
from velm_kernels.products import own_product

GRAD_X, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4
SMALL_QUICK_GELU = 1 << 15


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight^T + bias) + residual`` with everything after the product fused into it.

    Args:
        x: ``(..., in_features)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        weight: ``(out_features, in_features)``, dtype of x.
        bias: ``(out_features,)``, dtype of x.
        activation: None, ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"`` (its tanh form; Hendrycks and Gimpel,
            2016), ``"quick_gelu"`` (``z * sigmoid(1.702 z)``, as in CLIP), ``"silu"`` (``z * sigmoid(z)``) or
            ``"tanh"``.
        residual: ``(..., out_features)``, added after the activation. Any floating dtype; one other than x's is added
            outside of the fused kernel and the result promoted as torch does.

    Under autocast x, weight and bias are cast to its dtype, as by ``torch.nn.functional.linear``, which serves weights
    of tensor subclasses (quantised ones); DTensors are computed in parts, see ``velm_kernels/backends/sharding.py``.

    Returns:
        ``(..., out_features)``, contiguous, in x's dtype. Products accumulate in float32; in 16 bits the activation
        sees them rounded where the product is torch's, as in plain torch.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or the activation is unknown.

    Backward keeps x, weight and, only for an activation, one tensor of the output's size: the pre-activation, or for
    relu, and for tanh except in 16 bits, the activation's value, which is the output itself if there is no residual.
    What needs no gradient is neither kept nor computed. On the CPU the product runs in this library or in torch, by
    the fixed rule of ``velm_kernels.linear.faster_than_torch``; on GPUs it is torch's (cuBLASLt, with the epilogues
    that it has), and where several steps follow it, Triton makes one pass of them.

    Example:
        >>> x, weight, bias = torch.tensor([[1.0, -1.0]]), torch.eye(2), torch.zeros(2)
        >>> velm_kernels.linear(x, weight, bias, "relu", residual=torch.ones(1, 2))
        tensor([[2., 1.]])
    """
    small = _small(x, weight, bias, activation, residual)
    if small is not None:
        return small
    if checks.is_wrapped(weight) or checks.is_wrapped(x):
        return _one_after_another(x, weight, bias, activation, residual)
    x, weight, bias = checks.autocast(x, weight, bias) if isinstance(x, Tensor) else (x, weight, bias)
    arguments = canonical(x, weight, bias, activation, residual)
    if activation is None and residual is None and _is_plain_torch(x, weight.shape[0]):
        return torch.nn.functional.linear(x, weight, bias)
    late = residual is not None and residual.dtype != x.dtype
    if late:
        arguments["residual"] = None
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    arguments["save"] = bool(
        needs_grad and _saves_tensor(arguments["activation"], x.dtype, arguments["residual"] is not None)
    )
    out, _ = call("linear_forward", arguments)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out + residual if late else out


def _one_after_another(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """For tensors that only torch's own functions know, such as quantised weights."""
    out = reference.activate(torch.nn.functional.linear(x, weight, bias), activation or "")
    return out if residual is None else out + residual


def _small(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """The projection by torch's product and operators, where nothing follows the product, and where those are faster
    than one pass (:mod:`velm_kernels.processors`); else None."""
    if bias is None:
        taken = takes_torch(NEVER, x, weight, dtype=ANY)
    else:
        taken = takes_torch(NEVER, x, weight, bias, dtype=ANY)
    if not taken or x.dim() == 0 or weight.dim() != 2:
        return None
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features or in_features == 0 or (bias is not None and bias.shape != (out_features,)):
        return None
    rows = x.numel() // in_features
    if products.own_product_of(rows, x.dtype):
        return None
    if activation is None is residual:
        return torch.nn.functional.linear(x, weight, bias)
    if rows * out_features > _most_steps(x.dtype, activation) or (
        activation is not None and (activation.__class__ is not str or activation not in ACTIVATIONS[1:])
    ):
        return None
    if residual is not None and not (
        takes_torch(NEVER, residual, dtype=x.dtype) and residual.shape == (*x.shape[:-1], out_features)
    ):
        return None
    out = torch.nn.functional.linear(x, weight, bias)
    if activation:
        out = reference.activate(out, activation)
    return out if residual is None else out + residual


def _most_steps(dtype: torch.dtype, activation: str | None) -> int:
    """Elements of the result up to which torch's operators behind its product are faster than one pass."""
    if activation == "quick_gelu":
        # Three operators, each of which keeps its argument.
        return SMALL_QUICK_GELU
    rules = processors.rules()
    return rules.bfloat16_steps if dtype is torch.bfloat16 else rules.steps


def _is_plain_torch(x: Tensor, out_features: int) -> bool:
    """Whether the operator would do no more than call torch: then calling torch at once saves the detour.

    Under torch.compile the graph keeps the operator, whose choice may then depend on sizes known at run time.
    """
    if torch.compiler.is_compiling() or forced() or x.dtype not in cpu.DTYPES:
        return False
    if x.device.type != "cpu":
        return True
    in_features = x.shape[-1]
    rows = x.numel() // in_features if in_features else 0
    return not own_product(rows, in_features, out_features, x.dtype, x.device, x.requires_grad)


def _saves_tensor(activation: str, dtype: torch.dtype, has_residual: bool) -> bool:
    """Whether backward needs a tensor that is neither an input nor the output."""
    return activation != "" and (has_residual or not reference.from_value(activation, dtype))


def canonical(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`linear` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected (..., in_features), given ()")
    checks.tensor("weight", weight, dims=2, layout="(out_features, in_features)")
    checks.dtype_in("weight", weight, (x.dtype,))
    checks.same_device("weight", weight, "x", x)
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected (..., in_features) with in_features = {in_features} as in weight {tuple(weight.shape)}, "
            f"given {tuple(x.shape)}"
        )
    if bias is not None:
        checks.dtype_in("bias", checks.tensor("bias", bias), (x.dtype,))
        checks.same_device("bias", bias, "x", x)
        checks.shape("bias", bias, "(out_features,)", (out_features,))
    checks.choice("activation", activation, ACTIVATIONS[1:], or_none=True)
    if residual is not None:
        checks.dtype_in("residual", checks.tensor("residual", residual), checks.FLOAT_DTYPES)
        checks.same_device("residual", residual, "x", x)
        checks.shape("residual", residual, "(..., out_features)", (*x.shape[:-1], out_features))
    return {
        "x": as_matrix(x),
        "weight": unit_last_stride(weight),
        "bias": None if bias is None else bias.contiguous(),
        "residual": None if residual is None else as_matrix(residual),
        "activation": activation or "",
        "save": False,
    }


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: str,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad_weight = grad_bias = (0,)
    if grad_mask & GRAD_X and weight is not None:
        grad_x = (grad.shape[0], weight.shape[1])  # type: ignore[assignment]
    if grad_mask & GRAD_WEIGHT and x is not None:
        grad_weight = (grad.shape[1], x.shape[1])  # type: ignore[assignment]
    if grad_mask & GRAD_BIAS:
        grad_bias = (grad.shape[1],)
    return grad.new_empty(grad_x), grad.new_empty(grad_weight), grad.new_empty(grad_bias)


# x (rows, in_features), weight (out_features, in_features), residual (rows, out_features): last stride 1, any row
# stride; bias contiguous; all of one dtype. activation: "" for none. Results contiguous: out (rows, out_features), and
# with `save` what backward needs beside the inputs, of the same shape (z, or activation(z) where
# reference.from_value says so), else shape (0,).
declare(
    "linear_forward",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool save",
    "(Tensor, Tensor)",
    fake=_fake_forward,
)
# grad (rows, out_features): last stride 1. x is there iff grad_mask has GRAD_WEIGHT, weight iff it has GRAD_X, saved
# iff there is an activation: what forward saved. What grad_mask does not ask for has shape (0,).
declare(
    "linear_backward",
    "Tensor grad, Tensor? x, Tensor? weight, Tensor? saved, str activation, int grad_mask",
    "(Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, residual, activation, save, backend = inputs
    needs_x, needs_weight, needs_bias = ctx.needs[:3]
    saved = None
    if activation and (needs_x or needs_weight or needs_bias):
        if not save and _saves_tensor(activation, x.dtype, residual is not None):
            raise RuntimeError("velm::linear_forward: save must be True where this activation needs a gradient")
        saved = output[1] if save else output[0]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, saved)
    ctx.activation, ctx.backend = activation, backend
    # What is saved is a result like the other: the gradients that come from it depend on x, weight and bias through it.
    if not save:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None] * 7
    if grad_saved is not None:
        return _differentiable_backward(ctx, grad, grad_saved)
    if grad is None:
        return tuple(results)
    x, weight, saved = ctx.saved_tensors
    wanted = ctx.needs[:3]
    if any(wanted):
        grad_mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
        grads = ops.linear_backward(unit_last_stride(grad), x, weight, saved, ctx.activation, grad_mask, ctx.backend)
        results[:3] = [value if want else None for value, want in zip(grads, wanted, strict=True)]
    if ctx.needs[3]:
        results[3] = grad
    return tuple(results)


def _differentiable_backward(ctx: Any, grad: Tensor | None, grad_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """What :func:`_backward` computes, also from the gradient of what was saved, which only gradients of it have."""
    results: list[Tensor | None] = [None] * 7
    x, weight, saved = ctx.saved_tensors
    given = grad if grad is not None else grad_saved
    if given is None or not any(ctx.needs):
        return tuple(results)
    wide = torch.promote_types(given.dtype, torch.float32)
    with checks.without_autocast(given.device):
        of_value = reference.from_value(ctx.activation, given.dtype)
        grad_z = None
        if grad is not None:
            grad_z = grad.to(wide)
            if saved is not None:
                grad_z = reference.activation_gradient(grad_z, saved.to(wide), ctx.activation, of_value)
        if grad_saved is not None:
            more = grad_saved.to(wide)
            if of_value:
                more = reference.activation_gradient(more, saved.to(wide), ctx.activation, of_value)
            grad_z = more if grad_z is None else grad_z + more
        assert grad_z is not None
        if ctx.needs[0]:
            results[0] = (grad_z @ weight.to(wide)).to(given.dtype)
        if ctx.needs[1]:
            results[1] = (grad_z.transpose(0, 1) @ x.to(wide)).to(given.dtype)
        if ctx.needs[2]:
            results[2] = grad_z.sum(0).to(given.dtype)
        if ctx.needs[3]:
            results[3] = grad
    return tuple(results)


def _flops_forward(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * weight_shape[0] * weight_shape[1])


def _flops_backward(grad_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    # x is given for the gradient of weight, and weight for that of x
    features = (x_shape[1] if x_shape else 0) + (weight_shape[1] if weight_shape else 0)
    return int(2 * grad_shape[0] * grad_shape[1] * features)


flops.register("linear_forward", _flops_forward)
flops.register("linear_backward", _flops_backward)


def _reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) @ weight.to(wide).transpose(0, 1)
    if bias is not None:
        z = z + bias.to(wide)
    activated = reference.activate(z, activation)
    out = activated if residual is None else activated + residual.to(wide)
    kept = x.new_empty((0,))
    if save:
        kept = (activated if reference.from_value(activation, x.dtype) else z).to(x.dtype, copy=True)
    return out.to(x.dtype), kept


def _reference_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str, grad_mask: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_z = grad.to(wide)
    if saved is not None:
        of_value = reference.from_value(activation, grad.dtype)
        grad_z = reference.activation_gradient(grad_z, saved.to(wide), activation, of_value)
    grad_x, grad_weight, grad_bias = (grad.new_empty((0,)) for _ in range(3))
    if weight is not None:
        grad_x = (grad_z @ weight.to(wide)).to(grad.dtype)
    if x is not None:
        grad_weight = (grad_z.transpose(0, 1) @ x.to(wide)).to(grad.dtype)
    if grad_mask & GRAD_BIAS:
        grad_bias = grad_z.sum(0).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


register_autograd(
    "linear_forward",
    _backward,
    setup_context=_setup_context,
    meaning=_reference_forward,
    differentiable_backward=_differentiable_backward,
)
register("linear_forward", "reference", _reference_forward)
register("linear_backward", "reference", _reference_backward)
register("linear_forward", "cpu", cpu_products.forward, cpu_products.reasons)
register("linear_backward", "cpu", cpu_products.backward, cpu_products.reasons)
triton.register_triton("linear_forward", "linear.linear.triton")
triton.register_triton("linear_backward", "linear.linear.triton")
register_public("linear", "linear_forward", canonical, _small)
