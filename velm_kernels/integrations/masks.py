"""Masks of models, dense and mostly regular, as the cheap arguments of `cross_attention`.

Models hand their layers a dense mask of (batch, 1, queries, keys), additive or boolean, whatever its structure is:
padding, causality, which picture a token may look at. All of these are the same for every query, or one run of keys for
each query, which the kernels can skip along instead of reading a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain import may_read, remembered

# An additive mask hides a key completely from here on: no score that a model computes survives this beside another.
_HIDES = -1e9


class Visible(NamedTuple):
    """A mask in the terms of `cross_attention`.

    Attributes:
        arguments: some of `key_lengths`, `key_mask`, `key_ranges` and `mask`; None for a mask that has to be added.
        hidden_rows: bool, (batch | 1, heads | 1, queries | 1, 1), True for rows in which an additive mask hides every
            key. The models attend evenly to all keys there, which a zero query does too; `arguments` lets it see all
            keys. None where there is none for certain, or where nobody reads them.
    """

    arguments: dict[str, Any] | None
    hidden_rows: Tensor | None = None


def four_dims(mask: Tensor, heads: int = 1) -> Tensor:
    """View (queries, keys), or (batch * heads, queries, keys), as masks of `torch.nn.MultiheadAttention` are, with four
    dimensions; one with four is returned as it is."""
    if mask.dim() == 2:
        return mask[None, None]
    return mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask


def translate(mask: Tensor | None, batch: int, queries: int, binary: bool = False, heads: int = 1) -> Visible:
    """Translate a model's mask.

    A boolean mask (True = may be attended, as for `scaled_dot_product_attention`) keeps its meaning: a row without any
    key gives zeros. An additive one that only hides becomes a boolean one, where this can be known: on a CPU the mask
    is looked at, once for all layers that share it; elsewhere looking would wait for the device, and it stays a bias
    unless the caller knows.

    Args:
        mask: (batch | 1, heads | 1, queries | 1, keys), or what `four_dims` takes, bool or floating point, any strides;
            or None.
        batch, queries, heads: of the attention.
        binary: the caller knows that an additive mask holds nothing but 0 and numbers that hide, and that rows without
            any key are either absent or not read afterwards.
    """
    if mask is None:
        return Visible({})
    return remembered(_translate_dense, mask, batch, queries, binary, heads)


def why_not(mask: Any) -> str | None:
    """Return why `translate` cannot serve a mask, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return f"the mask is a {type(mask).__name__}"
    if mask.dim() != 4 or not (mask.dtype is torch.bool or mask.is_floating_point()):
        return f"the mask is {mask.dtype} with {mask.dim()} dimensions"
    return None


def _translate_dense(mask: Tensor, batch: int, queries: int, binary: bool, heads: int) -> Visible:
    return _translate(four_dims(mask, heads), batch, queries, binary, may_read(mask))


def _translate(mask: Tensor, batch: int, queries: int, binary: bool, may_read_values: bool) -> Visible:
    # What was expanded is read once. A trace would keep the strides of its example.
    for dim in (1, 2) if not torch.jit.is_tracing() else ():
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    rows = None
    if mask.dtype is not torch.bool:
        seen = mask > max(_HIDES, torch.finfo(mask.dtype).min)
        if not binary or mask.requires_grad:
            if not may_read_values or mask.requires_grad or not torch.equal(mask == 0, seen):
                return Visible(None)
            empty = ~seen.any(-1, keepdim=True)
            if bool(empty.any()):
                seen, rows = seen | empty, empty
        mask = seen
    if mask.shape[3] == 0:
        return Visible({}, rows)
    return Visible(
        _from_values(mask, batch, queries) if may_read_values else _without_values(mask, batch, queries), rows
    )


def _from_values(seen: Tensor, batch: int, queries: int) -> dict[str, Any]:
    """`seen`: (batch | 1, heads | 1, queries | 1, keys) bool on the CPU."""
    if seen.shape[1] > 1:
        if not torch.equal(seen, seen[:, :1].expand_as(seen)):
            return {"mask": seen}
        seen = seen[:, :1]
    rows = seen[:, 0]
    start, stop = _runs(rows)
    count = rows.sum(-1, dtype=torch.int32)
    if bool((count == seen.shape[3]).all()):
        return {}
    whole = torch.equal(stop - start, count)
    if rows.shape[1] > 1 and torch.equal(count, count[:, :1].expand_as(count)):
        # Perhaps every query sees the same.
        same = (
            torch.equal(start, start[:, :1].expand_as(start))
            if whole
            else torch.equal(rows, rows[:, :1].expand_as(rows))
        )
        rows, start, stop = (x[:, :1] if same else x for x in (rows, start, stop))
    if rows.shape[1] == 1:
        if whole and not bool(start.any()):
            return {"key_lengths": stop[:, 0].expand(batch).contiguous()}
        return {"key_mask": rows[:, 0].expand(batch, -1).contiguous()}
    ranges = {"key_ranges": (_filled(start, batch, queries), _filled(stop, batch, queries))}
    return ranges if whole else {**ranges, "mask": seen}


def _without_values(seen: Tensor, batch: int, queries: int) -> dict[str, Any]:
    """The same without reading values: ranges around what is seen let tiles be skipped, the mask does the rest."""
    if seen.shape[1] > 1:
        return {"mask": seen}
    if seen.shape[2] == 1:
        return {"key_mask": seen[:, 0, 0].expand(batch, -1).contiguous()}
    start, stop = _runs(seen[:, 0])
    return {"key_ranges": (_filled(start, batch, queries), _filled(stop, batch, queries)), "mask": seen}


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 key seen in each row of (batch, rows, keys), both 0 where there is none."""
    keys = rows.shape[-1]
    # The smaller the type, the less is written on the way.
    position = torch.arange(1, keys + 1, dtype=torch.int16 if keys < 2**15 else torch.int32, device=rows.device)
    stop = torch.where(rows, position, 0).amax(-1).int()
    start = keys - torch.where(rows, position.flip(0), 0).amax(-1).int()
    return torch.where(stop > 0, start, 0), stop


def _filled(ends: Tensor, batch: int, queries: int) -> Tensor:
    return ends.expand(batch, queries).contiguous()
