"""The numbers rule: a kernel's error may be at most twice that of plain torch in the same dtype, plus a few ulps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ULPS = 4.0


def relative_rms(got: torch.Tensor, exact: torch.Tensor, floor: float = 0.0) -> float:
    """``|got - exact| / |exact|`` in the Frobenius norm, in float64; ``|got|`` where exact and ``floor`` are zero.

    ``floor`` is the least size that errors are compared with: a sum whose terms cancel is as inexact as its terms.
    """
    got, exact = got.double(), exact.double()
    size = max(float(torch.linalg.vector_norm(exact)), floor)
    return float(torch.linalg.vector_norm(got - exact)) / (size or 1.0)


def assert_accurate(
    name: str,
    got: torch.Tensor,
    plain: torch.Tensor | Sequence[torch.Tensor],
    exact: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    ulps: float = ULPS,
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Raises unless ``got`` meets the rule; ``dtype`` is the one the arithmetic was done in, by default got's.

    Where plain torch has several ways to compute the same, ``plain`` holds the result of each, and the worst counts.
    """
    ways = [plain] if isinstance(plain, torch.Tensor) else plain
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(got).all() or not torch.isfinite(exact).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return
    infinite = torch.isinf(exact)
    assert torch.equal(torch.isinf(got), infinite), f"{name}: infinite elsewhere than expected"
    got, exact, *ways = (value.masked_fill(infinite, 0.0) for value in (got, exact, *ways))
    # Where plain torch overflows it sets no measure.
    ways = [torch.where(torch.isfinite(way), way.double(), exact.double()) for way in ways]
    error, error_plain = relative_rms(got, exact, floor), max(relative_rms(way, exact, floor) for way in ways)
    limit = factor * error_plain + ulps * torch.finfo(dtype or got.dtype).eps
    assert error <= limit, f"{name}: relative RMS error {error:.3g}, plain torch {error_plain:.3g}, limit {limit:.3g}"
