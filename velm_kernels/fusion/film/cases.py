"""What film is tried with."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.film import reference


def _regions(draw: Draw, batch: int, regions: int, dim: int) -> Arguments:
    given = {"gamma": draw(batch, dim), "beta": 3 * draw(batch, dim), "gamma_offset": 0.5}
    return {"x": draw(batch, regions, dim), **given}


def _pixels(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    given = {"gamma": draw(batch, dim), "beta": draw(batch, dim), "channels_first": True, "gamma_offset": 1.0}
    return {"x": draw(batch, dim, height, width), **given}


def _meaning(x: Tensor, gamma: Tensor, beta: Tensor, channels_first: bool = False, gamma_offset: float = 0.0) -> Tensor:
    gamma, beta = (value[:, :, None, None] if channels_first else value[:, None] for value in (gamma, beta))
    return reference.film(x, gamma, beta, gamma_offset)


CASES = [
    Case(
        "film",
        "",
        _regions,
        _meaning,
        ("x", "gamma", "beta"),
        sizes={"batch": 2, "regions": 5, "dim": 12},
        larger={"batch": 3, "regions": 300, "dim": 90},
        published={"film": {"batch": 32, "regions": 196, "dim": 768}},
    ),
    Case(
        "film",
        "pixels",
        _pixels,
        _meaning,
        ("x", "gamma", "beta"),
        sizes={"batch": 2, "height": 3, "width": 4, "dim": 12},
        larger={"batch": 3, "height": 25, "width": 30, "dim": 40},
    ),
]
