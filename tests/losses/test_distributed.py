"""Losses over the pairs of several processes: values and gradients are those of one process with all pairs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import velm_kernels
from tests.conftest import INTERPRETED
from velm_kernels.backends import cpu

pytestmark = pytest.mark.skipif(INTERPRETED or cpu.in_use() is None, reason="of the kernels for the CPU")

Loss = Callable[..., Tensor]
# How many pairs each process has, none among them.
SHARES = {2: (5, 9), 3: (7, 0, 4)}
LABELS = torch.tensor([3, -1, 5, 3, 2**40, 1, 1, 3, 0, 2**40, -1, 5, 6, 7])


class Towers(nn.Module):
    """What has weights and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(10, 6), nn.Linear(8, 6)
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.scale.exp(), self.bias * 1.0


def contrastive(*given: Any, labels: Tensor, **options: Any) -> Tensor:
    return velm_kernels.contrastive_loss(*given, **options)


def with_labels(*given: Any, labels: Tensor, **options: Any) -> Tensor:
    return velm_kernels.contrastive_loss(*given, labels=labels, label_smoothing=0.2, **options)


def summed(*given: Any, labels: Tensor, **options: Any) -> Tensor:
    return velm_kernels.contrastive_loss(*given, normalize=False, label_smoothing=0.1, reduction="sum", **options)


def sigmoid(*given: Any, labels: Tensor, **options: Any) -> Tensor:
    return velm_kernels.sigmoid_loss(*given, **options)


def sigmoid_with_labels(*given: Any, labels: Tensor, **options: Any) -> Tensor:
    return velm_kernels.sigmoid_loss(*given, labels=labels, reduction="sum", normalize=False, **options)


LOSSES = [contrastive, with_labels, summed, sigmoid, sigmoid_with_labels]


def inputs(pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(pairs, 10, generator=generator), torch.randn(pairs, 8, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}


def alone(loss: Loss, pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
    model, (image, text) = Towers(), inputs(pairs)
    value = loss(*model(image, text), labels=LABELS[:pairs])
    value.backward()
    return value.detach(), gradients(model)


def process(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        shares = SHARES[world]
        own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        for loss in LOSSES:
            wanted, of_all = alone(loss, sum(shares))
            model = nn.parallel.DistributedDataParallel(Towers(), find_unused_parameters=True)
            image, text = (x[own] for x in inputs(sum(shares)))
            value = loss(*model(image, text), labels=LABELS[own], group=dist.group.WORLD)
            value.backward()
            torch.testing.assert_close(value.detach(), wanted, msg=lambda text, name=loss.__name__: f"{name}: {text}")
            for name, grad in gradients(model).items():
                # A bias of all logits changes no softmax.
                atol = 1e-5 if name == "bias" and loss in LOSSES[:3] else 1e-6
                where = f"{loss.__name__}, {name}, rank {rank}"
                expected = of_all[name]
                torch.testing.assert_close(
                    grad, expected, rtol=1e-4, atol=atol, msg=lambda text, where=where: f"{where}: {text}"
                )
        _modules(rank, world)
        with pytest.raises(ValueError, match="reduction: expected mean or sum with a group"):
            velm_kernels.contrastive_loss(torch.eye(2), torch.eye(2), 1.0, reduction="none", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _modules(rank: int, world: int) -> None:
    """As open_clip makes them."""
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(2, 4 * world, 6, generator=generator)
    own = slice(4 * rank, 4 * rank + 4)
    for kind, more in ((velm_kernels.ContrastiveLoss, ()), (velm_kernels.SigmoidLoss, (-3.0,))):
        both = kind(rank=rank, world_size=world)(image[own], text[own], 2.0, *more)
        torch.testing.assert_close(both, kind()(image, text, 2.0, *more))


@pytest.mark.parametrize("world", SHARES)
def test_gradients_after_averaging_are_those_of_one_process(world: int) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(process, (world, port), nprocs=world)
