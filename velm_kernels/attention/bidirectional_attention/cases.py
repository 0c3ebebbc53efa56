"""What bidirectional_attention is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.bidirectional_attention import reference
from velm_kernels.cases import Arguments, Case, Draw


def _heads(draw: Draw, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    return draw(batch, rows, heads, dim).transpose(1, 2)


def _two_ways(*masks: str, **options: Any) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, heads: int, a: int, b: int, head_dim: int) -> Arguments:
        given = {name: draw.mask(batch, a if name == "mask_a" else b) for name in masks}
        return {
            "query_a": _heads(draw, batch, heads, a, head_dim),
            "query_b": _heads(draw, batch, heads, b, head_dim),
            "value_a": _heads(draw, batch, heads, a, 12),
            "value_b": _heads(draw, batch, heads, b, 20),
            **given,
            "return_logsumexp": True,
            **options,
        }

    return make


def _two_ways_meaning(return_logsumexp: bool, **given: Any) -> Any:
    return reference.bidirectional_attention(**given)


def _unread_values(arguments: Arguments) -> Arguments:
    for side in "ab":
        if f"mask_{side}" in arguments:
            hidden = ~arguments[f"mask_{side}"][:, None, :, None]
            arguments = arguments | {f"value_{side}": arguments[f"value_{side}"].masked_fill(hidden, torch.nan)}
    return arguments


def _bidirectional(name: str, make: Callable[..., Arguments], numbers_only: bool = True) -> Case:
    return Case(
        "bidirectional_attention",
        name,
        make,
        _two_ways_meaning,
        ("query_a", "query_b", "value_a", "value_b"),
        sizes={"batch": 3, "a": 5, "b": 9, "heads": 2, "head_dim": 16},
        larger={"batch": 3, "a": 37, "b": 75, "heads": 4, "head_dim": 40},
        published={"grounding-dino-fusion": {"batch": 1, "heads": 4, "a": 5000, "b": 256, "head_dim": 256}}
        if name == ""
        else {},
        not_zero=("head_dim",),
        unread=_unread_values,
        numbers_only=numbers_only,
    )


CASES = [
    _bidirectional("", _two_ways("mask_a"), numbers_only=False),
    _bidirectional("two masks", _two_ways("mask_a", "mask_b")),
    _bidirectional("dropout", _two_ways(dropout_p=0.25, seed=7)),
]
