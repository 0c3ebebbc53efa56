"""What bilinear_attention and bilinear_attention_pool are tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.bilinear_attention import reference


def _sides(draw: Draw, batch: int, regions: int, words: int, k: int) -> Arguments:
    return {
        "v": draw(batch, regions, k),
        "q": draw(batch, words, k),
        "v_lengths": torch.full((batch,), max(regions - 1, 0)),
        "q_mask": draw.mask(batch, words),
    }


def _maps(draw: Draw, batch: int, regions: int, words: int, k: int, glimpses: int) -> Arguments:
    given = {"h": 2 * draw(glimpses, k) * max(k, 1) ** -0.5, "bias": draw(glimpses), "return_logits": True}
    return _sides(draw, batch, regions, words, k) | given


def _pool(draw: Draw, batch: int, regions: int, words: int, k: int, glimpses: int) -> Arguments:
    return _sides(draw, batch, regions, words, k) | {"attention": draw(batch, glimpses, regions, words)}


def _live(v: Tensor, v_lengths: Tensor) -> Tensor:
    return torch.arange(v.shape[1], device=v.device) < v_lengths[:, None]


def _meaning(function: Callable[..., Any]) -> Callable[..., Any]:
    def meaning(v: Tensor, v_lengths: Tensor, q_mask: Tensor, return_logits: bool = False, **given: Any) -> Any:
        return function(v=v, v_live=_live(v, v_lengths), q_live=q_mask, **given)

    return meaning


def _unread(arguments: Arguments) -> Arguments:
    v, q, q_mask = (arguments[name] for name in ("v", "q", "q_mask"))
    hidden = ~_live(v, arguments["v_lengths"])[..., None]
    changed = {"v": v.masked_fill(hidden, torch.nan), "q": q.masked_fill(~q_mask[..., None], torch.inf)}
    if "attention" in arguments:
        changed["attention"] = arguments["attention"].masked_fill(hidden[:, None] | ~q_mask[:, None, None], torch.nan)
    return arguments | changed


CASES = [
    Case(
        "bilinear_attention",
        "",
        _maps,
        _meaning(reference.bilinear_attention),
        ("v", "q", "h", "bias"),
        sizes={"batch": 3, "regions": 5, "words": 4, "k": 12, "glimpses": 3},
        larger={"batch": 7, "regions": 100, "words": 37, "k": 70, "glimpses": 3},
        published={
            "ban": {"batch": 64, "regions": 36, "words": 14, "k": 3840, "glimpses": 8},
            "ban-100-regions": {"batch": 16, "regions": 100, "words": 20, "k": 3072, "glimpses": 4},
            "ban-patches": {"batch": 4, "regions": 576, "words": 64, "k": 768, "glimpses": 8},
        },
        unread=_unread,
    ),
    Case(
        "bilinear_attention_pool",
        "",
        _pool,
        _meaning(reference.bilinear_attention_pool),
        ("v", "q", "attention"),
        sizes={"batch": 3, "regions": 5, "words": 4, "k": 12, "glimpses": 3},
        larger={"batch": 7, "regions": 100, "words": 37, "k": 70, "glimpses": 3},
        published={
            "ban-pool": {"batch": 64, "regions": 36, "words": 14, "k": 1280, "glimpses": 1},
            "ban-pool-patches": {"batch": 4, "regions": 576, "words": 64, "k": 768, "glimpses": 1},
        },
        unread=_unread,
    ),
]
