"""Rows of the result as weighted sums of rows of the input, by index: what selects, merges and un-merges tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments, cpu, cuda, register, triton
from velm_kernels.backends.direct import call
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.layout import unit_last_stride


def gather_rows(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
) -> Tensor:
    """Row m of the result is the sum of ``weight[e] * x[index[e]]`` over ``offsets[m] <= e < offsets[m + 1]``, or of
    entry m alone without offsets; each for itself in a batch. The ``back_`` arguments describe the transposed sum,
    which is the gradient for x. See the comment at the operator."""
    arguments = canonical(x, index, offsets, weight, back_index, back_offsets, back_weight)
    out: Tensor = call("gather_rows", arguments)
    return out


def canonical(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
) -> Arguments:
    """The arguments of the operator, from those of :func:`gather_rows`, whose callers have checked them."""
    return {
        "x": unit_last_stride(x),
        **{
            name: None if value is None else value.contiguous()
            for name, value in (
                ("index", index),
                ("offsets", offsets),
                ("weight", weight),
                ("back_index", back_index),
                ("back_offsets", back_offsets),
                ("back_weight", back_weight),
            )
        },
    }


def _result(x: Tensor, index: Tensor, offsets: Tensor | None) -> Tensor:
    """Uninitialised."""
    return x.new_empty((x.shape[0], index.shape[1] if offsets is None else offsets.shape[1] - 1, x.shape[2]))


def _fake(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
    backend: str,
) -> Tensor:
    return _result(x, index, offsets)


# x: (batch, rows, dim), last stride 1, other strides arbitrary. index: (batch, entries) int32, rows of x, or -1 for
# nothing; offsets: (batch, rows of the result + 1) int32 rising from 0 to entries, or None for one entry each; weight:
# (batch, entries) float32 (float64 with x in float64), or None for 1; all contiguous. The result is contiguous, sums
# are float32. What back_index, back_offsets and back_weight say is the same with x and the result exchanged: forward
# does not look at them, and backward is this operator with the two exchanged. The gradient of the weights goes to
# back_weight, and is there only for back_offsets None, where it has one element for each row of x.
declare(
    "gather_rows",
    "Tensor x, Tensor index, Tensor? offsets, Tensor? weight, Tensor back_index, Tensor? back_offsets, "
    "Tensor? back_weight",
    "Tensor",
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *description, ctx.backend = inputs
    back_weight = description[-1]
    needs_x = back_weight is not None and back_weight.requires_grad
    ctx.save_for_backward(x if needs_x else None, *description)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, offsets, weight, back_index, back_offsets, back_weight = ctx.saved_tensors
    grad = unit_last_stride(grad)
    grad_x = grad_weight = None
    operator = torch.ops.velm.gather_rows
    if ctx.needs_input_grad[0]:
        grad_x = operator(grad, back_index, back_offsets, back_weight, index, offsets, weight, ctx.backend)
    if ctx.needs_input_grad[6]:
        spread = operator(grad, back_index, back_offsets, None, index, offsets, None, ctx.backend)
        grad_weight = (spread.to(back_weight.dtype) * x.to(back_weight.dtype)).sum(2)
    return grad_x, None, None, None, None, None, grad_weight, None


def _meaning(
    x: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    back_index: Tensor,
    back_offsets: Tensor | None,
    back_weight: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = index.shape[1] if offsets is None else offsets.shape[1] - 1
    if back_offsets is None:
        # Each row of x goes to one of the result, or behind the last one. The weights that have a gradient are these.
        taken = x.to(wide) if back_weight is None else x.to(wide) * back_weight[..., None]
        row = torch.where(back_index >= 0, back_index, rows).long()
    else:
        # One row more, for what is nothing.
        taken = torch.cat([x.to(wide), x.new_zeros(x.shape[0], 1, x.shape[2], dtype=wide)], 1)
        taken = taken.gather(1, _along(torch.where(index >= 0, index, x.shape[1]).long(), x))
        if weight is not None:
            taken = taken * weight[..., None]
        if offsets is None:
            return taken.to(x.dtype)
        entries = torch.arange(index.shape[1], device=x.device).expand(index.shape).contiguous()
        row = torch.searchsorted(offsets.long(), entries, right=True) - 1
    sums = taken.new_zeros(x.shape[0], rows + 1, x.shape[2]).scatter_add(1, _along(row, x), taken)
    return sums[:, :rows].to(x.dtype).contiguous()


def _along(index: Tensor, x: Tensor) -> Tensor:
    """``(batch, entries)`` for all columns of x."""
    return index[..., None].expand(*index.shape, x.shape[2])


def _too_many(arguments: Arguments) -> list[str]:
    rows = max(arguments["x"].shape[1], arguments["index"].shape[1])
    return [] if rows < 2**31 else [f"there are {rows} rows, and kernels count them in 32 bits"]


register_autograd("gather_rows", _backward, setup_context=_setup_context, meaning=_meaning)
register("gather_rows", "reference", _meaning)
cpu.register_cpu("gather_rows", more_reasons=_too_many)
cuda.register_cuda("gather_rows", _too_many)
triton.register_triton("gather_rows", "pooling.triton_rows", _too_many)
