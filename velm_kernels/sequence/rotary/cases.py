"""What rotary is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.sequence.rotary import reference, tables

SIZES = {"batch": 2, "heads": 4, "tokens": 5, "head_dim": 12}
LARGER = {"batch": 2, "heads": 6, "tokens": 75, "head_dim": 88}
# Queries and keys of Qwen3-VL's text and of its vision tower.
TEXT = {"batch": 1, "heads": 32, "tokens": 4096, "head_dim": 128}
TOWER = {"batch": 1, "heads": 16, "tokens": 4096, "head_dim": 72}


def _query_and_key(draw: Draw, batch: int, heads: int, tokens: int, head_dim: int) -> Arguments:
    """Grouped heads; the queries lie as a projection leaves them."""
    query = draw(batch, tokens, heads, head_dim).transpose(1, 2)
    return {"query": query, "key": draw(batch, heads // 2, tokens, head_dim)}


def _plain(draw: Draw, batch: int, heads: int, tokens: int, head_dim: int) -> Arguments:
    """One column that is not rotated where head_dim is odd."""
    rotated = head_dim // 2 * 2
    given = _query_and_key(draw, batch, heads, tokens, head_dim)
    return given | {"cos": draw(batch, tokens, rotated), "sin": draw(batch, tokens, rotated)}


def _norms(draw: Draw, batch: int, heads: int, tokens: int, head_dim: int) -> Arguments:
    """Partial rotation of pairs by one table for all entries, after norms of which one is over all heads."""
    rotated = head_dim // 4 * 2
    given = _query_and_key(draw, batch, heads, tokens, head_dim)
    given |= {"cos": draw(tokens, rotated, wide=True), "sin": draw(tokens, rotated, wide=True), "layout": "pairs"}
    weights = {"query_norm_weight": draw(head_dim), "key_norm_weight": draw(heads // 2 * head_dim)}
    return given | weights | {"norm_eps": 1e-2}


def _quarters(draw: Draw, batch: int, heads: int, tokens: int, head_dim: int) -> Arguments:
    rotated = head_dim // 4 * 4
    given = _query_and_key(draw, batch, heads, tokens, head_dim)
    return given | {"cos": draw(1, tokens, rotated), "sin": draw(1, tokens, rotated), "layout": "quarters"}


def _positions(draw: Draw, batch: int, heads: int, tokens: int, head_dim: int) -> Arguments:
    """Qwen3-VL's interleaved sections, some pairs of which follow the first axis at the end."""
    pairs = head_dim // 2
    sections = (pairs - 2 * (pairs // 4), pairs // 4, pairs // 4)
    given = _query_and_key(draw, batch, heads, tokens, head_dim)
    return given | {
        "positions": draw.integers(0, 50, 3, batch, tokens),
        "inverse_frequencies": 1.0 / 1e4 ** (torch.arange(pairs) / max(pairs, 1)).float(),
        "sections": sections,
        "interleaved": True,
    }


def _meaning(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "halves", **norms: Any) -> Any:
    cos, sin = (table.expand(query.shape[0], *table.shape[-2:]) for table in (cos, sin))
    return reference.rotary(query, key, cos, sin, layout, **norms)


def _meaning_of_positions(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    inverse_frequencies: Tensor,
    sections: tuple[int, int, int],
    interleaved: bool,
) -> Any:
    """The table of Qwen3-VL: that of the first axis, with every third column of the others written into it."""
    angles = positions[..., None].to(inverse_frequencies.dtype) * inverse_frequencies
    of_first = angles[0].clone()
    for axis in (1, 2):
        place = slice(axis, 3 * sections[axis], 3)
        of_first[..., place] = angles[axis][..., place]
    cos, sin = (tables.columns(table, "halves").to(query.dtype) for table in (of_first.cos(), of_first.sin()))
    return reference.rotary(query, key, cos, sin)


CASES = [
    Case(
        "rotary",
        "",
        _plain,
        _meaning,
        ("query", "key", "cos", "sin"),
        sizes=SIZES,
        larger=LARGER,
        published={"rotary-text": TEXT},
        scaled=("query", "key"),
    ),
    Case(
        "rotary",
        "norms",
        _norms,
        _meaning,
        ("query", "key", "query_norm_weight", "key_norm_weight"),
        sizes=SIZES,
        larger=LARGER,
        not_zero=("head_dim",),
        scaled=("query", "key"),
    ),
    Case("rotary", "quarters", _quarters, _meaning, ("query", "key"), SIZES, LARGER, numbers_only=True),
    Case(
        "rotary",
        "positions",
        _positions,
        _meaning_of_positions,
        ("query", "key"),
        SIZES,
        LARGER,
        published={"rotary-tower": TOWER},
        numbers_only=True,
    ),
]
