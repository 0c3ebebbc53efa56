"""``merge_tokens``: bipartite soft matching of tokens, and ``unmerge_tokens``, its way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import register_composed
from velm_kernels.layout import product
from velm_kernels.pooling.gather_rows import gather_rows
from velm_kernels.pooling.match_rows import match_rows


class MergedTokens(NamedTuple):
    """What :func:`merge_tokens` returns.

    Attributes:
        tokens: ``(..., tokens - r, dim)``, in the dtype of x: what was merged, and what was not.
        size: ``(..., tokens - r)``, float32 (float64 where x is): how many tokens each one stands for.
        indices: ``(..., tokens)`` int64, where each token of x went.
    """

    tokens: Tensor
    size: Tensor
    indices: Tensor


def merge_tokens(x: Tensor, metric: Tensor, r: int, size: Tensor | None = None, protected: int = 0) -> MergedTokens:
    """Makes ``r`` tokens fewer by merging similar ones: the bipartite soft matching of ToMe (Bolya et al., 2023,
    section 3).

    Tokens at even places (A) and at odd ones (B) are two sets. Each of A is matched with the one of B whose ``metric``
    has the largest cosine similarity with its own, the first of equal ones; the ``r`` of A that are the most similar to
    their match, the first of equal ones, are merged into it. What is merged is the mean of the tokens, weighted with
    their sizes, and its size is their sum. A metric of zeros has similarity 0 with everything; one that holds NaN is
    merged last.

    Args:
        x: ``(..., tokens, dim)``, floating point.
        metric: ``(..., tokens, metric_dim)``, floating point of any dtype: what similarity is measured by, in ToMe the
            keys averaged over the heads. Not differentiated.
        r: how many to merge, from 0 to half of the tokens that are not protected.
        size: ``(..., tokens)``, floating point, greater than 0: how many tokens each one stands for; 1 where not given.
        protected: number of leading tokens that are neither merged nor merged into: 1 for a class token.

    Returns:
        A named tuple of

        - ``tokens``: ``(..., tokens - r, dim)``, contiguous, in x's dtype: the protected ones, then what is left of A,
          then B, each in their order. That is the published order where tokens are protected; without, the published
          code sorts what is left of A by falling similarity.
        - ``size``: ``(..., tokens - r)``, float32 (float64 where ``x`` is).
        - ``indices``: int64 ``(..., tokens)``, where each token of ``x`` went: :func:`unmerge_tokens` takes it. Of two
          merges in a row it is ``second.indices.gather(-1, first.indices)``.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or a device is not as above, or ``r`` or ``protected`` is out of range.

    The matrix of similarities is never written. Each row of the result is summed in one order, without atomics. The
    gradient of ``x`` is one pass over that of the result; that of ``size``, which is rarely wanted, keeps ``x``.

    Example:
        >>> x = torch.randn(2, 50, 64)
        >>> merged = velm_kernels.merge_tokens(x, metric=x, r=8, protected=1)
        >>> merged.tokens.shape, merged.size.shape, merged.indices.shape
        (torch.Size([2, 42, 64]), torch.Size([2, 42]), torch.Size([2, 50]))
        >>> merged.size.sum(1)  # every token is in one of the result's
        tensor([50., 50.])
    """
    size, protected, r = _checked(x, metric, r, size, protected)
    leading, (count, dim) = tuple(x.shape[:-2]), x.shape[-2:]
    batch = product(leading)
    indices = _where_to(metric.detach().reshape(batch, count, metric.shape[-1]), r, protected)
    source, offsets = _transposed(indices, count - r)
    merged_size = size.new_zeros(batch, count - r).scatter_add(1, indices, size)
    weight = size / merged_size.gather(1, indices)
    rows = x.reshape(batch, count, dim)
    of_sources = weight.detach().gather(1, source)
    tokens = gather_rows(rows, source.int(), offsets, of_sources, indices.int(), None, weight)
    return MergedTokens(
        tokens.view(*leading, *tokens.shape[1:]),
        merged_size.view(*leading, merged_size.shape[1]),
        indices.view(*leading, indices.shape[1]),
    )


def unmerge_tokens(merged: Tensor, indices: Tensor) -> Tensor:
    """Gives every token back what it was merged into: ``merged.gather(-2, indices)`` for whole rows.

    Args:
        merged: ``(..., merged, dim)``, floating point.
        indices: int64 ``(..., tokens)``, from 0 to merged - 1: that of :func:`merge_tokens`, or several composed.

    Returns:
        ``(..., tokens, dim)``, contiguous. Its gradient is summed in one order, without atomics.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or a device is not as above. On the CPU, or with VELM_CHECK=1, also for
            indices out of range; unchecked they give zeros.

    This is the unmerging of Bolya and Hoffman (2023, "Token Merging for Fast Stable Diffusion", section 3).

    Example:
        >>> merged, indices = torch.tensor([[[10.0], [20.0]]]), torch.tensor([[0, 1, 1]])
        >>> velm_kernels.unmerge_tokens(merged, indices)
        tensor([[[10.],
                 [20.],
                 [20.]]])
    """
    _check_unmerge(merged, indices)
    batch, (rows, dim) = product(tuple(merged.shape[:-2])), merged.shape[-2:]
    index = indices.reshape(batch, indices.shape[-1])
    source, offsets = _transposed(index, rows)
    out = gather_rows(merged.reshape(batch, rows, dim), index.int(), None, None, source.int(), offsets, None)
    return out.view(*indices.shape, dim)


def _count(name: str, value: Any, high: int, described: str) -> int:
    return checks.integer(name, value, 0, high, described=f"0 to {high}, {described}")


def _checked(x: Tensor, metric: Tensor, r: int, size: Tensor | None, protected: int) -> tuple[Tensor, int, int]:
    """Checks the arguments of :func:`merge_tokens`; the sizes as ``(batch, tokens)``, and the two numbers."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
    leading, tokens = tuple(x.shape[:-2]), x.shape[-2]
    batch = product(leading)
    checks.dtype_in("metric", checks.tensor("metric", metric), checks.FLOAT_DTYPES)
    if metric.dim() != x.dim() or metric.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"metric: expected {(*leading, tokens)} and its features, given {tuple(metric.shape)}")
    checks.same_device("metric", metric, "x", x)
    protected = _count("protected", protected, tokens, "the tokens of x")
    r = _count("r", r, (tokens - protected) // 2, f"half of the {tokens - protected} tokens that are not protected")
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if size is None:
        return torch.ones(batch, tokens, dtype=compute_dtype, device=x.device), protected, r
    checks.dtype_in("size", checks.tensor("size", size), checks.FLOAT_DTYPES)
    checks.shape("size", size, "(..., tokens)", (*leading, tokens))
    checks.same_device("size", size, "x", x)
    return size.reshape(batch, tokens).to(compute_dtype), protected, r


def _where_to(metric: Tensor, r: int, protected: int) -> Tensor:
    """int64 ``(batch, tokens)``: the row of the result that each token goes to."""
    batch = metric.shape[0]
    # The first of A and of B that are not protected.
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    a, b = metric[:, first_a::2], metric[:, first_b::2]
    similarity, best = match_rows(a, b)
    # For each of A its place when they are sorted by falling similarity.
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    is_merged = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :r], True)
    left_before = (~is_merged).long().cumsum(1) - 1
    begin_b = protected + a.shape[1] - r
    of_a = torch.where(is_merged, begin_b + best.long(), protected + left_before)
    of_b = (begin_b + torch.arange(b.shape[1], device=metric.device)).expand(batch, b.shape[1])
    # By turns, the one at an even place first; one of them may have one more.
    first, second = (of_a, of_b) if first_a < first_b else (of_b, of_a)
    pairs = torch.stack([first[:, : second.shape[1]], second], 2).flatten(1)
    before = torch.arange(protected, device=metric.device).expand(batch, protected)
    return torch.cat([before, pairs, first[:, second.shape[1] :]], 1)


def _transposed(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which tokens go to each of the rows, rising: int64 ``(batch, tokens)``, and int32 ``(batch, rows + 1)`` where
    those of each row begin."""
    ordered, source = index.contiguous().sort(dim=1, stable=True)
    bounds = torch.arange(rows + 1, device=index.device).expand(index.shape[0], rows + 1).contiguous()
    return source, torch.searchsorted(ordered, bounds).int()


def _check_unmerge(merged: Tensor, indices: Tensor) -> None:
    checks.dtype_in("merged", checks.tensor("merged", merged), checks.FLOAT_DTYPES)
    if merged.dim() < 2:
        raise ValueError(f"merged: expected (..., merged, dim), given {tuple(merged.shape)}")
    checks.dtype_in("indices", checks.tensor("indices", indices), (torch.int64,))
    if indices.dim() == 0 or indices.shape[:-1] != merged.shape[:-2]:
        raise ValueError(
            f"indices: expected (..., tokens) with the leading dimensions of merged {tuple(merged.shape)}, "
            f"given {tuple(indices.shape)}"
        )
    checks.same_device("indices", indices, "merged", merged)
    checks.values_between("indices", indices, 0, merged.shape[-2] - 1)


register_composed(merge_tokens)
register_composed(unmerge_tokens)
