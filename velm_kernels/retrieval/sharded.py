"""An index whose rows are divided among the processes of torch.distributed."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.retrieval import given, search
from velm_kernels.retrieval.given import Where
from velm_kernels.retrieval.index import Encode, ImageTextIndex, Neighbours, nested
from velm_kernels.retrieval.processes import Processes, even, flows, leveled
from velm_kernels.retrieval.store import Rows, State

MANIFEST, FORMAT, VERSION = "index.json", "velm_kernels.retrieval.sharded", 1
# Shards may differ by this share of the mean before rows that are there move.
UNEVEN = 8


class ShardedIndex:
    """:class:`velm_kernels.ImageTextIndex` whose rows are divided among the processes of ``torch.distributed``: for
    what one machine cannot hold. It finds the same ids as one index with all rows, equal values included.

    Every method is a collective: all processes of the group call it, in the same order, each from one thread at a
    time. Each gives rows, ids or queries of its own, any number of them, none too, and gets what belongs to these. An
    error in one process is raised in all, and changes nothing in any.

    Args:
        dim, metric, dtype, device, engine: as of :class:`velm_kernels.ImageTextIndex`, the same in all processes but
            for the device's number.
        group: the process group, if not the default one.

    Shape:
        features ``(rows, dim)``, ids ``(rows,)``, queries ``(queries, dim)``, what is found ``(queries, k)``.

    New rows go where there are the fewest, and rows move where removal has left shards that differ by more than an
    eighth of their mean. ``len`` is the number of rows in all processes, ``local`` the index of those in this one, to
    be read only, and ``sizes`` how many there are in each.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: as of :class:`velm_kernels.ImageTextIndex`; or processes do not give the same where they have to.
        RuntimeError: torch.distributed was not begun.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> index = velm_kernels.ShardedIndex(4, metric="dot")
        >>> ids = index.add(torch.eye(4), metadata=["a cat", "a dog", "a tree", "a lake"])
        >>> values, ids = index.search(torch.tensor([[0.1, 2.0, 0.0, 0.3]]), k=2)
        >>> ids, index.metadata(ids)
        (tensor([[1, 3]]), [['a dog', 'a lake']])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        engine: str = "exact",
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._begin(ImageTextIndex(dim, metric=metric, dtype=dtype, device=device, engine=engine), group)

    def _begin(self, local: ImageTextIndex, group: Any, next_id: int = 0) -> None:
        self.local = local
        self._processes = Processes(group, local.device)
        settings = (local.dim, local.metric, local.dtype, local.engine)
        told = self._processes.gather((settings, len(local)))
        self._same("dim, metric, dtype and engine", [one for one, _ in told])
        self.sizes = [size for _, size in told]
        self._next_id = next_id
        self._renewing = False

    def _same(self, name: str, told: Sequence[Any]) -> Any:
        """What all processes have given, which has to be the same."""
        if any(one != told[0] for one in told):
            raise ValueError(f"{name}: expected the same in all processes, given {', '.join(map(str, told))}")
        return told[0]

    @property
    def dim(self) -> int:
        return self.local.dim

    @property
    def metric(self) -> str:
        return self.local.metric

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def engine(self) -> str:
        return self.local.engine

    def __len__(self) -> int:
        return sum(self.sizes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows in {self._processes.world} processes, here {self.local!r})"

    def add(self, features: Tensor, ids: Tensor | Sequence[int] | None = None, metadata: Any = None) -> Tensor:
        """Adds the rows of all processes.

        Args:
            features: ``(n, dim)``, this process's; floating point, finite.
            ids: ``(n,)``, different in all processes; None in all: those after the greatest so far, in the order of the
                processes.
            metadata: a list of n values that JSON can hold; or None.

        Returns:
            The ids of this process's rows, ``(n,)``, int64, on the CPU.
        """
        processes = self._processes

        def check() -> tuple[Any, Any]:
            rows = self.local._features("features", features)
            new = None if ids is None else given.ids("ids", ids, len(rows))
            return (rows, new, given.texts("metadata", metadata, len(rows))), (len(rows), new)

        (rows, new, texts), told = processes.agreed(check)
        counts = [count for count, _ in told]
        if self._same("ids given", [one is not None for _, one in told]):
            given_ids = given.ids("ids", torch.cat([one for _, one in told]))
            known = processes.agreed(lambda: (None, self.local._store.find(given_ids)[1] >= 0))[1]
            given.new("ids", given_ids, torch.stack(known).any(0).long() - 1)
            self._next_id = max(self._next_id, int(given_ids.max()) + 1) if len(given_ids) else self._next_id
        else:
            first = self._next_id + sum(counts[: processes.rank])
            if self._next_id + sum(counts) > 2**63 - 1:
                raise ValueError(f"ids: expected to be given, as there are none left above {self._next_id - 1}")
            new = torch.arange(first, first + counts[processes.rank], device="cpu")
            self._next_id += sum(counts)
        coming = leveled(self.sizes, sum(counts))
        self._move(Rows(rows, new, texts), flows(counts, coming))
        self.sizes = [size + more for size, more in zip(self.sizes, coming)]
        return new.clone()

    def _move(self, rows: Rows, flow: Sequence[Sequence[int]]) -> None:
        """Sends rows where they go, first those for the first process, and adds what comes."""
        ends = torch.tensor([0, *flow[self._processes.rank]], device="cpu").cumsum(0).tolist()
        parts = [
            Rows(rows.features[start:stop], rows.ids[start:stop], rows.texts[start:stop])
            for start, stop in itertools.pairwise(ends)
        ]
        coming = [row[self._processes.rank] for row in flow]
        for came in self._processes.exchange_rows(parts, coming):
            if len(came):
                self.local._store.append(came)

    def _find(self, name: str, ids: Any, distinct: bool) -> tuple[list[Tensor], Tensor]:
        """The ids that every process has given, and which process has each of them, one after the other."""
        _, told = self._processes.agreed(lambda: (None, given.ids(name, ids)))
        wanted = torch.cat(told)
        if distinct:
            given.ids(name, wanted)
        return told, self._owners(name, wanted)

    def _owners(self, name: str, wanted: Tensor) -> Tensor:
        here = self._processes.gather(self.local._store.find(wanted)[1] >= 0)
        owners = torch.full_like(wanted, -1)
        for rank, mask in enumerate(here):
            owners[mask] = rank
        given.there(name, wanted, owners)
        return owners

    def remove(self, ids: Tensor | Sequence[int]) -> None:
        """Removes rows by their ids ``(n,)``, those that each process gives, wherever they are: several may give the
        same."""
        told, owners = self._find("ids", ids, distinct=False)
        wanted = torch.cat(told)
        gone = [wanted[owners == rank].unique() for rank in range(self._processes.world)]
        self.local._store.remove(gone[self._processes.rank])
        self.sizes = [size - len(one) for size, one in zip(self.sizes, gone)]
        if not self._renewing:
            self._balance()

    def _balance(self) -> None:
        """Moves the newest rows from large shards to small ones, where they differ much."""
        sizes, wanted = self.sizes, even(self.sizes)
        if max(sizes) - min(sizes) <= max(1, len(self) // (UNEVEN * len(sizes))):
            return
        flow = flows(
            [max(0, size - want) for size, want in zip(sizes, wanted)],
            [max(0, want - size) for size, want in zip(sizes, wanted)],
        )
        state = self.local._store.state
        order = state.order()[len(self.local) - sum(flow[self._processes.rank]) :]
        leaving = Rows(state.features(order), state.ids(order), state.texts(order))
        self.local._store.remove(leaving.ids)
        self._move(leaving, flow)
        self.sizes = wanted

    def update(self, ids: Tensor | Sequence[int], features: Tensor | None = None, metadata: Any = None) -> None:
        """Gives rows other features, other metadata or both.

        Args:
            ids: ``(n,)``, of rows in the index, different in all processes.
            features: ``(n, dim)``, or None in all processes: they stay.
            metadata: a list of n values, or None in all processes: it stays.
        """

        def check() -> tuple[Any, Any]:
            own = given.ids("ids", ids)
            rows = None if features is None else self.local._features("features", features, len(own))
            texts = None if metadata is None else given.texts("metadata", metadata, len(own))
            return (own, rows, texts), (features is None, metadata is None)

        (own, rows, texts), kept = self._processes.agreed(check)
        self._same("features and metadata left out", kept)
        told, owners = self._find("ids", own, distinct=True)
        to = owners.split([len(one) for one in told])
        mine, exchange = self._processes.rank, self._processes.exchange
        places = [(to[mine] == rank).nonzero().flatten() for rank in range(self._processes.world)]
        changed = [one[owner == mine] for one, owner in zip(told, to)]
        coming = [len(one) for one in changed]
        if rows is not None:
            rows = torch.cat(exchange([rows[at.to(rows.device)] for at in places], coming))
        if texts is not None:
            sent = [[texts[i] for i in at.tolist()] for at in places]
            texts = [text for part in self._processes.exchange_texts(sent, coming) for text in part]
        self.local._update(torch.cat(changed), rows, texts)

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        ids: Tensor | Sequence[int] | None = None,
        where: Where | None = None,
        exclude: Tensor | Sequence[int] | None = None,
        engine: str | None = None,
    ) -> Neighbours:
        """The ``k`` nearest rows of each query of this process, among the rows of all.

        Args:
            queries: ``(queries, dim)``, of any number in each process, of one dtype in all.
            k: how many; the same in all processes, as ids, where and engine are.
            ids: only among these, ``(n,)``.
            where: as of :meth:`velm_kernels.ImageTextIndex.search`.
            exclude: for each query of this process ids that are not to be found, ``(queries,)`` or ``(queries, n)``.
            engine: ``"exact"`` or ``"faiss"``, if not that of the index.

        Returns:
            :class:`Neighbours`, whose values have no gradient.

        All queries come to every process, and ``k`` values and ids of each go back.
        """

        def check() -> tuple[Any, Any]:
            own = self.local._queries(queries).detach()
            out = None if exclude is None else self.local._excluded(exclude, len(own))
            chosen = None if ids is None else given.ids("ids", ids)
            holds = None if where is None else given.condition("where", where)
            checks.integer("k", k, 0, 2**31 - 1)
            by = self.engine if engine is None else checks.choice("engine", engine, given.ENGINES)
            same = (k, own.dtype, by, _told(where))
            told = (len(own), 0 if out is None else out.shape[1], same, chosen)
            return (own, out, holds, by), told

        (own, out, holds, by), told = self._processes.agreed(check)
        counts, widths, same, chosen = zip(*told)
        self._same("k, the dtype of queries, engine and where", same)
        self._same("ids", [None if one is None else one.tolist() for one in chosen])
        many = k + max(widths)
        state, order = self._among(chosen[0], holds)
        world = self._processes.world
        with torch.no_grad():
            everyone = torch.cat(self._processes.exchange([own] * world, counts))
            values, found = search.nearest(state, everyone, many, self.metric, order, by)
            back = [len(own)] * world
            parts = [self._processes.exchange(list(one.split(counts)), back) for one in (values, found)]
            merged = search.merged(list(zip(*parts)), many if out is not None else k, self.metric)
            return Neighbours(*(merged if out is None else search.without(merged, out, k, self.metric)))

    def _among(self, chosen: Tensor | None, holds: Any) -> tuple[State, Tensor | None]:
        """As of one index; ids may be those of rows elsewhere."""
        state, order = self.local._store.state, None
        if chosen is not None:
            self._owners("ids", chosen)
            state, order = self.local._store.find(chosen)
            order = order[order >= 0]
        if holds is not None:
            order = state.order() if order is None else order
            order = order[torch.tensor([holds(text) for text in state.texts(order)], dtype=torch.bool, device="cpu")]
        return state, None if order is None else order.sort().values

    def select(self, where: Where) -> Tensor:
        """The ids ``(n,)`` of all rows, in any process, whose metadata is as ``where`` says, increasing."""
        _, told = self._processes.agreed(lambda: (None, self.local.select(where)))
        return torch.cat(told).sort().values

    def metadata(self, ids: Tensor | Sequence[int] | int) -> Any:
        """The metadata of rows by their ids, which each process gives for itself: of one id a value, of a tensor of ids
        lists as deep as it has dimensions. None for -1, which is the id of nothing found."""
        wanted, places, asked = self._asked(ids)
        state = self.local._store.state
        texts = self._processes.exchange_texts([state.texts(order) for order in asked], [len(at) for at in places])
        values: list[Any] = [None] * wanted.numel()
        for at, part in zip(places, texts):
            for place, text in zip(at.tolist(), part):
                values[place] = given.untexted(text)
        return nested(values, wanted.shape)

    def features(self, ids: Tensor | Sequence[int]) -> Tensor:
        """The features of rows by their ids, which each process gives for itself: ``(..., dim)`` for ids ``(...)``; 0
        for -1, which is the id of nothing found."""
        wanted, places, asked = self._asked(ids)
        state = self.local._store.state
        features = torch.zeros(wanted.numel(), self.dim, dtype=self.dtype, device=self.device)
        coming = [len(at) for at in places]
        for at, part in zip(places, self._processes.exchange([state.features(order) for order in asked], coming)):
            features[at.to(self.device)] = part
        return features.view(*wanted.shape, self.dim)

    def _asked(self, ids: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The ids that this process wants, at which places of them each process answers, and the numbers of the rows
        here that each has asked for."""

        def check() -> tuple[Tensor, Tensor]:
            wanted = given.some_ids("ids", ids)
            return wanted, wanted.reshape(-1)

        wanted, told = self._processes.agreed(check)
        everyone = torch.cat(told)
        is_nothing = everyone == -1
        owners = torch.full_like(everyone, -1)
        owners[~is_nothing] = self._owners("ids", everyone[~is_nothing])
        mine = self._processes.rank
        by_process = owners.split([len(one) for one in told])
        places = [(by_process[mine] == rank).nonzero().flatten() for rank in range(self._processes.world)]
        asked = [self.local._store.find(one[owner == mine])[1] for one, owner in zip(told, by_process)]
        return wanted, places, asked

    def build(self, factory: str | None = None, *, nprobe: int = 16, ef_search: int = 64) -> None:
        """Builds what the engine ``"faiss"`` searches, in each process of its rows, as
        :meth:`velm_kernels.ImageTextIndex.build` does with ``factory``, ``nprobe`` and ``ef_search``."""

        def check() -> tuple[None, None]:
            if len(self.local):
                self.local.build(factory, nprobe=nprobe, ef_search=ef_search)
            return None, None

        self._processes.agreed(check)

    def refresh(self, encode: Encode, *, batch_size: int = 1024, wait: bool = True) -> Any:
        """Replaces the features of all rows at once by those that ``encode`` makes, in each process of its rows.

        Args:
            encode: as of :meth:`velm_kernels.ImageTextIndex.refresh`; it may call no collective.
            batch_size: the most rows that it is given at a time.
            wait: until that is done; or return at once, and all processes call ``result()`` of what is returned, when
                each of them is to search by the new features.

        Returns:
            What has ``done()``, whether this process's features are made, and ``result()``, a collective that waits
            for all processes, puts the features of all in place and returns of how many rows.

        Where ``encode`` fails in one process the features stay as they are in all.
        """

        def check() -> tuple[None, None]:
            if not callable(encode):
                raise TypeError(f"encode: expected a function of ids and metadata, given {checks.describe(encode)}")
            checks.integer("batch_size", batch_size, 1)
            checks.flag("wait", wait)
            if self._renewing:
                raise RuntimeError("refresh: another one has not ended; call its result()")
            return None, None

        self._processes.agreed(check)
        self._renewing = True
        renewal = Renewal(self, encode, batch_size)
        if wait:
            renewal.result()
        return renewal

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to the folder ``path``, which all processes can reach and is made where there is none: a
        file of each process, and one that names them, which comes last. Processes that are killed at any moment leave
        the index that was there or this one, whole."""
        folder, processes = Path(path), self._processes
        generation = processes.gather(os.urandom(4).hex())[0]
        names = [f"{generation}-{rank}-of-{processes.world}.safetensors" for rank in range(processes.world)]

        def write() -> tuple[None, None]:
            from velm_kernels.retrieval import stored

            folder.mkdir(exist_ok=True)
            stored.write(folder / names[processes.rank], self.local._store.state, self.metric, self._next_id)
            return None, None

        def name() -> tuple[None, None]:
            from velm_kernels.retrieval import files

            if processes.rank == 0:
                told = {"format": FORMAT, "version": VERSION, "metric": self.metric, "next_id": self._next_id}
                with files.replaced(folder / MANIFEST) as file:
                    file.write(json.dumps({**told, "shards": names, "rows": self.sizes}).encode())
                for old in [*folder.glob("*-of-*.safetensors"), *folder.glob(f".*{files.ASIDE}")]:
                    if old.name not in names:
                        old.unlink(missing_ok=True)
            return None, None

        processes.agreed(write)
        processes.agreed(name)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        memory_map: bool = True,
        *,
        metric: str | None = None,
        device: torch.device | str | None = None,
        engine: str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> ShardedIndex:
        """Reads an index from a folder.

        Args:
            path: what :meth:`save` has written.
            memory_map: as of :meth:`velm_kernels.ImageTextIndex.load`. By another number of processes than have written
                it rows are divided anew, and are in memory.
            metric: that it is expected to have; None: whichever it has.
            device: of the features.
            engine: ``"exact"`` or ``"faiss"``; None: ``"faiss"`` if it was built for all of it.
            group: the process group, if not the default one.
        """
        where = torch.empty(0, device="cpu" if device is None else device).device
        processes = Processes(group, where)

        def name() -> tuple[None, Any]:
            if processes.rank:
                return None, None
            told = _manifest(Path(path))
            if metric not in (None, told["metric"]):
                raise ValueError(f"metric: expected {told['metric']!r} like {os.fspath(path)}, given {metric!r}")
            return None, told

        def read() -> tuple[ImageTextIndex, str]:
            shards = [Path(path) / name for name in told["shards"]]
            if len(shards) == processes.world:
                local = ImageTextIndex.load(shards[processes.rank], memory_map, device=device, engine=engine)
            else:
                local = _part(shards, told["rows"], processes.rank, processes.world, where, engine or "exact")
            return local, local.engine

        # By one of them: somebody may save another one meanwhile.
        told = processes.agreed(name)[1][0]
        local, engines = processes.agreed(read)
        if engine is None and "exact" in engines:
            local._engine = "exact"
        index = cls.__new__(cls)
        index._begin(local, group, told["next_id"])
        return index


def _told(where: Any) -> Any:
    """What can be compared between processes: sets have an order of their own in each, functions cannot."""
    if where is None or callable(where):
        return where is None
    return {
        key: sorted(map(repr, one)) if isinstance(one, (set, frozenset)) else repr(one) for key, one in where.items()
    }


class Renewal:
    """Features that one process makes anew of its shard, in another thread."""

    def __init__(self, index: ShardedIndex, encode: Encode, batch_size: int) -> None:
        self._index, self._encode, self._batch = index, encode, batch_size
        self._made: State | None = None
        self._error: Exception | None = None
        self._count: int | None = None
        # The rows stay where they are until all processes are done.
        self._held = ExitStack()
        self._state, self._until = self._held.enter_context(index.local._store.held())
        self._thread = threading.Thread(target=self._run, name="velm_kernels refresh")
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._made = self._index.local._made_anew(self._state, self._until, self._encode, self._batch)
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        """Whether this process has made its features, or failed."""
        return not self._thread.is_alive()

    def result(self) -> int:
        """Puts the features of all processes in place, and returns of how many rows."""
        if self._count is not None:
            return self._count
        self._thread.join()

        def check() -> tuple[State, None]:
            if self._error is not None:
                raise self._error
            assert self._made is not None
            return self._made, None

        index = self._index
        with self._held:
            try:
                made, _ = index._processes.agreed(check)
                count = index.local._store.put(made)
            finally:
                index._renewing = False
        self._count = sum(index._processes.gather(count))
        index._balance()
        return self._count


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"path: expected the folder of an index, and there is no {path}")
    try:
        told: dict[str, Any] = json.loads(path.read_bytes())
        wrong = (
            told["format"] != FORMAT or len(told["shards"]) != len(told["rows"]) or told["metric"] not in given.METRICS
        )
        version, _ = told["version"], int(told["next_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what names the shards of an index, and it is broken: {error!r}") from None
    if wrong:
        raise ValueError(f"{path}: expected what names the shards of an index, given something else")
    if version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of the format, given {version}")
    return told


def _part(
    shards: Sequence[Path], sizes: Sequence[int], rank: int, world: int, device: torch.device, engine: str
) -> ImageTextIndex:
    """Of the rows of all shards, one after the other, those of this process."""
    first, last = (sum(sizes) * at // world for at in (rank, rank + 1))
    local: ImageTextIndex | None = None
    at = 0
    for path, size in zip(shards, sizes):
        start, stop = max(first - at, 0), min(last - at, size)
        if start < stop or local is None:
            shard = ImageTextIndex.load(path, engine="exact")
            if len(shard) != size:
                raise ValueError(f"{path}: expected {size} rows, given {len(shard)}")
            if local is None:
                local = ImageTextIndex(shard.dim, metric=shard.metric, dtype=shard.dtype, device=device, engine=engine)
            if start < stop:
                state = shard._store.state
                order = state.order()[start:stop]
                features = state.features(order).to(device)
                local._store.append(Rows(features, state.ids(order), state.texts(order)))
        at += size
    assert local is not None
    return local
