"""The fusion of several modalities through a sum of products of projections, and its gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, flops, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import autograd_inside, declare, register_autograd
from velm_kernels.backends.small import takes_torch
from velm_kernels.fusion import cuda_low_rank, reference
from velm_kernels.fusion.tensor_fusion import MOST_INPUTS, checked_inputs, leading_beside
from velm_kernels.layout import unit_last_stride

# Bits of grad_mask: the inputs, their factors, weight, bias.
GRADIENTS = 2 * MOST_INPUTS + 2
# float32 numbers that backward keeps at the most: 64 MiB.
MOST_KEPT = 1 << 24
# Elements of each input and factor, and of a projection, up to which torch's form is the faster one, see
# velm_kernels.backends.small.
SMALL, SMALL_PROJECTED = 1 << 15, 1 << 13


def low_rank_fusion(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``sum_r weight[r] * prod_m ([1; x_m] factors[m][r]) + bias``: low-rank multimodal fusion (Liu et al., 2018).

    It is :func:`velm_kernels.tensor_fusion` with a weight of low rank, at a cost that grows with the sum of the
    features of the modalities and not with their product.

    Args:
        inputs: 2 to 4 tensors ``(..., d_m)``, float32, bfloat16, float16, or float64 (computed by the reference
            backend); their leading dimensions broadcast, and ``(batch, d)`` also goes with ``(batch, regions, d)``.
        factors: for every input ``(rank, 1 + d_m, out)``, dtype of the inputs; the first of the ``1 + d_m`` rows is
            that of the 1.
        weight: ``(rank,)``, dtype of the inputs.
        bias: ``(out,)``, dtype of the inputs.

    Under autocast all are cast to its dtype.

    Returns:
        ``(..., out)`` over the broadcast leading dimensions, contiguous, in the dtype of the inputs; sums accumulate
        in float32.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are not 2 to 4 inputs.

    An input that has one row for all regions is projected once and not for each of them. Backward keeps the float32
    projections, ``rank * out`` numbers for every row of an input, where they are no more than ``MOST_KEPT`` numbers
    together; else it computes them again, and they never exist all at once.
    """
    small = _small(inputs, factors, weight, bias)
    if small is not None:
        return small
    arguments, leading = _prepared(inputs, factors, weight, bias)
    out, _ = call("low_rank_fusion_forward", arguments)
    return out if len(leading) == 1 else out.view(*leading, out.shape[1])


def _small(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if inputs.__class__ not in (list, tuple) or factors.__class__ not in (list, tuple):
        return None
    if not (2 <= len(inputs) <= MOST_INPUTS and len(factors) == len(inputs)):
        return None
    if not takes_torch(SMALL, *inputs, *factors, weight) or weight.dim() != 1 or factors[0].dim() != 3:
        return None
    rank, rows, out_features = len(weight), inputs[0].shape[:-1], factors[0].shape[2]
    if 0 in (rank, out_features) or len(rows) != 1 or not 0 < rows[0] * rank * out_features <= SMALL_PROJECTED:
        return None
    if bias is not None and not (takes_torch(SMALL, bias) and bias.shape == (out_features,)):
        return None
    product = None
    for x, factor in zip(inputs, factors, strict=True):
        if x.shape[:-1] != rows or factor.shape != (rank, 1 + x.shape[1], out_features):
            return None
        projected = torch.matmul(torch.cat([x.new_ones(rows[0], 1), x], 1), factor)
        product = projected if product is None else product * projected
    assert product is not None
    out = torch.matmul(weight, product.view(rank, -1)).view(rows[0], out_features)
    return out if bias is None else out + bias


def _leading(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return checks.broadcast_shapes(*leading_beside(inputs))


def canonical(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Arguments:
    """Checks the arguments of :func:`low_rank_fusion` and returns those of the operator."""
    return _prepared(inputs, factors, weight, bias)[0]


def _prepared(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Arguments, tuple[int, ...]]:
    """The arguments of the operator, and the leading dimensions of the result."""
    inputs, weight, bias, leading = checked_inputs(inputs, weight, bias, _leading)
    factors = checks.tensors("factors", factors, 1)
    if len(factors) != len(inputs):
        raise ValueError(f"factors: expected one for each of {len(inputs)} inputs, given {len(factors)} of them")
    for m, factor in enumerate(factors):
        checks.tensor(f"factors[{m}]", factor, dims=3, layout="(rank, 1 + d, out)")
    checks.tensor("weight", weight, dims=1, layout="(rank,)")
    cast: list[Tensor] = []
    for m, (x, factor) in enumerate(zip(inputs, checks.autocast(*factors), strict=True)):
        checks.dtype_in(f"factors[{m}]", factor, (x.dtype,))
        checks.same_device(f"factors[{m}]", factor, "inputs[0]", inputs[0])
        expected = (weight.shape[0], 1 + x.shape[-1], cast[0].shape[2] if cast else factor.shape[2])
        checks.shape(f"factors[{m}]", factor, "(rank, 1 + d, out)", expected)
        cast.append(factor.contiguous())
    if bias is not None:
        checks.shape("bias", bias, "(out,)", (cast[0].shape[2],))
        bias = bias.contiguous()
    rows = [_rows(x, own, leading) for x, own in zip(inputs, leading_beside(inputs), strict=True)]
    missing = [None] * (MOST_INPUTS - len(rows))
    needs_grad = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (*inputs, *cast, weight, bias)
    )
    arguments = {
        **{f"x{m}": x for m, x in enumerate([*rows, *missing])},
        **{f"factor{m}": factor for m, factor in enumerate([*cast, *missing])},
        "weight": weight.contiguous(),
        "bias": bias,
        "rows": math.prod(leading),
        "save": needs_grad and _numbers([*rows, *missing], cast[0]) <= MOST_KEPT,
    }
    return arguments, leading


def _numbers(rows: Sequence[Tensor | None], factor0: Tensor) -> int:
    """How many there are of the projections of all rows and ranks."""
    return sum(x.shape[0] for x in rows if x is not None) * factor0.shape[0] * factor0.shape[2]


def _rows(x: Tensor, own: tuple[int, ...], leading: tuple[int, ...]) -> Tensor:
    """``(rows, d)``: a row for each of the result, or one for all regions where the last leading dimension is 1."""
    if x.dim() == 2 and own == leading:
        return unit_last_stride(x)
    own = (1,) * (len(leading) - len(own)) + own
    if leading and leading[-1] > 1 and own[-1] == 1:
        own, leading = own[:-1], leading[:-1]
    dim = x.shape[-1]
    x = x.reshape(*own, dim).expand(*leading, dim).reshape(math.prod(leading), dim)
    return unit_last_stride(x)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x0, factor0, (rows, save) = arguments[0], arguments[MOST_INPUTS], arguments[-3:-1]
    kept = _numbers(arguments[:MOST_INPUTS], factor0) if save else 0
    return x0.new_empty((rows, factor0.shape[2])), x0.new_empty((kept,), dtype=torch.float32)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, grad_mask, _ = arguments[: 2 * MOST_INPUTS + 1] + arguments[-2:]
    shapes = [None if value is None else value.shape for value in tensors] + [grad.shape[1:]]
    return tuple(
        grad.new_empty(shape if shape is not None and grad_mask >> bit & 1 else (0,))
        for bit, shape in enumerate(shapes)
    )


# x0 to x3: (rows of m, d_m), any row stride, last stride 1; rows of m are `rows`, or divide it where a row serves as
# many neighbours of the result. factors (rank, 1 + d_m, out), weight and bias contiguous; all of one dtype. Out
# (rows, out) and the gradients are contiguous; what grad_mask does not ask for has shape (0,). kept: float32, the
# projections of all rows and ranks (rank, rows of m, out) one modality behind the other if `save`, else shape (0,) and
# backward computes them again.
_ARGUMENTS = (
    ", ".join(f"Tensor{'?' * (m > 1)} {name}{m}" for name in ("x", "factor") for m in range(MOST_INPUTS))
    + ", Tensor weight"
)
declare(
    "low_rank_fusion_forward",
    f"{_ARGUMENTS}, Tensor? bias, SymInt rows, bool save",
    "(Tensor, Tensor)",
    fake=_fake_forward,
)
declare(
    "low_rank_fusion_backward",
    f"Tensor grad, {_ARGUMENTS}, Tensor kept, SymInt rows, int grad_mask",
    f"({', '.join(['Tensor'] * GRADIENTS)})",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.rows, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:GRADIENTS]
    if grad is None:
        return (None,) * (GRADIENTS + 3)
    grad_mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
    grads = ops.low_rank_fusion_backward(grad.contiguous(), *ctx.saved_tensors, ctx.rows, grad_mask, ctx.backend)
    return (*(value if want else None for value, want in zip(grads, wanted, strict=True)), None, None, None)


def _flops(shapes: Sequence[Any], factor_shape: Any) -> int:
    rank, _, out = factor_shape
    return int(sum(2 * x[0] * (1 + x[1]) * rank * out for x in shapes if x is not None))


def _flops_forward(*shapes: Any, **kwargs: Any) -> int:
    return _flops(shapes[:MOST_INPUTS], shapes[MOST_INPUTS])


flops.register("low_rank_fusion_forward", _flops_forward)


def _flops_backward(grad_shape: Any, *shapes: Any, **kwargs: Any) -> int:
    inputs, (kept, _, grad_mask) = shapes[:MOST_INPUTS], shapes[2 * MOST_INPUTS + 1 : 2 * MOST_INPUTS + 4]
    again = inputs if kept[0] == 0 and grad_mask & ~(1 << GRADIENTS - 1) else ()
    of_x = [x for m, x in enumerate(inputs) if grad_mask >> m & 1]
    of_factor = [x for m, x in enumerate(inputs) if grad_mask >> (MOST_INPUTS + m) & 1]
    return _flops([*again, *of_x, *of_factor], shapes[MOST_INPUTS])


flops.register("low_rank_fusion_backward", _flops_backward)


def _meaning(tensors: Sequence[Tensor | None], rows: int) -> Tensor:
    *tensors, weight, bias = tensors
    assert weight is not None
    inputs, factors = ([value for value in four if value is not None] for four in (tensors[:4], tensors[4:]))
    inputs = [x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], 0) for x in inputs]
    return reference.low_rank_fusion(inputs, factors, weight, bias)


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, rows, save = arguments
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    out = _meaning([None if value is None else value.to(wide) for value in tensors], rows)
    # Filled by those that read it again: this one does not.
    kept = tensors[0].new_zeros(_numbers(tensors[:MOST_INPUTS], tensors[MOST_INPUTS]) if save else 0)
    return out.to(tensors[0].dtype).contiguous(), kept.float()


def _reference_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, rows, grad_mask = arguments
    wide = torch.promote_types(grad.dtype, torch.float32)
    wanted = [bool(grad_mask >> bit & 1) for bit in range(GRADIENTS)]
    with autograd_inside():
        leaves = [
            None if value is None else value.detach().to(wide).requires_grad_(want)
            for value, want in zip((*tensors, grad.new_zeros(grad.shape[1:])), wanted, strict=True)
        ]
        chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want]
        found = iter(torch.autograd.grad(_meaning(leaves, rows), chosen, grad.to(wide)))
    return tuple(
        next(found).to(grad.dtype).contiguous() if leaf is not None and want else grad.new_empty((0,))
        for leaf, want in zip(leaves, wanted, strict=True)
    )


register_autograd("low_rank_fusion_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
for _name, _function in (("forward", _reference_forward), ("backward", _reference_backward)):
    register(f"low_rank_fusion_{_name}", "reference", _function)
    triton.register_triton(f"low_rank_fusion_{_name}", "fusion.triton_low_rank")
    cpu.register_cpu(f"low_rank_fusion_{_name}")
for _backend, _namespace in cuda.NAMESPACES.items():
    for _name, _call in (("forward", cuda_low_rank.forward), ("backward", cuda_low_rank.backward)):
        _reasons = functools.partial(cuda.reasons, _backend, "low_rank_gradients")
        register(f"low_rank_fusion_{_name}", _backend, functools.partial(_call, _namespace), _reasons)
register_public("low_rank_fusion", "low_rank_fusion_forward", canonical, _small)
