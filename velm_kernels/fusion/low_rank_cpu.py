"""low_rank_fusion on the CPU: torch's products of matrices, and between them one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.fusion.reference import with_one

# Numbers of the products of one modality that exist at a time, unless one rank has more: a second-level cache or two.
WORKSPACE = 1 << 19
# Numbers of the gradient of x up to which those of all ranks are written apart and then added: fewer calls.
TOGETHER = 1 << 15

_PRODUCTS = "Tensor p0, Tensor p1, Tensor? p2, Tensor? p3, Tensor weight"
# p: (ranks, rows of m, out) fp32 contiguous, the products of a modality with some ranks of its factor. weight (ranks,)
# fp32, sums and grad (rows, out) fp32 contiguous.
cpu.declare(f"low_rank_sum({_PRODUCTS}, Tensor(a!) sums) -> ()")
# Writes the gradients of the products to d, which may be p, and returns the gradient of weight.
cpu.declare(
    f"low_rank_gradients(Tensor grad, {_PRODUCTS}, Tensor(a!) d0, Tensor(b!) d1, Tensor(c!)? d2, Tensor(d!)? d3) "
    "-> Tensor"
)


class _Modality:
    """``[1; x]`` and its factor, in float32 a few ranks at a time."""

    def __init__(self, x: Tensor, factor: Tensor, kept: Tensor | None, most_ranks: int) -> None:
        self.x = with_one(x.float())
        self.factor = factor
        rank, _, out = factor.shape
        self.kept = None if kept is None else kept.view(rank, x.shape[0], out)
        self.room = self.x.new_empty((min(most_ranks, rank), x.shape[0], out))

    def ranks(self, part: slice) -> Tensor:
        return self.factor[part].float()

    def products(self, part: slice) -> Tensor:
        """``(ranks, rows, out)``, in what is kept where there is such."""
        factor = self.ranks(part)
        rows = self.x.expand(factor.shape[0], *self.x.shape)
        return torch.bmm(rows, factor, out=self.room[: factor.shape[0]] if self.kept is None else self.kept[part])


def _modalities(
    xs: Sequence[Tensor | None], factors: Sequence[Tensor | None], kept: Tensor, step: int
) -> list[_Modality]:
    given = [(x, factor) for x, factor in zip(xs, factors, strict=True) if x is not None and factor is not None]
    if kept.numel() == 0:
        return [_Modality(x, factor, None, step) for x, factor in given]
    sizes = [x.shape[0] * factor.shape[0] * factor.shape[2] for x, factor in given]
    return [_Modality(*pair, part, step) for pair, part in zip(given, kept.split(sizes), strict=True)]


def _step(rows: int, out: int) -> int:
    """How many ranks at a time."""
    return max(1, WORKSPACE // max(1, rows * out))


def _parts(rank: int, step: int) -> Iterator[slice]:
    return (slice(r, min(r + step, rank)) for r in range(0, rank, step))


def _four(values: Sequence[Tensor]) -> list[Tensor | None]:
    return [*values, *[None] * (4 - len(values))]


def forward(
    x0: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    x3: Tensor | None,
    factor0: Tensor,
    factor1: Tensor,
    factor2: Tensor | None,
    factor3: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    kept: Tensor,
) -> Tensor:
    """``(rows, out)``; writes the products to ``kept`` unless it is empty."""
    rank, _, out = factor0.shape
    step = _step(rows, out)
    modalities = _modalities((x0, x1, x2, x3), (factor0, factor1, factor2, factor3), kept, step)
    scale = weight.float()
    sums = x0.new_zeros((rows, out), dtype=torch.float32)
    if bias is not None:
        sums += bias
    for part in _parts(rank, step):
        cpu.op("low_rank_sum")(*_four([m.products(part) for m in modalities]), scale[part], sums)
    return sums.to(x0.dtype)


def backward(
    grad: Tensor,
    x0: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    x3: Tensor | None,
    factor0: Tensor,
    factor1: Tensor,
    factor2: Tensor | None,
    factor3: Tensor | None,
    weight: Tensor,
    kept: Tensor,
    rows: int,
    grad_mask: int,
) -> tuple[Tensor, ...]:
    """The ten gradients, through those of the products of a few ranks at a time."""
    rank, _, out = factor0.shape
    step = _step(rows, out)
    modalities = _modalities((x0, x1, x2, x3), (factor0, factor1, factor2, factor3), kept, step)
    grads_x, grads_factor = ([grad.new_empty((0,)) for _ in range(4)] for _ in range(2))
    for m, modality in enumerate(modalities):
        if grad_mask >> m & 1:
            grads_x[m] = modality.x.new_zeros((modality.x.shape[0], modality.x.shape[1] - 1))
        if grad_mask >> (4 + m) & 1:
            grads_factor[m] = torch.empty_like(modality.factor)
    grad_weight = grad.new_empty((rank,), dtype=torch.float32)
    scale, wide_grad = weight.float(), grad.float()
    for part in _parts(rank, step) if grad_mask & 511 else ():
        products = [m.products(part) if m.kept is None else m.kept[part] for m in modalities]
        # What is kept may be asked for once more.
        gradients = [m.room[: p.shape[0]] for m, p in zip(modalities, products, strict=True)]
        grad_weight[part] = cpu.op("low_rank_gradients")(wide_grad, *_four(products), scale[part], *_four(gradients))
        for m, (modality, gradient) in enumerate(zip(modalities, gradients, strict=True)):
            if grad_mask >> m & 1:
                _add_gradient_of_x(grads_x[m], gradient, modality.ranks(part)[:, 1:])
            if grad_mask >> (4 + m) & 1:
                columns = modality.x.t().expand(gradient.shape[0], *modality.x.t().shape)
                if grad.dtype == torch.float32:
                    torch.bmm(columns, gradient, out=grads_factor[m][part])
                else:
                    grads_factor[m][part] = torch.bmm(columns, gradient)
    return (
        *(g.to(grad.dtype) for g in grads_x),
        *grads_factor,
        grad_weight.to(grad.dtype) if grad_mask & 256 else grad.new_empty((0,)),
        grad.sum(0, dtype=torch.float32).to(grad.dtype) if grad_mask & 512 else grad.new_empty((0,)),
    )


def _add_gradient_of_x(grad: Tensor, gradient: Tensor, factor: Tensor) -> None:
    if grad.numel() <= TOGETHER:
        grad += torch.bmm(gradient, factor.transpose(1, 2)).sum(0)
        return
    for of_rank, matrix in zip(gradient, factor, strict=True):
        grad.addmm_(of_rank, matrix.t())
