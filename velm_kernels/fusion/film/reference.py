"""The written meaning of film, in plain torch."""

from __future__ import annotations

from torch import Tensor


def film(x: Tensor, gamma: Tensor, beta: Tensor, gamma_offset: float = 0.0) -> Tensor:
    """``(gamma_offset + gamma) * x + beta``, gamma and beta with a dimension of 1 where x has regions or pixels."""
    return (gamma_offset + gamma) * x + beta
