"""The operator glu: rows of (rows, dim) times the sigmoid of others."""

from __future__ import annotations

from velm_kernels.fusion.glu.reference import glu

from velm_kernels.operator import Operator

# x, gate: (rows, dim), any row stride, last stride 1, of one dtype. Results and the incoming gradient: contiguous.
OPERATOR = Operator(
    "glu",
    "Tensor x, Tensor gate",
    shapes=lambda a: a.x.new_empty(a.x.shape),
    reference=glu,
    differentiable=("x", "gate"),
    # The gradient of x is computed from the gate, that of the gate from both.
    saves={"x": ("gate",), "gate": ("x", "gate")},
    # Its autograd reads x for either gradient, so the reference backend has them written out.
    gradients=lambda a, wanted: (
        a.grad * a.gate.sigmoid() if wanted[0] else None,
        a.grad * a.x * a.gate.sigmoid() * (1 - a.gate.sigmoid()) if wanted[1] else None,
    ),
    gradient_shapes={"x": lambda a: a.grad.new_empty(a.grad.shape)},
    triton="fusion.glu.triton",
    cuda=False,
)
