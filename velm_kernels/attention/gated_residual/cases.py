"""What gated_residual is tried with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from velm_kernels.attention.gated_residual import reference
from velm_kernels.cases import Arguments, Case, Draw


def _gated(scalar: bool) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, rows: int, dim: int) -> Arguments:
        tensors = {"residual": draw(batch, rows, dim), "x": draw(batch, rows, dim)}
        return tensors | {"gate": draw(1 if scalar else dim), "row_mask": draw.mask(batch, rows)}

    return make


def _unread(arguments: Arguments) -> Arguments:
    return arguments | {"x": arguments["x"].masked_fill(~arguments["row_mask"][..., None], torch.nan)}


CASES = [
    Case(
        "gated_residual",
        name,
        _gated(name == "scalar"),
        reference.gated_residual,
        ("residual", "x", "gate"),
        sizes={"batch": 3, "rows": 5, "dim": 12},
        larger={"batch": 3, "rows": 130, "dim": 530},
        published={"gated-residual": {"batch": 4, "rows": 512, "dim": 4096}} if name == "scalar" else {},
        unread=_unread,
        numbers_only=name == "scalar",
    )
    for name in ("", "scalar")
]
