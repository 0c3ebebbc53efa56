"""The common tail of factorised bilinear fusions: product, sum over the factor, signed square root, L2 norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.fusion import reference
from velm_kernels.layout import unit_last_stride

GRAD_A, GRAD_B = 1, 2
LAYOUTS = ("inner", "outer")


def factorized_pool(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``normalize(signed_sqrt(sum over the factor of dropout(a * b)))``, one pass forward and one backward.

    The tail of the fusions that replace a bilinear form by a product of projections: MLB (Kim et al., 2017) with
    factor 1, MFB and MFH (Yu et al., 2017) with the factor innermost, MUTAN (Ben-younes et al., 2017) and BLOCK
    (Ben-younes et al., 2019) with the factor outermost.

    Args:
        a: ``(..., factor * dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        b: ``(..., factor * dim)``, dtype of a. The leading dimensions of a and b broadcast.
        factor: how many products are summed for one output.
        layout: ``"inner"``: output o is the sum of the products ``[o * factor, (o + 1) * factor)``; ``"outer"``: of
            the products ``o, dim + o, 2 * dim + o, ...``
        power_norm: the signed square root ``sign(z) * sqrt(|z|)`` of the sums z.
        l2_norm: the outputs of a row are divided by their L2 norm, or by 1e-12 if that is larger.
        dropout_p: in [0, 1), of the products: those kept are divided by ``1 - dropout_p``. The random numbers are
            those of :func:`velm_kernels.dropout_residual` for rows of ``factor * dim``.
        seed: integer, or integer tensor with one element; drawn from torch's generator where not given.

    Under autocast a and b are cast to its dtype.

    Returns:
        ``(..., dim)`` over the broadcast leading dimensions, contiguous, in a's dtype; everything in between is
        float32.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, factor does not divide, or layout is unknown.

    The gradient of the signed root is ``1 / (2 sqrt|z|)``, infinite at 0: there it counts as 0. Of root and norm
    together it is ``dz = (g - u (u . g)) / (2 n^2 |u|)`` with u the output and ``n^2 = sum |z|``, computed in that
    form. A row of zeros gives 0 and passes back 0. Backward keeps a and b alone.
    """
    if isinstance(a, Tensor):
        a, b = checks.autocast(a, b)
    arguments = canonical(a, b, factor, layout, power_norm, l2_norm, dropout_p, seed)
    out: Tensor = call("factorized_pool_forward", arguments)
    return out.view(*checks.broadcast_shapes(a.shape[:-1], b.shape[:-1]), out.shape[-1])


def canonical(
    a: Tensor,
    b: Tensor,
    factor: int = 1,
    layout: str = "inner",
    power_norm: bool = False,
    l2_norm: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`factorized_pool` and returns those of the operator, ``(batch, regions, ...)``."""
    checks.dtype_in("a", checks.tensor("a", a), checks.FLOAT_DTYPES)
    checks.dtype_in("b", checks.tensor("b", b), (a.dtype,))
    checks.same_device("b", b, "a", a)
    if a.dim() == 0:
        raise ValueError("a: expected (..., factor * dim), given ()")
    try:
        if b.dim() == 0 or b.shape[-1] != a.shape[-1]:
            raise RuntimeError
        leading = checks.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"b: expected (..., {a.shape[-1]}) with leading dimensions that broadcast with those of a "
            f"{tuple(a.shape)}, given {tuple(b.shape)}"
        ) from None
    if checks.integer("factor", factor, 1) and a.shape[-1] % factor:
        raise ValueError(f"factor: expected a positive divisor of {a.shape[-1]} features, given {factor}")
    checks.choice("layout", layout, LAYOUTS)
    dropout_p = checks.probability("dropout_p", dropout_p)
    checks.flag("power_norm", power_norm)
    checks.flag("l2_norm", l2_norm)
    return {
        "a": _regions(a, leading),
        "b": _regions(b, leading),
        "seed": checks.seed_tensor(dropout_p, seed, a.device),
        "factor": factor,
        "inner": layout == "inner",
        "power_norm": power_norm,
        "l2_norm": l2_norm,
        "dropout_p": dropout_p,
    }


def _regions(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """``(batch, regions, features)``; what is broadcast over regions is not repeated."""
    batch = 1
    for size in leading[:-1]:
        batch = batch * size
    x = x.expand(*leading, x.shape[-1]).reshape(batch, leading[-1] if leading else 1, x.shape[-1])
    return unit_last_stride(x)


def _fake_forward(
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    backend: str,
) -> Tensor:
    return a.new_empty((*a.shape[:2], a.shape[2] // factor))


def _fake_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if grad_mask & GRAD_A else (0,)), a.new_empty(b.shape if grad_mask & GRAD_B else (0,))


# a, b: (batch, regions, factor * dim), last stride 1, other strides arbitrary (0 where broadcast), one dtype; grad and
# out: (batch, regions, dim) contiguous; seed: int64 scalar, given iff dropout_p > 0. Gradients contiguous; what
# grad_mask does not ask for has shape (0,).
_ARGUMENTS = "Tensor a, Tensor b, Tensor? seed, int factor, bool inner, bool power_norm, bool l2_norm, float dropout_p"
declare("factorized_pool_forward", _ARGUMENTS, "Tensor", fake=_fake_forward)
declare(
    "factorized_pool_backward",
    f"Tensor grad, {_ARGUMENTS}, int grad_mask",
    "(Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.factor, ctx.inner, ctx.power_norm, ctx.l2_norm, ctx.dropout_p, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_a, wants_b = ctx.needs_input_grad[:2]
    options = (ctx.factor, ctx.inner, ctx.power_norm, ctx.l2_norm, ctx.dropout_p)
    grad_a, grad_b = ops.factorized_pool_backward(
        grad.contiguous(), *ctx.saved_tensors, *options, GRAD_A * wants_a + GRAD_B * wants_b, ctx.backend
    )
    return grad_a if wants_a else None, grad_b if wants_b else None, *([None] * 7)


def _reference_forward(
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    layout = LAYOUTS[not inner]
    out = reference.factorized_pool(a.to(wide), b.to(wide), factor, layout, power_norm, l2_norm, dropout_p, seed)
    return out.to(a.dtype).contiguous()


def _reference_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    factor: int,
    inner: bool,
    power_norm: bool,
    l2_norm: bool,
    dropout_p: float,
    grad_mask: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    layout = LAYOUTS[not inner]
    grads = reference.factorized_pool_gradient(
        grad.to(wide), a.to(wide), b.to(wide), factor, layout, power_norm, l2_norm, dropout_p, seed
    )
    return tuple(g.to(a.dtype) if grad_mask >> bit & 1 else a.new_empty((0,)) for bit, g in enumerate(grads))  # type: ignore[return-value]


register_autograd("factorized_pool_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
for _name, _function in (("forward", _reference_forward), ("backward", _reference_backward)):
    register(f"factorized_pool_{_name}", "reference", _function, lambda arguments: [])
    triton.register_triton(f"factorized_pool_{_name}", "fusion.triton_factorized")
    cpu.register_cpu(f"factorized_pool_{_name}")
    cuda.register_cuda(f"factorized_pool_{_name}")
register_public("factorized_pool", "factorized_pool_forward", canonical)
