"""Feature-wise linear modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.small import takes_torch
from velm_kernels.constructors import checked
from velm_kernels.fusion import reference
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.linear import linear

GRAD_X, GRAD_GAMMA, GRAD_BETA = 1, 2, 4
# Elements of x up to which torch's form is the faster one, see velm_kernels.backends.small.
SMALL = 1 << 16


def film(x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0) -> Tensor:
    """``(gamma_offset + gamma) * x + beta``, feature by feature: FiLM (Perez et al., 2018), one pass forward and one
    backward.

    Args:
        x: ``(batch, ..., dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend). With
            ``channels_first``: ``(batch, dim, *spatial)``; read as it lies, also in ``torch.channels_last``.
        gamma, beta: ``(batch, dim)``, the same for all regions or pixels of an entry, or ``(dim,)``; dtype of x.
        channels_first: see ``x``.
        gamma_offset: added to gamma, in float32: 1 for a gamma that is learned as a difference from the identity.

    Under autocast all are cast to its dtype.

    Returns:
        the shape, the dtype and the order in memory of x; everything in between is float32.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    The gradient of gamma is the sum of ``grad * x`` over the regions of an entry, that of beta the sum of ``grad``,
    both in float32. Backward keeps x and gamma, each only where a gradient needs it.
    """
    small = _small(x, gamma, beta, channels_first=channels_first, gamma_offset=gamma_offset)
    if small is not None:
        return small
    if isinstance(x, Tensor):
        x, gamma, beta = checks.autocast(x, gamma, beta)
    arguments = canonical(x, gamma, beta, channels_first=channels_first, gamma_offset=gamma_offset)
    out: Tensor = call("film_forward", arguments)
    return (out.transpose(1, 2) if channels_first else out).view(x.shape)


def _small(
    x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0
) -> Tensor | None:
    if not takes_torch(SMALL, x, gamma, beta) or gamma_offset.__class__ is not float or x.dim() < 2:
        return None
    if channels_first is not False or gamma.shape != (x.shape[0], x.shape[-1]) or beta.shape != gamma.shape:
        return None
    shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    gamma = gamma.view(shape) if gamma_offset == 0.0 else gamma.view(shape) + gamma_offset
    return torch.addcmul(beta.view(shape), gamma, x)


def canonical(
    x: Tensor, gamma: Tensor, beta: Tensor, *, channels_first: bool = False, gamma_offset: float = 0.0
) -> Arguments:
    """Checks the arguments of :func:`film` and returns those of the operator, ``(batch, regions, dim)``."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    layout = "(batch, dim, *spatial)" if checks.flag("channels_first", channels_first) else "(batch, ..., dim)"
    if x.dim() < 2:
        raise ValueError(f"x: expected {layout}, given {tuple(x.shape)}")
    batch, dim = x.shape[0], x.shape[1 if channels_first else -1]
    for name, value in (("gamma", gamma), ("beta", beta)):
        checks.dtype_in(name, checks.tensor(name, value), (x.dtype,))
        checks.same_device(name, value, "x", x)
        if tuple(value.shape) not in ((batch, dim), (dim,)):
            raise ValueError(
                f"{name}: expected (batch, dim) = {(batch, dim)} or (dim,) = {(dim,)}, given {tuple(value.shape)}"
            )
    gamma_offset = checks.number("gamma_offset", gamma_offset, -1e30, 1e30, described="a finite number")
    if channels_first:
        rows = x.reshape(batch, dim, product(x.shape[2:])).transpose(1, 2)
    else:
        # One gamma for all: then all rows are regions of one entry, and its gradient is one sum.
        leading = (1, *x.shape[:-1]) if gamma.dim() == beta.dim() == 1 else x.shape[:-1]
        batch = leading[0]
        rows = x.reshape(batch, product(leading[1:]), dim)
    # Which of the two last strides is 1; with one column or one region either may be said to be.
    regions_contiguous = rows.stride(1) == 1 and rows.stride(2) != 1 and dim > 1
    if not regions_contiguous and rows.stride(2) != 1 and dim > 1:
        rows = rows.contiguous()
    gamma, beta = (unit_last_stride(value.expand(batch, dim)) for value in (gamma, beta))
    return {
        "x": rows,
        "gamma": gamma,
        "beta": beta,
        "regions_contiguous": regions_contiguous,
        "gamma_offset": gamma_offset,
    }


def empty_like_rows(x: Tensor, regions_contiguous: bool) -> Tensor:
    """Uninitialised, of x's shape; contiguous, with ``regions_contiguous`` in the order (batch, dim, regions)."""
    batch, regions, dim = x.shape
    if regions_contiguous:
        return x.new_empty((batch, dim, regions)).transpose(1, 2)
    return x.new_empty((batch, regions, dim))


def _fake_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, regions_contiguous: bool, gamma_offset: float, backend: str
) -> Tensor:
    return empty_like_rows(x, regions_contiguous)


def empty_gradients(grad: Tensor, regions_contiguous: bool, grad_mask: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, gamma and beta; what is not wanted has shape (0,)."""
    batch, _, dim = grad.shape
    return (
        empty_like_rows(grad, regions_contiguous) if grad_mask & GRAD_X else grad.new_empty((0,)),
        grad.new_empty((batch, dim) if grad_mask & GRAD_GAMMA else (0,)),
        grad.new_empty((batch, dim) if grad_mask & GRAD_BETA else (0,)),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    regions_contiguous: bool,
    gamma_offset: float,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(grad, regions_contiguous, grad_mask)


# x: (batch, regions, dim), last stride 1, or, with regions_contiguous, the one before it, other strides arbitrary;
# gamma, beta: (batch, dim), last stride 1; all of one dtype. Results and grad are as empty_like_rows.
declare(
    "film_forward",
    "Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, float gamma_offset",
    "Tensor",
    fake=_fake_forward,
)
# x is there if the gradient of gamma is wanted, gamma if that of x is.
declare(
    "film_backward",
    "Tensor grad, Tensor? x, Tensor? gamma, bool regions_contiguous, float gamma_offset, int grad_mask",
    "(Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, _, *ctx.settings, ctx.backend = inputs
    wants_x, wants_gamma, wants_beta = ctx.needs_input_grad[:3]
    ctx.grad_mask = GRAD_X * wants_x + GRAD_GAMMA * wants_gamma + GRAD_BETA * wants_beta
    ctx.save_for_backward(x if wants_gamma else None, gamma if wants_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2) if ctx.settings[0] else grad.contiguous()
    grads = ops.film_backward(grad, *ctx.saved_tensors, *ctx.settings, ctx.grad_mask, ctx.backend)
    return *(g if ctx.grad_mask >> bit & 1 else None for bit, g in enumerate(grads)), None, None, None


def _reference_forward(x: Tensor, gamma: Tensor, beta: Tensor, regions_contiguous: bool, gamma_offset: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    out = reference.film(x.to(wide), gamma.to(wide)[:, None], beta.to(wide)[:, None], gamma_offset)
    out = out.to(x.dtype)
    # As empty_like_rows has it in memory.
    return out.transpose(1, 2).contiguous().transpose(1, 2) if regions_contiguous else out.contiguous()


def _reference_backward(
    grad: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    regions_contiguous: bool,
    gamma_offset: float,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_gradients(grad, regions_contiguous, grad_mask)
    g = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if grad_mask & GRAD_X:
        assert gamma is not None
        grads[0].copy_((gamma_offset + gamma.to(g.dtype)[:, None]) * g)
    if grad_mask & GRAD_GAMMA:
        assert x is not None
        grads[1].copy_((g * x.to(g.dtype)).sum(1))
    if grad_mask & GRAD_BETA:
        grads[2].copy_(g.sum(1))
    return grads


register_autograd("film_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
for _name, _function in (("forward", _reference_forward), ("backward", _reference_backward)):
    register(f"film_{_name}", "reference", _function, lambda arguments: [])
    triton.register_triton(f"film_{_name}", "fusion.triton_modulation")
    cpu.register_cpu(f"film_{_name}")
    cuda.register_cuda(f"film_{_name}")
register_public("film", "film_forward", canonical, _small)


class FiLM(nn.Module):
    """Modulation of features by a condition: a linear layer makes gamma and beta, :func:`velm_kernels.film` applies
    them (Perez et al., 2018).

    Args:
        condition_dim: features of the condition.
        features: features that are modulated.
        channels_first: whether they are channels of ``(batch, features, *spatial)``.
        device, dtype: of the parameters.

    The state_dict is that of one ``torch.nn.Linear``: ``linear.weight (2 * features, condition_dim)`` and
    ``linear.bias (2 * features,)``, gamma before beta. The weight starts at 0 and the bias at 1 for gamma and 0 for
    beta: the module begins as the identity.

    Shape:
        x ``(batch, ..., features)``, or ``(batch, features, *spatial)``, and condition ``(batch, condition_dim)`` to
        the shape of x.
    """

    @checked()
    def __init__(
        self,
        condition_dim: int,
        features: int,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.channels_first = features, channels_first
        self.linear = nn.Linear(condition_dim, 2 * features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias[: self.features] = 1.0
            self.linear.bias[self.features :] = 0.0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        size = self.linear.weight.shape[1]
        checks.features("condition", condition, "(batch, condition_dim)", size, self.linear.weight, 2)
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
        if x.dim() < 2 or x.shape[1 if self.channels_first else -1] != self.features or len(x) != len(condition):
            layout = "(batch, features, *spatial)" if self.channels_first else "(batch, ..., features)"
            raise ValueError(
                f"x: expected {layout} with batch = {len(condition)} and features = {self.features}, "
                f"given {tuple(x.shape)}"
            )
        checks.same_device("x", x, "condition", condition)
        gamma, beta = linear(condition, self.linear.weight, self.linear.bias).chunk(2, -1)
        return film(x, gamma, beta, channels_first=self.channels_first)

    def extra_repr(self) -> str:
        return f"features={self.features}, channels_first={self.channels_first}"
