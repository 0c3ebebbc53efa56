"""The fusion of several modalities through a sum of products of projections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks, processors
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import takes_torch
from velm_kernels.fusion.inputs import MOST_INPUTS, checked_inputs
from velm_kernels.fusion.low_rank_fusion import op
from velm_kernels.fusion.low_rank_fusion.op import OPERATOR
from velm_kernels.layout import as_matrix, as_regions, leading_dims
from velm_kernels.processors import NEVER

# Elements of each input and factor, and of a projection, up to which torch's form is the faster one in float32, without
# a gradient and with one, see velm_kernels.backends.small.
SMALL, SMALL_RECORDED = (1 << 19, 1 << 16), (1 << 15, 1 << 13)
# Elements of a factor from which on it is in bfloat16, where torch's product is the faster one.
LARGE, LARGE_RECORDED = 1 << 18, 1 << 21
PLAIN_DTYPES = frozenset((torch.float32, torch.bfloat16))


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

    Example:
        >>> inputs = [torch.randn(4, 8), torch.randn(4, 16)]
        >>> factors = [torch.randn(3, 1 + 8, 32), torch.randn(3, 1 + 16, 32)]  # rank 3
        >>> velm_kernels.low_rank_fusion(inputs, factors, torch.ones(3)).shape
        torch.Size([4, 32])
    """
    small = plain(inputs, factors, weight, bias)
    if small is not None:
        return small
    arguments, leading = _prepared(inputs, factors, weight, bias)
    out, _ = OPERATOR(arguments)
    return out if len(leading) == 1 else out.view(*leading, out.shape[1])


def plain(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """The result by torch's own operators where those are faster, or None."""
    if inputs.__class__ not in (list, tuple) or factors.__class__ not in (list, tuple):
        return None
    if not (2 <= len(inputs) <= MOST_INPUTS and len(factors) == len(inputs)):
        return None
    if not takes_torch(NEVER, *inputs, *factors, weight, dtype=PLAIN_DTYPES) or weight.dim() != 1:
        return None
    if factors[0].dim() != 3:
        return None
    rank, rows, out_features = len(weight), inputs[0].shape[:-1], factors[0].shape[2]
    if 0 in (rank, out_features) or len(rows) != 1 or rows[0] == 0:
        return None
    given = (*inputs, *factors, weight) if bias is None else (*inputs, *factors, weight, bias)
    if not takes_torch(NEVER, *given, dtype=weight.dtype) or (bias is not None and bias.shape != (out_features,)):
        return None
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if weight.dtype is torch.bfloat16:
        least = LARGE_RECORDED if records else LARGE
        if processors.rules().bfloat16_products or factors[0].numel() < least:
            return None
    else:
        most, most_projected = SMALL_RECORDED if records else SMALL
        if max(tensor.numel() for tensor in given) > most or rows[0] * rank * out_features > most_projected:
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


def canonical(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Arguments:
    """Checks the arguments of :func:`low_rank_fusion` and returns those of the operator."""
    return _prepared(inputs, factors, weight, bias)[0]


def _prepared(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Arguments, tuple[int, ...]]:
    """The arguments of the operator, and the leading dimensions of the result."""
    inputs, weight, bias, leading = checked_inputs(inputs, weight, bias)
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
    # A row for each of the result, or one for all regions.
    rows = [
        as_matrix(as_regions(x, leading[:-1], leading[-1:], own))
        for x, own in zip(inputs, leading_dims(inputs), strict=True)
    ]
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
        "save": needs_grad and op.numbers(rows, cast[0]) <= op.MOST_KEPT,
    }
    return arguments, leading


OPERATOR.serves("low_rank_fusion", canonical, plain)
