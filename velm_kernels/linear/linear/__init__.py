"""``activation(x weight^T + bias) + residual`` as one operator: the projection of a layer with its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks, processors, products
from velm_kernels.backends import Arguments, cpu, forced
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.layout import as_matrix, unit_last_stride
from velm_kernels.linear.linear import reference
from velm_kernels.linear.linear.op import OPERATOR, what_to_keep
from velm_kernels.linear.linear.reference import ACTIVATIONS
from velm_kernels.processors import NEVER
from velm_kernels.products import own_product

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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        has_residual = arguments["residual"] is not None
        arguments["keeps"] = what_to_keep(arguments["activation"], x.dtype, has_residual)
    out, _ = OPERATOR(arguments)
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


def canonical(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`linear` and returns those of the operator."""
    is_ordinary = checks.ordinary(x, weight, or_none=bias)
    if not is_ordinary:
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected (..., in_features), given ()")
    checks.tensor("weight", weight, dims=2, layout="(out_features, in_features)")
    if not is_ordinary:
        checks.dtype_in("weight", weight, (x.dtype,))
        checks.same_device("weight", weight, "x", x)
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected (..., in_features) with in_features = {in_features} as in weight {tuple(weight.shape)}, "
            f"given {tuple(x.shape)}"
        )
    if bias is not None:
        if not is_ordinary:
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
        "keeps": "",
    }


OPERATOR.serves("linear", canonical, _small)
