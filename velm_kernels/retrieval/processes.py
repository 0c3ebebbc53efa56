"""What the processes of a sharded index tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from velm_kernels.retrieval.store import Rows

T = TypeVar("T")


class Processes:
    """The processes of a group, each of which calls the same methods in the same order.

    Attributes:
        rank, world: of this process, and how many there are.
        device: where tensors are when they are sent.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("group: expected torch.distributed.init_process_group to have been called")
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """What each process has."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def agreed(self, check: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
        """What ``check`` gives for this process, and what it tells of every one. Where it raises an error in one, all
        raise it, and nobody waits for the others."""
        value: Any = None
        told: Any = None
        error: Exception | None = None
        try:
            value, told = check()
        except Exception as raised:
            error = raised
        found: list[Any] = self.gather((told, error and (type(error), str(error))))
        for rank, (_, wrong) in enumerate(found):
            if wrong is not None:
                if error is not None:
                    raise error
                kind, text = wrong
                kind = next((one for one in (TypeError, ValueError) if issubclass(kind, one)), RuntimeError)
                raise kind(f"process {rank}: {text}")
        return value, [one for one, _ in found]

    def exchange(self, parts: Sequence[Tensor], coming: Sequence[int]) -> list[Tensor]:
        """``parts[rank]`` goes to each process; returns what comes from each, of which ``coming`` are the first sizes
        and whose others are those of ``parts``."""
        received, requests = [], []
        for rank, part in enumerate(parts):
            if rank == self.rank:
                received.append(part)
                continue
            peer = dist.get_global_rank(self.group, rank) if self.group is not None else rank
            came = torch.empty((coming[rank], *part.shape[1:]), dtype=part.dtype, device=self.device)
            if part.numel():
                requests.append(dist.P2POp(dist.isend, part.to(self.device).contiguous(), peer, self.group))
            if came.numel():
                requests.append(dist.P2POp(dist.irecv, came, peer, self.group))
            received.append(came)
        for request in dist.batch_isend_irecv(requests) if requests else ():
            request.wait()
        return [came.to(part.device) for came, part in zip(received, parts)]

    def exchange_texts(self, parts: Sequence[Sequence[bytes]], coming: Sequence[int]) -> list[list[bytes]]:
        own = [torch.tensor([len(text) for text in part], dtype=torch.int64, device="cpu") for part in parts]
        lengths = self.exchange(own, coming)
        blobs = self.exchange([_as_tensor(b"".join(part)) for part in parts], [int(one.sum()) for one in lengths])
        found = []
        for length, blob in zip(lengths, blobs):
            whole, at, texts = bytes(blob.tolist()), 0, []
            for size in length.tolist():
                texts.append(whole[at : at + size])
                at += size
            found.append(texts)
        return found

    def exchange_rows(self, parts: Sequence[Rows], coming: Sequence[int]) -> list[Rows]:
        features = self.exchange([part.features for part in parts], coming)
        ids = self.exchange([part.ids for part in parts], coming)
        texts = self.exchange_texts([part.texts for part in parts], coming)
        return [Rows(*one) for one in zip(features, ids, texts)]


def _as_tensor(text: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if text
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


def leveled(sizes: Sequence[int], new: int) -> list[int]:
    """How many of ``new`` rows come to each of those that have ``sizes``, so that the largest is as small as can be."""
    by_size = sorted(range(len(sizes)), key=lambda rank: (sizes[rank], rank))
    level, filled = 0, 0
    for count in range(1, len(sizes) + 1):
        filled = sum(sizes[rank] for rank in by_size[:count])
        level, rest = divmod(filled + new, count)
        if count == len(sizes) or level < sizes[by_size[count]]:
            break
    coming = [0] * len(sizes)
    for place, rank in enumerate(by_size[:count]):
        coming[rank] = level - sizes[rank] + (place < rest)
    return coming


def even(sizes: Sequence[int]) -> list[int]:
    """As many rows altogether, and in no process more than one more than in another: the largest stay so."""
    least, rest = divmod(sum(sizes), len(sizes))
    wanted = [least] * len(sizes)
    for rank in sorted(range(len(sizes)), key=lambda rank: -sizes[rank])[:rest]:
        wanted[rank] += 1
    return wanted


def flows(there: Sequence[int], coming: Sequence[int]) -> list[list[int]]:
    """How many rows go from each process, which has ``there``, to each, to which ``coming`` shall come, of as many
    altogether: what can stay stays."""
    flow = [[0] * len(there) for _ in there]
    left, wanted = list(there), list(coming)
    for rank in range(len(there)):
        stays = min(left[rank], wanted[rank])
        flow[rank][rank] = stays
        left[rank] -= stays
        wanted[rank] -= stays
    to = 0
    for rank in range(len(there)):
        while left[rank]:
            while not wanted[to]:
                to += 1
            moved = min(left[rank], wanted[to])
            flow[rank][to] += moved
            left[rank] -= moved
            wanted[to] -= moved
    return flow
