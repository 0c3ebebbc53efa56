"""ShardedIndex over processes of torch.distributed: what it finds is what one index of all rows finds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import velm_kernels

from . import shards

pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. topk_similarity runs on plain torch")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Forked from a process that has imported what they need, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.retrieval.saving", "tests.retrieval.shards"])
    return context


def run(context: Any, body: Callable[..., None], folder: Path, world: int = 3) -> None:
    (folder / "store").unlink(missing_ok=True)
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    started = [
        context.Process(target=shards.run, args=(body, rank, world, str(folder), pipes[rank][1]))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for _, sends in pipes:
        sends.close()
    try:
        for receives, _ in pipes:
            if (told := receives.recv()) is not None:
                pytest.fail(told)
    finally:
        for process in started:
            process.join(5)
            process.kill()


@pytest.mark.parametrize("body", [shards.changes, shards.refreshed, shards.refused], ids=lambda body: body.__name__)
def test_three_processes(processes: Any, tmp_path: Path, body: Callable[..., None]) -> None:
    run(processes, body, tmp_path)


def test_saved_and_loaded(processes: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    run(processes, shards.saved, tmp_path)
    run(processes, shards.by_others, tmp_path, world=2)


def test_approximate_search(processes: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("faiss")
    run(processes, shards.approximate, tmp_path)


def test_rows_go_where_there_are_the_fewest(tmp_path: Path) -> None:
    shards.levels(0, 1, tmp_path)


def test_without_processes() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        velm_kernels.ShardedIndex(4)


def test_one_process(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        index = velm_kernels.ShardedIndex(2, metric="dot", dtype=torch.bfloat16)
        index.add(torch.eye(2), [4, 2], ["a", None])
        index.save(tmp_path / "index")
        index = velm_kernels.ShardedIndex.load(tmp_path / "index")
        found = index.search(torch.ones(1, 2), 3)
        assert found.ids.tolist() == [[2, 4, -1]] and index.metadata(found.ids) == [[None, "a", None]]
        assert index.dtype == torch.bfloat16 and "2 rows in 1 processes" in repr(index)
    finally:
        dist.destroy_process_group()
