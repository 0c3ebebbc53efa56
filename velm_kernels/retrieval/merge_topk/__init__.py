"""The best of what was found in parts of a database."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import register_composed
from velm_kernels.retrieval.merge_topk.reference import merge_topk as merged


def merge_topk(
    values: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], k: int, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of what :func:`velm_kernels.topk_similarity` has found in each part of a database.

    Args:
        values: ``(parts, queries, k of a part)``, or a sequence of ``(queries, k of this part)``, floating point.
        indices: int64, in the same shapes: what the values are those of, unique in the whole database. -1 counts as
            nothing, whatever its value.
        k: how many, from 0 on.
        largest: whether the greatest values come first, or, as of ``metric="l2"``, the least.

    Returns:
        ``(values, indices)``, both ``(queries, k)``, as :func:`velm_kernels.topk_similarity` would have found them in
        all parts together: of equal values the lower index first, NaN as the greatest, then -inf (or inf) and -1.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or k is negative.

    The gradient of values goes to those that were taken. By torch's own operators on every device: there are few
    numbers to sort.

    Example:
        >>> values = [torch.tensor([[9.0, 4.0]]), torch.tensor([[5.0, 4.0]])]
        >>> indices = [torch.tensor([[0, 2]]), torch.tensor([[4, 1]])]
        >>> velm_kernels.merge_topk(values, indices, k=3)
        (tensor([[9., 5., 4.]]), tensor([[0, 4, 1]]))
    """
    value_parts, index_parts = _parts("values", values), _parts("indices", indices)
    if len(index_parts) != len(value_parts):
        raise ValueError(f"indices: expected {len(value_parts)} parts as in values, given {len(index_parts)}")
    first = value_parts[0]
    for i, (value, index) in enumerate(zip(value_parts, index_parts, strict=True)):
        checks.dtype_in(f"values[{i}]", value, checks.FLOAT_DTYPES if i == 0 else (first.dtype,))
        checks.dtype_in(f"indices[{i}]", index, (torch.int64,))
        for name, part in ((f"values[{i}]", value), (f"indices[{i}]", index)):
            checks.same_device(name, part, "values[0]", first)
        if value.dim() != 2 or value.shape[0] != first.shape[0]:
            raise ValueError(
                f"values[{i}]: expected (queries, k) with the queries of values[0] {tuple(first.shape)}, "
                f"given {tuple(value.shape)}"
            )
        checks.shape(f"indices[{i}]", index, f"the shape of values[{i}]", value.shape)
    k = checks.integer("k", k, 0, 2**31 - 1)
    checks.flag("largest", largest)
    return merged(value_parts, index_parts, k, largest)


def _parts(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(value, Tensor):
        return checks.tensors(name, value, 1)
    checks.tensor(name, value, dims=3, layout="(parts, queries, k)")
    if value.shape[0] == 0:
        raise ValueError(f"{name}: expected one part or more, given {tuple(value.shape)}")
    return list(value.unbind())


register_composed(merge_topk)
