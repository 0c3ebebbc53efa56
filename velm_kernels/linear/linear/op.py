"""The operator linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import order
from velm_kernels.layout import unit_last_stride
from velm_kernels.linear.linear import reference, torch_products
from velm_kernels.operator import Operator


def what_to_keep(activation: str, dtype: torch.dtype, has_residual: bool) -> str:
    """What backward needs that is neither an argument nor the result: "z", which is ``x weight^T + bias``, "value",
    which is the activation's, or "" for nothing."""
    if not activation:
        return ""
    if not reference.from_value(activation, dtype):
        return "z"
    return "value" if has_residual else ""


def _results(a: Any) -> tuple[Tensor, Tensor | None]:
    shape = (a.x.shape[0], a.weight.shape[0])
    return a.x.new_empty(shape), a.x.new_empty(shape) if a.keeps else None


def meaning(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, keeps: str
) -> tuple[Tensor, Tensor | None]:
    z = reference.linear(x, weight, bias)
    value = reference.value_of(z, activation)
    # A copy, as results of an operator are not one another.
    kept = {"": None, "z": z, "value": value}[keeps]
    return value if residual is None else value + residual, None if kept is None else kept.clone()


def gradients(a: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    """By the chain rule; also from ``grad_kept``, which only gradients of gradients have: that of what was kept."""
    grad: Tensor | None = a.grad
    grad_kept: Tensor | None = getattr(a, "grad_kept", None)
    like = grad if grad is not None else grad_kept
    assert like is not None
    saved, of_value = (a.out, True) if a.kept is None else (a.kept, a.keeps == "value")
    compute_dtype = torch.promote_types(like.dtype, torch.float32)

    def of_z(of: Tensor, through_activation: bool) -> Tensor:
        of = of.to(compute_dtype)
        return (
            reference.activation_gradient(of, saved.to(compute_dtype), a.activation, of_value)
            if through_activation and a.activation
            else of
        )

    with checks.without_autocast(like.device):
        grad_z = None if grad is None else of_z(grad, True)
        if grad_kept is not None:
            more = of_z(grad_kept, of_value)
            grad_z = more if grad_z is None else grad_z + more
        assert grad_z is not None
        found = [
            grad_z @ a.weight.to(compute_dtype) if wanted[0] else None,
            grad_z.transpose(0, 1) @ a.x.to(compute_dtype) if wanted[1] else None,
            grad_z.sum(0) if wanted[2] else None,
        ]
    return [None if value is None else value.to(like.dtype) for value in found]


def _out_is_saved(a: Any) -> bool:
    if a.keeps == "" and what_to_keep(a.activation, a.x.dtype, a.residual is not None):
        raise RuntimeError("velm::linear_forward: something must be kept where this activation needs a gradient")
    return bool(a.activation) and a.keeps == ""


def _backward_flops(a: Any) -> int:
    # x is there for the gradient of weight, and weight for that of x.
    features = sum(matrix[1] for matrix in (a.x, a.weight) if matrix)
    return int(2 * a.grad[0] * a.grad[1] * features)


# x (rows, in_features), weight (out_features, in_features), residual (rows, out_features): last stride 1, any row
# stride; bias contiguous; all of one dtype. activation: "" for none. keeps: what_to_keep where a gradient is recorded,
# else "". Results contiguous, (rows, out_features). Of backward: grad has last stride 1; with an activation one of out
# and kept is there. Gradients contiguous.
OPERATOR = Operator(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, str keeps",
    shapes=_results,
    reference=meaning,
    results=("out", "kept"),
    may_be_absent=("kept",),
    differentiable=("x", "weight", "bias"),
    passed_on=("residual",),
    only_again=("kept",),
    saves={"x": ("weight", "out", "kept"), "weight": ("x", "out", "kept"), "bias": ("out", "kept")},
    saves_only_if={"out": _out_is_saved, "kept": lambda a: a.keeps != ""},
    gradients=gradients,
    gradients_again=gradients,
    gradient_shapes={
        "x": lambda a: a.grad.new_empty((a.grad.shape[0], a.weight.shape[1])),
        "weight": lambda a: a.grad.new_empty((a.grad.shape[1], a.x.shape[1])),
        "bias": lambda a: a.grad.new_empty((a.grad.shape[1],)),
    },
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="linear.linear.triton",
    cpu="linear.linear.cpu_products",
    cuda=False,
    torch="linear.linear.torch_products",
    flops=lambda a: int(2 * a.x[0] * a.weight[0] * a.weight[1]),
    backward_flops=_backward_flops,
)
order.prefer_torch(OPERATOR.forward, where_the_table_lets_it=torch_products.is_best)
order.prefer_torch(OPERATOR.backward, where_the_table_lets_it=torch_products.is_best_backward)
