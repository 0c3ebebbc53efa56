"""``select_tokens``: pruning by score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, derivatives, register_public
from velm_kernels.backends.direct import call
from velm_kernels.backends.library import LIBRARY
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.pooling.pool import checked_integers, checked_mask
from velm_kernels.pooling.rows import canonical as canonical_rows

# Elements of x up to which torch's steps are the faster ones, without a gradient and with one, see
# velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 1 << 23, 1 << 20


class SelectedTokens(NamedTuple):
    """What :func:`select_tokens` returns."""

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
        lengths: ``(...)``, integers from 0 to tokens: only the first so many tokens may be taken.
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
    """
    small = _small(x, scores, k, lengths=lengths, mask=mask, max_k=max_k)
    if small is not None:
        return small
    arguments, indices, kept = _canonical(x, scores, k, lengths=lengths, mask=mask, max_k=max_k)
    tokens: Tensor = call("gather_rows", arguments)
    leading = x.shape[:-2]
    return SelectedTokens(
        tokens.view(*leading, *tokens.shape[1:]), indices.view(*leading, indices.shape[1]), kept.view(leading)
    )


def _small(
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
    # Sorting says so of NaN, and of equal ones the first comes first.
    ranks = scores.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    indices = ranks.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort().values
    rows = x.numel() // (shape[-2] * shape[-1])
    if rows == 1:
        tokens = x.index_select(-2, indices.view(-1)) if len(shape) < 4 else x.view(*shape[-2:])[indices.view(-1)]
    else:
        taken = indices.view(rows, k) + torch.arange(0, rows * shape[-2], shape[-2]).unsqueeze(-1)
        tokens = x.view(-1, shape[-1]).index_select(0, taken.view(-1))
    lengths = torch.full(shape[:-2], k, dtype=torch.int32)
    return SelectedTokens(tokens.view(*shape[:-2], k, shape[-1]), indices, lengths)


def _size(name: str, value: Any, high: int, described: str) -> int:
    return checks.integer(name, value, 0, high, described=f"0 to {described} = {high}")


def _canonical(
    x: Tensor,
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    max_k: int | None = None,
) -> tuple[Arguments, Tensor, Tensor]:
    """The arguments of ``velm::gather_rows``, the indices and the lengths."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
    leading, (tokens, dim) = tuple(x.shape[:-2]), x.shape[-2:]
    rows = 1
    for size in leading:
        rows = rows * size
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
    index, inverse, indices, taken = torch.ops.velm.select_rows(
        scores.detach().reshape(rows, tokens), lengths, mask, wanted, kept
    )
    arguments = canonical_rows(x.reshape(rows, tokens, dim), index, None, None, inverse, None, None)
    return arguments, indices, taken


def canonical(*args: Any, **kwargs: Any) -> Arguments:
    """Checks the arguments of :func:`select_tokens` and returns those of the operator that moves the tokens."""
    return _canonical(*args, **kwargs)[0]


# scores: (rows, tokens); lengths, k: (rows,) int32; mask: (rows, tokens) bool. Which tokens of each row are taken, at
# most `kept`: (rows, kept) rising and then -1, as int32 and as int64, with its inverse (rows, tokens) int32, -1 for
# those not taken, between them, and how many, (rows,) int32. By torch's sort on every device: it is nothing beside
# moving the tokens.
SCHEMA = (
    "select_rows(Tensor scores, Tensor? lengths, Tensor? mask, Tensor? k, SymInt kept) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _select_rows(
    scores: Tensor, lengths: Tensor | None, mask: Tensor | None, k: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape
    if lengths is not None:
        checks.values_between("lengths", lengths, 0, tokens)
    if k is not None:
        checks.values_between("k", k, 0, kept)
    # Rising, so that the first of equal ones comes first; 0 - 0 and 0 - (-0) are the same. What may not be taken is
    # NaN, behind everything.
    key = torch.where(scores.isnan(), torch.inf, 0.0 - scores)
    live = _live(rows, tokens, lengths, mask, scores.device)
    taken = torch.full((rows,), kept, dtype=torch.int32, device=scores.device) if k is None else k.clamp(0, kept)
    if live is not None:
        key = torch.where(live, key, torch.nan)
        taken = torch.minimum(taken, live.sum(1, dtype=torch.int32))
    best = key.sort(stable=True, dim=1).indices[:, :kept]
    place = torch.arange(kept, device=scores.device)
    best = torch.where(place < taken[:, None], best, tokens).sort(1).values
    # One column more, for what is written nowhere.
    inverse = torch.full((rows, tokens + 1), -1, dtype=torch.int32, device=scores.device)
    inverse.scatter_(1, best, place.int().expand(rows, kept))
    indices = torch.where(best < tokens, best, -1)
    return indices.int(), inverse[:, :tokens].contiguous(), indices, taken if k is None else taken.clone()


def _live(rows: int, tokens: int, lengths: Tensor | None, mask: Tensor | None, device: torch.device) -> Tensor | None:
    if lengths is None:
        return mask
    live = torch.arange(tokens, device=device) < lengths[:, None]
    return live if mask is None else live & mask


def _fake_select_rows(
    scores: Tensor, lengths: Tensor | None, mask: Tensor | None, k: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape
    index = scores.new_empty((rows, kept), dtype=torch.int32)
    inverse = scores.new_empty((rows, tokens), dtype=torch.int32)
    indices = scores.new_empty((rows, kept), dtype=torch.int64)
    return index, inverse, indices, scores.new_empty((rows,), dtype=torch.int32)


LIBRARY.impl("select_rows", _select_rows, "CompositeExplicitAutograd")
torch.library.register_fake("velm::select_rows", _fake_select_rows, lib=LIBRARY)
derivatives.register_vmap(LIBRARY, "select_rows")
register_public("select_tokens", "gather_rows", canonical, _small)
