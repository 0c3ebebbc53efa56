"""What maxsim is tried with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses.maxsim import reference


def _tokens(masked: bool) -> Callable[..., Arguments]:
    def make(draw: Draw, queries: int, tokens: int, documents: int, length: int, dim: int) -> Arguments:
        arguments = {"queries": draw(queries, tokens, dim), "documents": draw(documents, length, dim)}
        if masked:
            # From the third entry on nothing counts.
            arguments["query_mask"] = draw.mask(queries, tokens)
            arguments["document_mask"] = draw.mask(documents, length)
        return arguments

    return make


def _poisoned(arguments: Arguments) -> Arguments:
    hidden = {name: ~arguments[f"{name.removesuffix('s').replace('querie', 'query')}_mask"] for name in _BOTH}
    return arguments | {name: arguments[name].masked_fill(hidden[name][..., None], torch.nan) for name in _BOTH}


_BOTH = ("queries", "documents")

CASES = [
    Case(
        "maxsim",
        name,
        _tokens(bool(name)),
        reference.maxsim,
        _BOTH,
        sizes={"queries": 3, "tokens": 4, "documents": 3, "length": 7, "dim": 12},
        larger={"queries": 3, "tokens": 37, "documents": 5, "length": 150, "dim": 40},
        published={"colpali": {"queries": 8, "tokens": 20, "documents": 64, "length": 1030, "dim": 128}}
        if not name
        else {},
        unread=_poisoned if name else None,
    )
    for name in ("", "masks")
]
