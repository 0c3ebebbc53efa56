"""Which tokens belong to which row, by lengths, a mask or the bounds of packed segments: checks, and plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, derivatives


def checked_integers(name: str, given: Tensor, like: Tensor, layout: str, shape: tuple[int, ...]) -> Tensor:
    return checks.integers(name, given, layout, shape, "x", like).reshape(-1)


def checked_mask(mask: Tensor, x: Tensor, layout: str, target: tuple[int, ...], rows: int, tokens: int) -> Tensor:
    """``mask`` broadcast to ``target``, as contiguous ``(rows, tokens)``."""
    return checks.mask("mask", mask, layout, target, "x", x).reshape(rows, tokens).contiguous()


def checked_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    checks.tensor("cu_seqlens", cu_seqlens, dims=1, layout="(segments + 1,)")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected (segments + 1,) with at least the leading 0, given (0,)")
    return checked_integers("cu_seqlens", cu_seqlens, x, "(segments + 1,)", tuple(cu_seqlens.shape))


def check_values(arguments: Arguments, tokens: int) -> None:
    """Lengths and bounds of segments fit the tokens; runs inside operators, since it reads values."""
    if arguments["lengths"] is not None:
        checks.values_between("lengths", arguments["lengths"], 0, tokens)
    bounds = arguments["cu_seqlens"]
    if bounds is not None and checks.reads_values(bounds):
        first, last = int(bounds[0]), int(bounds[-1])
        if first != 0 or last != tokens or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected values that rise from 0 to {tokens}, the tokens of x, "
                f"given {first} to {last}{'' if (bounds.diff() >= 0).all() else ', some of them falling'}"
            )


def padded(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens as ``(segments, longest, dim)``, and where in ``x`` each comes from (-1 where from nowhere)."""
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    longest = int(lengths.max()) if len(lengths) and derivatives.readable(lengths) else len(x) if len(lengths) else 0
    position = torch.arange(longest, device=x.device)
    source = torch.where(position < lengths[:, None], bounds[:-1, None] + position, -1)
    return x[source.clamp(min=0)] if len(x) else x.new_zeros(*source.shape, x.shape[1]), source


def live_tokens(
    segments: int, tokens: int, lengths: Tensor | None, mask: Tensor | None, device: torch.device
) -> Tensor:
    live = torch.ones(segments, tokens, dtype=torch.bool, device=device) if mask is None else mask
    return live if lengths is None else live & (torch.arange(tokens, device=device) < lengths[:, None])
