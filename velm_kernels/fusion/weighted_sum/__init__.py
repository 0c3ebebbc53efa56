"""The weighted sum of several tensors: gated fusion of modalities, mixes of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.fusion.weighted_sum.op import OPERATOR
from velm_kernels.layout import as_regions, with_regions

# Elements of a feature up to which torch's form is the faster one, without a gradient and with one, see
# velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 1 << 18, 3 << 16
MOST_FEATURES, FEW_FEATURES = 60, 4


def weighted_sum(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_i weights[..., i] * features[i]``, one pass forward and one backward, that of the weights included.

    The end of a gated or attentive fusion of modalities (Arevalo et al., 2017), and of a mix of layers as in ELMo
    (Peters et al., 2018, eq. 1).

    Args:
        features: 1 to 60 tensors ``(batch, ..., dim)``, float32, bfloat16, float16, or float64 (computed by the
            reference backend). What is between batch and dim broadcasts, and ``(batch, dim)`` goes with all: it is the
            same for every region, and not repeated.
        weights: ``(n,)`` or ``(batch, n)`` for n features, in their dtype or float32.

    Under autocast the features are cast to its dtype.

    Returns:
        ``(batch, ..., dim)``, contiguous, in the dtype of the features; summed in float32, except that small calls on
        the CPU round after each of torch's operators.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are no features or too many.

    Backward keeps the features only where the gradient of the weights is wanted.

    Example:
        >>> tensors, weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])], torch.tensor([[1.0, 0.5]])
        >>> velm_kernels.weighted_sum(tensors, weights)
        tensor([[ 6., 12.]])
    """
    small = plain(features, weights)
    if small is not None:
        return small
    features = checks.autocast(*checks.tensors("features", features, 1, MOST_FEATURES))
    arguments = canonical(features, weights)
    out: Tensor = OPERATOR(arguments)
    return out.view(checks.broadcast_shapes(*(value.shape for value in with_regions(features))))


def plain(features: Sequence[Tensor], weights: Tensor) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if features.__class__ not in (list, tuple) or not 1 <= len(features) <= FEW_FEATURES:
        return None
    if not takes_torch(SMALL, *features, weights, dtype=ANY, recorded=SMALL_RECORDED):
        return None
    # The largest comes first: that is the result's size and order in memory.
    order = sorted(range(len(features)), key=lambda i: -features[i].dim())
    shape = features[order[0]].shape
    dims = len(shape)
    if dims < 2 or not features[order[0]].is_contiguous():
        return None
    if weights.shape == (len(features),):
        each = weights.unbind()
    elif weights.shape == (shape[0], len(features)):
        each = weights.unbind(1)
        for _ in range(dims - 1):
            each = tuple(weight.unsqueeze(-1) for weight in each)
    else:
        return None
    out, records = None, torch.is_grad_enabled()
    for i in order:
        value, weight = features[i], each[i]
        if value.shape != shape:
            if value.shape != (shape[0], shape[-1]):
                return None
            for _ in range(dims - 2):
                value = value.unsqueeze(1)
        if out is None:
            out = value * weight
        else:
            # One operator rounds once, but its gradient is slower.
            out = out + value * weight if records else torch.addcmul(out, value, weight)
    return out


def canonical(features: Sequence[Tensor], weights: Tensor) -> Arguments:
    """Checks the arguments of :func:`weighted_sum` and returns those of the operator."""
    features = checks.tensors("features", features, 1, MOST_FEATURES)
    first = features[0]
    for i, value in enumerate(features):
        checks.dtype_in(f"features[{i}]", value, (first.dtype,) if i else checks.FLOAT_DTYPES)
        checks.same_device(f"features[{i}]", value, "features[0]", first)
    given = features
    dims = max(value.dim() for value in features)
    try:
        if any(value.dim() not in (2, dims) for value in features):
            raise RuntimeError
        features = with_regions(features)
        shape = checks.broadcast_shapes(*(value.shape for value in features))
        if any(value.shape[-1] != shape[-1] for value in features):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(
            "features: expected (batch, ..., dim) of one batch and dim, with what is in between to broadcast, or "
            f"(batch, dim), given {checks.shapes(given)}"
        ) from None
    batch, count = shape[0], len(features)
    compute_dtype = torch.promote_types(first.dtype, torch.float32)
    checks.dtype_in("weights", checks.tensor("weights", weights), tuple({first.dtype, compute_dtype}))
    checks.same_device("weights", weights, "features", first)
    if tuple(weights.shape) not in ((count,), (batch, count)):
        raise ValueError(
            f"weights: expected (n,) = {(count,)} or (batch, n) = {(batch, count)}, given {tuple(weights.shape)}"
        )
    return {
        "features": [as_regions(value, shape[:1], shape[1:-1]) for value in features],
        "weights": weights.to(compute_dtype).expand(batch, count).contiguous(),
    }


OPERATOR.serves("weighted_sum", canonical, plain)
