"""What the processes of a sharded index do in its tests. In a module of its own: they import it."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from velm_kernels import ImageTextIndex, Neighbours, ShardedIndex
from velm_kernels.retrieval import files, processes

# What each process gives of rows, of ids to remove and of queries; none, too.
SHARES = [(7, 0, 4), (0, 0, 0), (1, 60, 2), (0, 5, 0), (40, 40, 41)]
QUERIES = (2, 0, 3)


def run(body: Callable[[int, int, Path], None], rank: int, world: int, folder: str, told: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=240))
    try:
        body(rank, world, Path(folder))
        # Nobody leaves while others still listen.
        dist.barrier()
        told.send(None)
    except BaseException:
        told.send(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


class Pair:
    """A sharded index, and one index of all rows beside it in every process."""

    def __init__(self, rank: int, metric: str) -> None:
        self.rank, self.metric = rank, metric
        self.sharded, self.alone = ShardedIndex(6, metric=metric), ImageTextIndex(6, metric=metric)
        self.generator = torch.Generator().manual_seed(0)

    def features(self, rows: int) -> Tensor:
        """Small whole numbers: many values are equal."""
        return torch.randint(-2, 3, (rows, 6), generator=self.generator).float()

    def own(self, shares: tuple[int, ...]) -> slice:
        return slice(sum(shares[: self.rank]), sum(shares[: self.rank + 1]))

    def some_ids(self, count: int) -> Tensor:
        ids = self.alone.ids
        return ids[torch.randperm(len(ids), generator=self.generator)[:count]]

    def add(self, shares: tuple[int, ...], ids: Tensor | None = None) -> None:
        rows, own = self.features(sum(shares)), self.own(shares)
        texts = [{"row": row % 5, "text": "ö" * (row % 7)} if row % 4 else None for row in range(len(rows))]
        wanted = self.alone.add(rows, ids, texts)
        added = self.sharded.add(rows[own], None if ids is None else ids[own], texts[own])
        assert torch.equal(added, wanted[own])

    def remove(self, count: int) -> None:
        gone = self.some_ids(count)
        self.alone.remove(gone)
        self.sharded.remove(gone[self.rank :: 3])

    def same(self, also: Any = None) -> None:
        """The same ids, and values to the last bit."""
        for index in (self.sharded, also) if also else (self.sharded,):
            queries, own = self.features(sum(QUERIES)), self.own(QUERIES)
            exclude = self.some_ids(2 * len(queries)).view(len(queries), -1) if len(self.alone) > 10 else None
            among = self.some_ids(len(self.alone) // 2)
            for k, more, excluded in (
                (len(self.alone) + 3, {}, None),
                (5, {}, exclude),
                (5, {"ids": among, "where": {"row": {1, 2, 3}}}, exclude),
                (6, {"where": {"row": [4, 3]}}, None),
            ):
                found = index.search(queries[own], k, exclude=None if excluded is None else excluded[own], **more)
                wanted = self.alone.search(queries, k, exclude=excluded, **more)
                assert isinstance(found, Neighbours)
                assert torch.equal(found.ids, wanted.ids[own]), (k, found.ids, wanted.ids[own])
                assert torch.equal(found.values, wanted.values[own])
            assert index.metadata(found.ids) == self.alone.metadata(found.ids)
            assert torch.equal(index.features(found.ids), self.alone.features(found.ids))
            assert index.select({"row": 2}).tolist() == self.alone.select({"row": 2}).tolist()
            assert len(index) == len(self.alone) and index.sizes[self.rank] == len(index.local)
            assert max(index.sizes) - min(index.sizes) <= max(1, len(index) // 24), index.sizes


def changes(rank: int, world: int, folder: Path) -> None:
    """Changes one after the other; each time shards of other sizes."""
    for metric, all_shares in (("dot", SHARES), ("l2", SHARES[3:])):
        pair = Pair(rank, metric)
        pair.same()
        for step, shares in enumerate(all_shares):
            pair.add(shares)
            total = sum(SHARES[step - 1])
            pair.add(SHARES[step - 1], 5000 * (step + 1) - torch.randperm(total, generator=pair.generator))
            pair.remove(len(pair.alone) // 3)
            pair.same()
            # Of one process's shard alone.
            gone = pair.sharded._processes.gather(pair.sharded.local.ids)[step % 3][::2]
            pair.alone.remove(gone)
            pair.sharded.remove(gone)
            changed, own = pair.some_ids(sum(QUERIES)), pair.own(QUERIES)
            changed, rows = changed[: sum(QUERIES)], pair.features(len(changed))
            texts = [{"row": 2}] * len(changed)
            pair.alone.update(changed, rows, texts)
            pair.sharded.update(changed[own], rows[own], texts[own])
            pair.alone.update(changed[:1], metadata=["new"])
            pair.sharded.update(changed[:1] if rank == 1 else [], metadata=["new"][: rank == 1])
            pair.same()


def refreshed(rank: int, world: int, folder: Path) -> None:
    pair = Pair(rank, "dot")
    pair.add((50, 3, 20))
    made = pair.features(100)

    def encode(ids: Tensor, metadata: list[Any]) -> Tensor:
        assert metadata == pair.alone.metadata(ids)
        return made[ids]

    def fails(ids: Tensor, _: list[Any]) -> Tensor:
        if rank == 1:
            raise ValueError("no picture")
        return made[ids]

    with pytest.raises(ValueError, match="no picture"):
        pair.sharded.refresh(fails)
    pair.same()
    pair.sharded.refresh(encode, batch_size=7)
    pair.alone.refresh(encode)
    pair.same()
    made = pair.features(100)
    done = pair.sharded.refresh(encode, wait=False)
    with pytest.raises(RuntimeError, match="another one has not ended"):
        pair.sharded.refresh(encode)
    pair.same()
    gone = pair.sharded._processes.gather(pair.sharded.local.ids)[0][3:]
    pair.sharded.remove(gone)
    assert done.result() == 73 - len(gone) == done.result()
    assert done.done()
    pair.alone.remove(gone)
    pair.alone.refresh(encode)
    pair.same()


REFUSED: list[tuple[Callable[[ShardedIndex, int], Any], type[Exception], str]] = [
    (
        lambda i, rank: i.add(torch.full((2, 6), torch.nan if rank == 1 else 1.0)),
        ValueError,
        "features: expected finite",
    ),
    (lambda i, rank: i.add(torch.ones(1, 6 - (rank == 2))), ValueError, "expected .* dim = 6"),
    (lambda i, rank: i.add(torch.ones(1, 6), [77]), ValueError, "ids: expected different ids, given 77"),
    (lambda i, rank: i.add(torch.ones(1, 6), [(3, 200, 201)[rank]]), ValueError, "not in the index yet, given 3$"),
    (lambda i, rank: i.add(torch.ones(1, 6), [99] if rank == 0 else None), ValueError, "ids given: expected the same"),
    (lambda i, rank: i.remove([1000] if rank == 2 else [1]), ValueError, "in the index, given 1000$"),
    (lambda i, rank: i.update([1], torch.ones(1, 6)), ValueError, "expected different ids, given 1 "),
    (lambda i, rank: i.update([rank], torch.ones(1, 6) if rank else None), ValueError, "left out: expected the same"),
    (lambda i, rank: i.search(torch.ones(1, 6), 2 + rank), ValueError, "k, .*expected the same in all processes"),
    (lambda i, rank: i.search(torch.ones(1, 6), 2, where={"row": rank}), ValueError, "where: expected the same"),
    (lambda i, rank: i.search(torch.ones(1, 6), 2, ids=[rank]), ValueError, "ids: expected the same"),
    (lambda i, rank: i.search(torch.ones(1, 6), 2, ids=[500]), ValueError, "in the index, given 500$"),
    (lambda i, rank: i.search(torch.ones(1, 6), -1 if rank == 1 else 2), ValueError, "k: expected at least 0"),
    (lambda i, rank: i.metadata([500 if rank == 1 else 0]), ValueError, "in the index, given 500$"),
    (lambda i, rank: i.features([-1, -2][: rank + 1]), ValueError, "in the index, given -2"),
    (lambda i, rank: i.refresh(3 if rank == 1 else len), TypeError, "encode: expected a function"),
    (lambda i, rank: ShardedIndex(6 + (rank == 2)), ValueError, "dim, metric, dtype and engine: expected the same"),
]


def refused(rank: int, world: int, folder: Path) -> None:
    """An error in one process is one in all, and nothing changes."""
    pair = Pair(rank, "dot")
    pair.add((50, 3, 20))
    for call, error, told in REFUSED:
        before = pair.sharded.local.ids
        with pytest.raises(error, match=told):
            call(pair.sharded, rank)
        assert torch.equal(pair.sharded.local.ids, before)
    pair.same()
    # Who raised it is told to the others.
    with pytest.raises(ValueError, match="features" if rank == 1 else "process 1: features"):
        pair.sharded.add(torch.full((2, 6), torch.nan if rank == 1 else 1.0))
    pair.add((1, 2, 3))
    pair.same()


def saved(rank: int, world: int, folder: Path) -> None:
    """By as many processes as have saved it: what is mapped stays as it was."""
    pair = Pair(rank, "l2")
    pair.add((50, 3, 20))
    pair.remove(20)
    path = folder / "index"
    pair.sharded.save(path)
    loaded = ShardedIndex.load(path, metric="l2")
    assert all(segment.mapped for segment in loaded.local._store.state.segments[:1])
    pair.same(loaded)
    # One that does not come to its end: the last step is the one that counts.
    before = sorted(entry.name for entry in path.iterdir())
    replaced, files.replaced = files.replaced, _full  # type: ignore[assignment]
    with pytest.raises((OSError, RuntimeError), match="No space"):
        pair.sharded.save(path)
    files.replaced = replaced
    pair.same(ShardedIndex.load(path))
    dist.barrier()
    (path / f"0123-{rank}-of-3.safetensors").write_bytes(b"of a save that was killed")
    dist.barrier()
    pair.sharded.save(path)
    names = sorted(entry.name for entry in path.iterdir())
    assert len(names) == 4 and not {*names} & {*before} - {"index.json"}
    pair.same(loaded)
    pair.same(ShardedIndex.load(path, memory_map=False))
    pair.sharded = loaded
    pair.add((0, 9, 1))
    pair.remove(10)
    pair.same()
    pair.sharded.save(path)
    pair.same(ShardedIndex.load(path))
    with pytest.raises(ValueError, match=r"metric: expected 'l2' like .*given 'dot'"):
        ShardedIndex.load(path, metric="dot")
    with pytest.raises((FileNotFoundError, RuntimeError), match="expected the folder of an index"):
        ShardedIndex.load(folder)
    dist.barrier()
    if rank == 0:
        torch.save(
            (pair.alone.ids, pair.alone.features(pair.alone.ids), pair.alone.metadata(pair.alone.ids)), folder / "all"
        )


def _full(path: Any) -> Any:
    raise OSError(28, "No space left on device")


def by_others(rank: int, world: int, folder: Path) -> None:
    """By another number of processes than have saved it."""
    pair = Pair(rank, "l2")
    ids, features, metadata = torch.load(folder / "all")
    pair.alone.add(features, ids, metadata)
    pair.sharded = ShardedIndex.load(folder / "index")
    ids = torch.tensor(
        [one for some in pair.sharded._processes.gather(pair.sharded.local.ids.tolist()) for one in some]
    )
    assert ids.sort().values.equal(pair.alone.ids.sort().values)
    assert max(pair.sharded.sizes) - min(pair.sharded.sizes) <= 1
    for queries in (features[:5], features[:0]):
        found, wanted = pair.sharded.search(queries, 9), pair.alone.search(queries, 9)
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.values, wanted.values)
    assert pair.sharded.metadata(found.ids) == pair.alone.metadata(found.ids)
    assert pair.sharded.metadata(ids[:30]) == pair.alone.metadata(ids[:30])
    assert pair.sharded.add(torch.ones(1, 6)).item() == int(pair.sharded._next_id) - world + rank
    (folder / "index" / "index.json").write_text("{") if rank == 0 else None
    with pytest.raises(ValueError, match="it is broken"):
        ShardedIndex.load(folder / "index")


def approximate(rank: int, world: int, folder: Path) -> None:
    """Each process looks everywhere in its own: what is found is exact."""
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(900, 6, generator=generator), torch.randn(5, 6, generator=generator)
    sharded, alone = ShardedIndex(6, engine="faiss"), ImageTextIndex(6)
    sharded.add(rows[300 * rank :][:300], range(300 * rank, 300 * rank + 300))
    alone.add(rows)
    sharded.build("IVF4,Flat", nprobe=4)
    sharded.remove(range(0, 900, 7))
    alone.remove(range(0, 900, 7))
    assert sharded.local._store.state.approximate.index.ntotal == 300
    assert torch.equal(sharded.search(queries, 9).ids, alone.search(queries, 9).ids)
    sharded.save(folder / "index")
    loaded = ShardedIndex.load(folder / "index")
    assert loaded.engine == "faiss" and loaded.local._store.state.approximate is not None
    assert torch.equal(loaded.search(queries, 9).ids, alone.search(queries, 9).ids)


def levels(rank: int, world: int, folder: Path) -> None:
    """Without any process: how many rows go where."""
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 9, (seed % 4 + 1,), generator=generator).tolist()
        new = torch.randint(0, 9, (len(sizes),), generator=generator).tolist()
        coming = processes.leveled(sizes, sum(new))
        assert sum(coming) == sum(new) and min(coming) >= 0
        after = [size + more for size, more in zip(sizes, coming)]
        # Who got something is not above anybody by more than one.
        assert all(size - min(after) <= 1 for size, more in zip(after, coming) if more)
        flow = processes.flows(new, coming)
        assert [sum(one) for one in flow] == new and [sum(one) for one in zip(*flow)] == coming
        assert all(flow[i][i] == min(new[i], coming[i]) for i in range(len(sizes)))
        wanted = processes.even(sizes)
        assert sum(wanted) == sum(sizes) and max(wanted) - min(wanted) <= 1
        assert sum(map(abs, map(int.__sub__, wanted, sizes))) == min(
            sum(map(abs, map(int.__sub__, one, sizes)))
            for one in (
                [sum(sizes) // len(sizes) + (i in extra) for i in range(len(sizes))] for extra in _choices(sizes)
            )
        )


def _choices(sizes: list[int]) -> Any:

    return itertools.combinations(range(len(sizes)), sum(sizes) % len(sizes))
