"""What mutual_information is tried with."""

from __future__ import annotations

import functools

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses.mutual_information import reference

_NAMES = ("x", "y", "scale")


def _pairs(draw: Draw, pairs: int, dim: int, bound: str) -> Arguments:
    x = draw(pairs, dim)
    # Pairs that are alike, and scores of a few units, of which "smile" clips some. Where "jsd" is largest its gradients
    # are differences.
    scale = (0.1 if bound == "jsd" else 0.3) + 0.1 * draw().abs()
    return {"x": x, "y": x + draw(pairs, dim), "scale": scale, "bound": bound, "clip": 1.0}


CASES = [
    Case(
        "mutual_information",
        "" if bound == "infonce" else bound,
        functools.partial(_pairs, bound=bound),
        reference.mutual_information,
        _NAMES,
        sizes={"pairs": 6, "dim": 12},
        larger={"pairs": 150, "dim": 40},
        published={"mine": {"pairs": 4096, "dim": 256}} if bound == "infonce" else {},
        # Near 0 the bound is a difference of larger numbers.
        scaled=("x",),
        # The operator behind these is that of infonce.
        numbers_only=bound in ("dv", "nwj"),
    )
    for bound in ("infonce", "dv", "nwj", "jsd", "smile")
]
