"""mutual_information on the CPU: torch's products of tiles, and the kernels of contrastive_loss between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velm_kernels.losses.mutual_information import tiles


def mutual_information_forward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.forward(kernel("contrastive_statistics"), *arguments)


def mutual_information_backward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.backward(kernel("contrastive_gradients"), *arguments)
