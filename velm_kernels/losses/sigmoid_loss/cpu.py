"""sigmoid_loss on the CPU: torch's products of tiles, and a kernel of this library for the pass between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velm_kernels.losses.sigmoid_loss import tiles


def sigmoid_loss_forward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.forward(kernel("sigmoid_pass"), *arguments)


def sigmoid_loss_backward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    tiles.backward(kernel("sigmoid_pass"), *arguments)
