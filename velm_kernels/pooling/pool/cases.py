"""What masked_pool and segment_pool are tried with: every mode of the first, its mean too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.pool import reference


def _masked(mode: str) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, tokens: int, dim: int) -> Arguments:
        lengths = torch.full((batch,), max(tokens - 2, 0))
        return {"x": draw(batch, tokens, dim), "lengths": lengths, "mask": draw.mask(batch, tokens), "mode": mode}

    return make


def _unread(arguments: Arguments) -> Arguments:
    x, mask = arguments["x"], arguments["mask"]
    live = mask & (torch.arange(x.shape[1], device=x.device) < arguments["lengths"][:, None])
    return arguments | {"x": x.masked_fill(~live[..., None], torch.nan)}


def _pixels(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    return {"x": draw(batch, dim, height, width), "channels_first": True}


def _segments(mode: str) -> Callable[..., Arguments]:
    def make(draw: Draw, segments: int, tokens: int, dim: int) -> Arguments:
        bounds = torch.arange(segments + 1, dtype=torch.int32) * tokens
        # The second one is empty, the third has its tokens too.
        bounds[2:3] = bounds[1:2] if segments > 2 else bounds[2:3]
        return {"x": draw(segments * tokens, dim), "cu_seqlens": bounds, "mode": mode}

    return make


def _published(mode: str) -> dict[str, dict[str, int]]:
    return {f"masked-{mode}": {"batch": 64, "tokens": 577, "dim": 1024}} if mode in ("mean", "max", "logsumexp") else {}


CASES = [
    *(
        Case(
            "masked_pool",
            mode,
            _masked(mode),
            reference.masked_pool,
            ("x",),
            sizes={"batch": 3, "tokens": 7, "dim": 12},
            larger={"batch": 3, "tokens": 3000, "dim": 40},
            published=_published(mode),
            unread=_unread,
        )
        for mode in reference.MODES
    ),
    Case(
        "masked_pool",
        "pixels",
        _pixels,
        reference.masked_pool,
        ("x",),
        sizes={"batch": 2, "height": 3, "width": 4, "dim": 12},
        larger={"batch": 3, "height": 25, "width": 12, "dim": 90},
    ),
    *(
        Case(
            "segment_pool",
            mode,
            _segments(mode),
            reference.segment_pool,
            ("x",),
            sizes={"segments": 4, "tokens": 4, "dim": 12},
            larger={"segments": 7, "tokens": 150, "dim": 90},
            numbers_only=mode != "max",
        )
        for mode in reference.MODES
    ),
]
