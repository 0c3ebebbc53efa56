"""``select_tokens``: pruning by score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import register_composed
from velm_kernels.backends.small import ANY, in_float32, takes_torch
from velm_kernels.layout import product
from velm_kernels.pooling.gather_rows import gather_rows
from velm_kernels.pooling.select_tokens.op import select_rows
from velm_kernels.pooling.tokens import checked_integers, checked_mask

# Elements of x up to which torch's steps are the faster ones, without a gradient and with one, see
# velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 1 << 23, 1 << 20
# Scores from which on sorting all of them in a stable way is not the fastest way to the highest.
MANY_SCORES = 1 << 12


class SelectedTokens(NamedTuple):
    """What :func:`select_tokens` returns.

    Attributes:
        tokens: ``(..., kept, dim)``, in the dtype of x: the tokens kept, in their order, then zeros.
        indices: ``(..., kept)`` int64, where in x each one comes from, rising; -1 behind the last.
        lengths: ``(...)`` int32, how many tokens each row has.
    """

    tokens: Tensor
    indices: Tensor
    lengths: Tensor


def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    max_k: int | None = None,
) -> SelectedTokens:
    """Keeps the ``k`` tokens of highest score of each row, in the order they have: pruning as in FastV (Chen et al.,
    2024, section 4), by whatever scores there are, such as the ``return_key_mass`` of
    :func:`velm_kernels.cross_attention` summed over its heads.

    Of equal scores the first is taken, on every device. A score of NaN counts as -inf.

    Args:
        x: ``(..., tokens, dim)``, floating point.
        scores: ``(..., tokens)``, floating point of any dtype. Not differentiated.
        k: how many to keep, from 0 to tokens; or integers ``(...)``, for each row its own number.
        lengths: ``(...)``, integers from 0 to tokens: the number of leading tokens that may be taken.
        mask: bool, broadcastable to ``(..., tokens)``; tokens where it is False are not taken, whatever their score.
        max_k: the number of tokens of the result where ``k`` is a tensor, by default that of ``x``: a size cannot be
            read from a tensor without waiting for it.

    Returns:
        A named tuple of

        - ``tokens``: ``(..., kept, dim)``, contiguous, in x's dtype; kept is ``k``, or ``max_k``. A row that has fewer
          ends in zeros, as every operator here takes it with its lengths.
        - ``indices``: int64 ``(..., kept)``, where in ``x`` they come from, rising; -1 behind the last.
        - ``lengths``: int32 ``(...)``, how many of them each row has: ``k``, or as many as may be taken.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or a device is not as above, ``k`` or ``max_k`` is out of range, or (on the CPU, or with
            VELM_CHECK=1) one of the lengths or of the ``k`` of the rows.

    The gradient of ``x`` is that of the result where a token was taken and 0 elsewhere, written in one pass. Tokens
    that are not taken are not read.

    Example:
        >>> x, scores = torch.tensor([[[10.0], [20.0], [30.0]]]), torch.tensor([[0.3, 0.1, 0.2]])
        >>> kept = velm_kernels.select_tokens(x, scores, 2)
        >>> kept.tokens, kept.indices
        (tensor([[[10.],
                 [30.]]]), tensor([[0, 2]]))
    """
    small = plain(x, scores, k, lengths=lengths, mask=mask, max_k=max_k)
    if small is not None:
        return small
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
    leading, (tokens, dim) = tuple(x.shape[:-2]), x.shape[-2:]
    rows = product(leading)
    checks.dtype_in("scores", checks.tensor("scores", scores), checks.FLOAT_DTYPES)
    checks.shape("scores", scores, "(..., tokens)", (*leading, tokens))
    checks.same_device("scores", scores, "x", x)
    if lengths is not None:
        lengths = checked_integers("lengths", lengths, x, "the leading dimensions of x", leading)
    if mask is not None:
        mask = checked_mask(mask, x, "(..., tokens)", (*leading, tokens), rows, tokens)
    wanted = None
    if isinstance(k, Tensor):
        wanted = checked_integers("k", k, x, "the leading dimensions of x", leading)
        kept = tokens if max_k is None else _size("max_k", max_k, tokens, "tokens")
    else:
        kept = _size("k", k, tokens, "tokens")
        if max_k is not None:
            raise ValueError(f"max_k: expected None where k is no tensor, given {checks.describe(max_k)}")
    index, inverse, indices, taken = select_rows(scores.detach().reshape(rows, tokens), lengths, mask, wanted, kept)
    selected = gather_rows(x.reshape(rows, tokens, dim), index, None, None, inverse, None, None)
    return SelectedTokens(
        selected.view(*leading, *selected.shape[1:]), indices.view(*leading, indices.shape[1]), taken.view(leading)
    )


def plain(
    x: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    max_k: int | None = None,
) -> SelectedTokens | None:
    if (
        not lengths is mask is max_k is None
        or k.__class__ is not int
        or not takes_torch(SMALL, x, dtype=ANY, recorded=SMALL_RECORDED)
    ):
        return None
    shape = x.shape
    if len(shape) < 2 or not takes_torch(SMALL, scores, dtype=ANY) or scores.shape != shape[:-1]:
        return None
    if 0 in shape or not 0 < k <= shape[-2] or not x.is_contiguous():
        return None
    indices = _highest(scores.detach(), k)
    rows = x.numel() // (shape[-2] * shape[-1])
    if rows == 1:
        tokens = x.index_select(-2, indices.view(-1)) if len(shape) < 4 else x.view(*shape[-2:])[indices.view(-1)]
    else:
        taken = indices.view(rows, k) + torch.arange(0, rows * shape[-2], shape[-2]).unsqueeze(-1)
        tokens = x.view(-1, shape[-1]).index_select(0, taken.view(-1))
    lengths = torch.full(shape[:-2], k, dtype=torch.int32)
    return SelectedTokens(tokens.view(*shape[:-2], k, shape[-1]), indices, lengths)


def _highest(scores: Tensor, k: int) -> Tensor:
    """Where the ``k`` highest of each row are, rising; of equal ones the first, NaN as -inf."""
    ranks = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if scores.numel() < MANY_SCORES:
        return ranks.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort().values
    # Integers in the order of the scores: no two are equal, and the first of equal scores has the greatest.
    bits = (in_float32(ranks) + 0.0).view(torch.int32)
    last = scores.shape[-1] - 1
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(1 << 32).add_(torch.arange(last, -1, -1))
    return (last - (keys.topk(k, sorted=False).values & 0xFFFFFFFF)).sort().values


def _size(name: str, value: Any, high: int, described: str) -> int:
    return checks.integer(name, value, 0, high, described=f"0 to {described} = {high}")


register_composed(select_tokens, plain)
