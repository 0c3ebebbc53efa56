"""Processes that save an index and are killed while they do. In a module of its own: they import it."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from velm_kernels import ImageTextIndex
from velm_kernels.retrieval import files

ROWS = 1000


def made(version: int) -> ImageTextIndex:
    """An index all of whose parts tell the version."""
    index = ImageTextIndex(32, metric="dot")
    ids = torch.arange(ROWS - version) * 2 + version
    metadata = [{"version": version, "row": row} for row in range(len(ids))]
    index.add(torch.full((len(ids), 32), float(version)), ids, metadata)
    return index


# Once for all processes that are forked from the one that has imported this.
MADE = [made(version) for version in range(3)]


def version_of(index: ImageTextIndex) -> int:
    """The version that all parts of an index tell."""
    version = int(index.features(index.ids)[0, 0])
    wanted = MADE[version]
    assert torch.equal(index.ids, wanted.ids)
    assert torch.equal(index.features(index.ids), wanted.features(wanted.ids))
    assert index.metadata(index.ids) == wanted.metadata(wanted.ids)
    return version


def save_on_and_on(path: str, begun: Connection) -> None:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    MADE[1].save(path)
    begun.send(time.perf_counter() - begin)
    while True:
        for version in (2, 1):
            MADE[version].save(path)


def save_and_stop(path: str, step: int) -> None:
    """Is killed at its ``step``-th step: before a file is made, a piece written, brought to the disk or renamed."""
    torch.set_num_threads(1)
    steps = 0

    def stopping(call: Any) -> Any:
        def stop(*args: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return stop

    files._bytes_of = stopping(files._bytes_of)  # type: ignore[assignment]
    for name in ("open", "fsync", "replace"):
        setattr(os, name, stopping(getattr(os, name)))
    MADE[2].save(path)
