"""Losses over the pairs of several processes: the rows of texts go round a ring, with what is known of them so far.

Each process holds its own rows and those of one other at a time. A loss of all is differentiated so that the mean of
the gradients of all processes, which DistributedDataParallel takes, is the gradient in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from velm_kernels.backends import cpu, triton

# No column of a tile is a row's own pair.
ELSEWHERE = -(1 << 40)


class Ring:
    """The processes of a group.

    Attributes:
        rank, world: of this process, and how many there are.
        sizes: of each process the number of its images and of its texts.
    """

    def __init__(self, group: Any, image: Tensor, text: Tensor) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        own = torch.tensor([image.shape[0], text.shape[0]], device=image.device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own, group=group)
        self.sizes = [tuple(size.tolist()) for size in found]
        self._next, self._last = (dist.get_global_rank(group, (self.rank + by) % self.world) for by in (1, -1))

    def total(self, side: int) -> int:
        """How many images (0) or texts (1) there are together."""
        return sum(size[side] for size in self.sizes)

    def part(self, everything: Tensor | None, side: int, rank: int) -> Tensor | None:
        """Of what there is of all images or texts, that of one process."""
        if everything is None:
            return None
        return everything.split([size[side] for size in self.sizes])[rank]

    def gathered(self, own: Tensor, side: int) -> Tensor:
        """A number for each image or text of all processes, in their order."""
        most = max(size[side] for size in self.sizes)
        padded = own.new_zeros(most)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat([one[: size[side]] for one, size in zip(found, self.sizes, strict=True)])

    def summed(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group)
        return value

    def round(self, start: Sequence[tuple[Tensor, int]], visit: Callable[..., None]) -> list[Tensor]:
        """Sends texts round: ``visit(rank, *tensors)`` with those of every process, its own first, may write on them.
        ``start`` are this process's and the dimension that is one of texts. Returns what comes back."""
        block = [tensor for tensor, _ in start]
        for step in range(self.world):
            visit((self.rank - step) % self.world, *block)
            comes_from = (self.rank - step - 1) % self.world
            if self.world > 1:
                block = self._shifted(block, [dim for _, dim in start], self.sizes[comes_from][1])
        return block

    def _shifted(self, block: Sequence[Tensor], dims: Sequence[int], texts: int) -> list[Tensor]:
        received, requests = [], []
        for tensor, dim in zip(block, dims, strict=True):
            shape = list(tensor.shape)
            shape[dim] = texts
            received.append(tensor.new_empty(shape))
            if tensor.numel():
                requests.append(dist.P2POp(dist.isend, tensor.contiguous(), self._next, self.group))
            if received[-1].numel():
                requests.append(dist.P2POp(dist.irecv, received[-1], self._last, self.group))
        for request in dist.batch_isend_irecv(requests) if requests else ():
            request.wait()
        return received


class SumOverProcesses(torch.autograd.Function):
    """The sum of every process's share. Its gradient is as many times as large as there are processes, whose mean is
    taken afterwards."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, ring: Ring) -> Tensor:
        ctx.world = ring.world
        return ring.summed(share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world, None


def sum_over_processes(share: Tensor, ring: Ring) -> Tensor:
    total: Tensor = SumOverProcesses.apply(share, ring)
    return total


def kernel(name: str, module: str, x: Tensor) -> Callable[..., None]:
    """The pass over a tile for the device of ``x``."""
    if x.is_cpu:
        if reasons := cpu.unavailable():
            raise RuntimeError(f"group: the losses of several processes have no form in plain torch, and {reasons[0]}")
        return cpu.op(name)
    return triton.imported(f"velm_kernels.losses.{module}.triton", name)
