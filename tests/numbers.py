"""The numbers rule (``velm_kernels/cases.py``) as an assertion, for tests that make their own tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from velm_kernels.cases import ULPS, error_and_limit
from velm_kernels.cases import relative_rms as relative_rms


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
    if exact.numel() == 0:
        return
    error, limit = error_and_limit(got, exact, ways, dtype or got.dtype, factor=factor, ulps=ulps, floor=floor)
    assert error <= limit, f"{name}: relative RMS error {error:.3g}, limit {limit:.3g}"
