"""mutual_information by the Triton kernels of contrastive_loss around torch's products."""

from __future__ import annotations

from typing import Any

from velm_kernels.losses.contrastive_loss.triton import contrastive_gradients, contrastive_statistics
from velm_kernels.losses.mutual_information import tiles


def mutual_information_forward(*arguments: Any) -> None:
    tiles.forward(contrastive_statistics, *arguments)


def mutual_information_backward(*arguments: Any) -> None:
    tiles.backward(contrastive_gradients, *arguments)
