"""The written meaning of glu, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def glu(x: Tensor, gate: Tensor) -> Tensor:
    """``x * sigmoid(gate)``."""
    return x * torch.sigmoid(gate)
