"""contrastive_loss on the CPU: torch's products of tiles, and kernels of this library for the passes between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velm_kernels.losses.contrastive_loss import tiles


def contrastive_loss_forward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.forward(kernel("contrastive_statistics"), *arguments)


def contrastive_loss_backward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.backward(kernel("contrastive_gradients"), *arguments)
