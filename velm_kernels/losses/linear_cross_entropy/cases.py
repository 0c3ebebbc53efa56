"""What linear_cross_entropy is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses.linear_cross_entropy import reference


def _labelled(share: float, bias: bool, **settings: Any) -> Callable[..., Arguments]:
    """Hidden states of which about ``share`` have a label."""

    def make(draw: Draw, batch: int, tokens: int, dim: int, vocabulary: int) -> Arguments:
        targets = draw.integers(0, vocabulary, batch, tokens)
        unlabelled = ~draw.mask(batch, tokens, share=share) if vocabulary else torch.ones(batch, tokens) > 0
        if vocabulary:
            unlabelled.view(-1)[:1] = False  # the mean over no label is NaN
        arguments = {
            "hidden": draw(batch, tokens, dim),
            "weight": draw(vocabulary, dim) * max(dim, 1) ** -0.5,
            "targets": targets.masked_fill(unlabelled, -100),
        }
        return arguments | ({"bias": draw(vocabulary)} if bias else {}) | settings

    return make


def _poisoned(arguments: Arguments) -> Arguments:
    targets = arguments["targets"]
    if arguments.get("shift"):
        targets = reference.shifted(targets, -100)
    hidden = arguments["hidden"].masked_fill((targets == -100)[..., None], torch.nan)
    return arguments | {"hidden": hidden}


def _sizes(batch: int, tokens: int, dim: int, vocabulary: int) -> dict[str, int]:
    return {"batch": batch, "tokens": tokens, "dim": dim, "vocabulary": vocabulary}


# All that a head may have.
_EVERYTHING = {"shift": True, "softcap": 4.0, "label_smoothing": 0.1}

CASES = [
    Case(
        "linear_cross_entropy",
        name,
        _labelled(share, bias, **settings),
        reference.linear_cross_entropy,
        ("hidden", "weight", *(("bias",) if bias else ())),
        sizes=_sizes(2, 5, 12, 17),
        # Not so long that torch's own products have other bits for other numbers of threads.
        larger=_sizes(2, 90, 21, 700) if name else _sizes(2, 300, 17, 131),
        # The mean of nothing is NaN.
        not_zero=("batch", "tokens", "vocabulary") if not name else (),
        published={"captions": _sizes(1, 2048, 1024, 32000)} if not name else {},
        unread=_poisoned,
        scaled=("hidden",),
        numbers_only=name == "sum",
    )
    for name, share, bias, settings in (
        ("", 0.5, False, {}),
        ("everything", 0.5, True, {**_EVERYTHING, "reduction": "none", "return_logprobs": True}),
        ("sum", 0.9, True, {**_EVERYTHING, "reduction": "sum"}),
    )
]
