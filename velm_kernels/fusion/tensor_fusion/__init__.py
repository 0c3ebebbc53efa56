"""The fusion of several modalities through their outer product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks, products
from velm_kernels.backends import register_composed
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.fusion.bilinear import by_operator
from velm_kernels.fusion.bilinear.rule import most_of_outer
from velm_kernels.fusion.inputs import MOST_INPUTS, checked_inputs
from velm_kernels.layout import leading_dims
from velm_kernels.processors import NEVER


def tensor_fusion(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight ([1; x_1] (x) [1; x_2] (x) ...) + bias``: the Tensor Fusion Network of Zadeh et al., 2017.

    Args:
        inputs: 2 to 4 tensors ``(..., d_m)``, float32, bfloat16, float16, or float64 (computed by the reference
            backend); their leading dimensions broadcast, and ``(batch, d)`` also goes with ``(batch, regions, d)``.
        weight: ``(out, (1 + d_1) * (1 + d_2) * ...)``, dtype of the inputs; the first modality varies slowest.
        bias: ``(out,)``, dtype of the inputs.

    Under autocast all are cast to its dtype.

    Returns:
        ``(..., out)`` over the broadcast leading dimensions, contiguous, in the dtype of the inputs. Small calls on
        the CPU form the outer product, in that dtype.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    The outer product is cut in two, after the modality that makes the two sides smallest together, and the product of
    the sides is left to :func:`velm_kernels.bilinear`, which does not form it. Of two modalities nothing else is there
    to be formed; of three, with 32, 32 and 128 features, the 33 x 33 products of the first two, one in 129 of all.

    Example:
        >>> inputs, weight = [torch.randn(4, 8), torch.randn(4, 16)], torch.randn(32, 9 * 17)
        >>> velm_kernels.tensor_fusion(inputs, weight).shape
        torch.Size([4, 32])
    """
    small = plain(inputs, weight, bias)
    return by_operator(*_sides(inputs, weight, bias)) if small is None else small


def plain(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The fusion by way of the outer product, where that is small; else None."""
    if inputs.__class__ not in (list, tuple) or not 2 <= len(inputs) <= MOST_INPUTS:
        return None
    if not takes_torch(NEVER, weight, *inputs, dtype=ANY) or weight.dim() != 2:
        return None
    leading = max(inputs, key=Tensor.dim).shape[:-1]
    if any(x.dim() == 0 or x.shape[:-1] != leading for x in inputs):
        # One row for all regions.
        if len(leading) != 2 or any(x.shape[:-1] not in (leading, leading[:1]) for x in inputs):
            return None
        inputs = [x.unsqueeze(1) if x.dim() == 2 else x for x in inputs]
    features = math.prod(1 + x.shape[-1] for x in inputs)
    most = most_of_outer(weight.shape[0], weight, *inputs)
    if (
        weight.shape[1] != features
        or not 0 < math.prod(leading) * features <= most
        or products.forced_product() is not None
    ):
        return None
    if bias is not None and not (takes_torch(NEVER, bias, dtype=weight.dtype) and bias.shape == weight.shape[:1]):
        return None
    return torch.nn.functional.linear(_outer(inputs), weight, bias)


def _sides(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments of the bilinear form that the fusion is."""
    inputs, weight, bias, _ = checked_inputs(inputs, weight, bias)
    # What is one row for all regions gets a dimension for them.
    inputs = [x[:, None] if len(own) == x.dim() else x for x, own in zip(inputs, leading_dims(inputs), strict=True)]
    sizes = [1 + x.shape[-1] for x in inputs]
    if weight.dim() != 2 or weight.shape[1] != math.prod(sizes):
        raise ValueError(
            f"weight: expected (out, {' * '.join(map(str, sizes))}) = (out, {math.prod(sizes)}), "
            f"given {tuple(weight.shape)}"
        )
    cut, least = 1, math.prod(sizes)
    for m in range(1, len(sizes)):
        both = math.prod(sizes[:m]) + math.prod(sizes[m:])
        if m == 1 or both < least:
            cut, least = m, both
    left, right = _outer(inputs[:cut]), _outer(inputs[cut:])
    leading = checks.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    # As many dimensions on both sides: a matrix beside three dimensions would be one row for several regions.
    left, right = (side.reshape(*[1] * (1 + len(leading) - side.dim()), *side.shape) for side in (left, right))
    return left, right, weight.view(weight.shape[0], left.shape[-1], right.shape[-1]), bias


def _outer(inputs: Sequence[Tensor]) -> Tensor:
    """The outer product of ``[1; x]`` over a few modalities, ``(..., product of 1 + d)``."""
    result: Tensor | None = None
    for x in inputs:
        with_one = torch.cat([x.new_ones((*x.shape[:-1], 1)), x], -1)
        result = with_one if result is None else (result[..., :, None] * with_one[..., None, :]).flatten(-2)
    assert result is not None
    return result


register_composed(tensor_fusion, plain)
