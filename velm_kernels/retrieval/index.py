"""An index of features with metadata: what is nearest to a query, from memory or a file."""

from __future__ import annotations

import numbers
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.retrieval import given, search
from velm_kernels.retrieval.given import Where
from velm_kernels.retrieval.store import Rows, State, Store

# Makes features of rows anew: ``encode(ids, metadata) -> (rows, dim)``.
Encode = Callable[[Tensor, list[Any]], Tensor]


class Neighbours(NamedTuple):
    """What :meth:`velm_kernels.ImageTextIndex.search` returns.

    Attributes:
        values: ``(queries, k)``, float32, the best first: the greatest, or for ``"l2"`` the least.
        ids: ``(queries, k)``, int64; -1 where fewer than k rows were found, beside -inf (inf for ``"l2"``).
    """

    values: Tensor
    ids: Tensor


class ImageTextIndex:
    """Features of pictures or texts with ids and metadata, searched for those that are nearest to queries: exactly, by
    :func:`velm_kernels.topk_similarity`, or past a million rows approximately, by faiss (Johnson et al., 2019).

    Args:
        dim: how many numbers a row of features has.
        metric: ``"cosine"``, ``"dot"`` or ``"l2"`` (squared distance), as in :func:`velm_kernels.topk_similarity`.
        dtype: of the features in the index: float32, bfloat16 or float16. Those that are added are rounded to it.
        device: of the features, which queries have to be on too; None: the CPU, where ids and metadata always are.
        engine: ``"exact"``; or ``"faiss"``, for the CPU: what :meth:`build` was called for is searched approximately,
            rows that came since exactly.

    Shape:
        features ``(rows, dim)``, ids ``(rows,)``, queries ``(queries, dim)``, what is found ``(queries, k)``.

    Ids are integers from 0 on, given or counted. Metadata is what JSON can hold, for each row; it comes back as JSON
    gives it: a tuple as a list, keys as strings. Of equal values the lower id comes first, whatever was added when.

    Adding costs time in proportion to what is added: memory grows by doubling, and what a file is mapped into is never
    copied. Removed rows are no longer read, and their memory is given back when they are half of all.

    Any number of threads may call any method at the same time. A search sees the index as it was at one moment, with
    all rows of an addition, removal, update or refresh or with none. Changes wait for each other; searches wait for
    nothing, but for a moment where they ask for ids. A save writes what was there when it was called.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument is out of range; from methods: shapes or devices do not fit together, features are NaN
            or infinite, ids are unknown, there already, negative or given twice, or a file is none of an index, broken
            or cut short, of another version or of another metric.

    Example:
        >>> index = velm_kernels.ImageTextIndex(4)
        >>> captions = [{"caption": text} for text in ("a cat", "a dog", "a tree", "a lake")]
        >>> ids = index.add(torch.eye(4), metadata=captions)
        >>> values, ids = index.search(torch.tensor([[0.1, 2.0, 0.0, 0.3]]), k=2)
        >>> ids
        tensor([[1, 3]])
        >>> index.metadata(ids)
        [[{'caption': 'a dog'}, {'caption': 'a lake'}]]
        >>> index.search(torch.ones(1, 4), k=2, where={"caption": ["a dog", "a tree"]}).ids
        tensor([[1, 2]])
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        engine: str = "exact",
    ) -> None:
        dim = checks.integer("dim", dim, 1, 2**31 - 1)
        if dtype not in given.DTYPES:
            raise TypeError(f"dtype: expected {' or '.join(map(str, given.DTYPES))}, given {dtype}")
        # With its number, as tensors have it.
        where = torch.empty(0, device="cpu" if device is None else device).device
        self._begin(Store(dim, dtype, where), metric, engine)

    def _begin(self, store: Store, metric: str, engine: str, next_id: int = 0) -> None:
        self._store = store
        self._metric: str = checks.choice("metric", metric, given.METRICS)
        self._engine: str = checks.choice("engine", engine, given.ENGINES)
        if engine == "faiss" and store.device.type != "cpu":
            raise ValueError(f"engine: expected exact on {store.device}, given 'faiss', which searches on the CPU")
        self._next_id = next_id
        # Features are made anew by one at a time.
        self._renewal = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renewal": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _renewal=threading.Lock())

    @property
    def dim(self) -> int:
        return self._store.dim

    @property
    def metric(self) -> str:
        return self._metric

    @property
    def dtype(self) -> torch.dtype:
        return self._store.dtype

    @property
    def device(self) -> torch.device:
        return self._store.device

    @property
    def engine(self) -> str:
        return self._engine

    @property
    def ids(self) -> Tensor:
        """The ids of all rows ``(rows,)``, in the order in which these were added or updated, on the CPU."""
        state = self._store.state
        return state.ids(state.order())

    def __len__(self) -> int:
        return self._store.state.size

    def __contains__(self, id: object) -> bool:
        if isinstance(id, bool) or not isinstance(id, numbers.Integral) or not 0 <= int(id) < 2**63:
            return False
        return bool(self._store.find(torch.tensor([int(id)], device="cpu"))[1] >= 0)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} rows of {self.dim}, metric={self.metric!r}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, engine={self.engine!r})"
        )

    def add(self, features: Tensor, ids: Tensor | Sequence[int] | None = None, metadata: Any = None) -> Tensor:
        """Adds rows, all of them or, where it raises an error, none.

        Args:
            features: ``(n, dim)``, floating point, finite. They are copied.
            ids: ``(n,)`` integers from 0 on that are not in the index yet; None: those after the greatest so far.
            metadata: a list of n values that JSON can hold, None among them; or None for all.

        Returns:
            The ids, ``(n,)``, int64, on the CPU.
        """
        features = self._features("features", features)
        new = None if ids is None else given.ids("ids", ids, len(features))
        texts = given.texts("metadata", metadata, len(features))
        with self._store.lock:
            if new is None:
                self._room_for(len(features))
                new = torch.arange(self._next_id, self._next_id + len(features), device="cpu")
            else:
                given.new("ids", new, self._store.find(new)[1])
            self._store.append(Rows(features, new, texts))
            self._next_id = max(self._next_id, int(new.max()) + 1) if len(new) else self._next_id
        return new.clone()

    def _room_for(self, rows: int) -> None:
        if self._next_id + rows > 2**63 - 1:
            raise ValueError(f"ids: expected to be given, as there are none left above {self._next_id - 1}")

    def remove(self, ids: Tensor | Sequence[int]) -> None:
        """Removes rows by their ids ``(n,)``, all of them or, where one is unknown or given twice, none."""
        gone = given.ids("ids", ids)
        with self._store.lock:
            given.there("ids", gone, self._store.find(gone)[1])
            self._store.remove(gone)

    def update(self, ids: Tensor | Sequence[int], features: Tensor | None = None, metadata: Any = None) -> None:
        """Gives rows other features, other metadata or both, in one step.

        Args:
            ids: ``(n,)``, of rows in the index.
            features: ``(n, dim)``, or None: they stay.
            metadata: a list of n values, or None: it stays.
        """
        rows = given.ids("ids", ids)
        if features is not None:
            features = self._features("features", features, len(rows))
        self._update(rows, features, None if metadata is None else given.texts("metadata", metadata, len(rows)))

    def _update(self, ids: Tensor, features: Tensor | None, texts: Sequence[bytes] | None) -> None:
        with self._store.lock:
            state, order = self._store.find(ids)
            given.there("ids", ids, order)
            features = state.features(order) if features is None else features
            self._store.update(Rows(features, ids, state.texts(order) if texts is None else texts))

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
        """The ``k`` nearest rows of each query.

        Args:
            queries: ``(queries, dim)``, floating point, finite.
            k: how many, from 0 on.
            ids: only among these, ``(n,)``; unknown ones are an error.
            where: only rows whose metadata is a dict with these values by key (a list or set of values: any of them),
                or for which this function of the metadata is true. Every row's metadata is read: for many searches
                call :meth:`select` once.
            exclude: for each query ids that are not to be found, ``(queries,)`` or ``(queries, n)``: in training,
                those of the query itself. -1 is nobody.
            engine: ``"exact"`` or ``"faiss"``, if not that of the index.

        Returns:
            :class:`Neighbours`. Where fewer than k rows are found, ids of -1 follow; an approximate search may find
            fewer than there are. values are differentiable in the queries.
        """
        queries = self._queries(queries)
        k = checks.integer("k", k, 0, 2**31 - 1)
        engine = self._engine if engine is None else checks.choice("engine", engine, given.ENGINES)
        out = None if exclude is None else self._excluded(exclude, len(queries))
        state, order = self._among(ids, where)
        many = k if out is None else k + out.shape[1]
        found = search.nearest(state, queries, many, self._metric, order, engine)
        return Neighbours(*(found if out is None else search.without(found, out, k, self._metric)))

    def _features(self, name: str, value: Any, rows: int | None = None) -> Tensor:
        features = given.features(name, value, self.dim, self.dtype, self.device)
        if rows is not None and len(features) != rows:
            raise ValueError(f"{name}: expected (n, dim) = ({rows}, {self.dim}), given {tuple(features.shape)}")
        return features

    def _queries(self, value: Any) -> Tensor:
        checks.dtype_in("queries", checks.tensor("queries", value), checks.FLOAT_DTYPES)
        if value.dim() != 2 or value.shape[1] != self.dim:
            raise ValueError(f"queries: expected (queries, dim) with dim = {self.dim}, given {tuple(value.shape)}")
        if value.device != self.device:
            raise ValueError(f"queries: expected device {self.device} like the index, given {value.device}")
        queries: Tensor = value.float() if value.dtype == torch.float64 else value
        if checks.reads_values(queries) and not bool((finite := queries.detach().isfinite().all(1)).all()):
            raise ValueError(f"queries: expected finite numbers, given others in row {int((~finite).nonzero()[0])}")
        return queries

    def _excluded(self, value: Any, queries: int) -> Tensor:
        """``(queries, n)``; what excludes nobody takes no place among what is found."""
        exclude = given.some_ids("exclude", value)
        if exclude.dim() not in (1, 2) or len(exclude) != queries:
            raise ValueError(
                f"exclude: expected (queries,) or (queries, n) with queries = {queries}, given {tuple(exclude.shape)}"
            )
        exclude = exclude.reshape(queries, exclude.numel() // max(1, queries))
        # Of nothing found the id is -1 too.
        return torch.where(exclude < 0, -2, exclude).to(self.device)

    def _among(self, ids: Any, where: Any) -> tuple[State, Tensor | None]:
        """The state to search, and the numbers of the rows that can be found, or None for all."""
        order = None
        if ids is None:
            state = self._store.state
        else:
            chosen = given.ids("ids", ids)
            state, order = self._store.find(chosen)
            given.there("ids", chosen, order)
        if where is not None:
            holds = given.condition("where", where)
            order = state.order() if order is None else order
            order = order[torch.tensor([holds(text) for text in state.texts(order)], dtype=torch.bool, device="cpu")]
        return state, None if order is None else order.sort().values

    def select(self, where: Where) -> Tensor:
        """The ids ``(n,)`` of the rows whose metadata is as ``where`` says (see :meth:`search`), increasing."""
        state, order = self._among(None, where)
        assert order is not None
        return state.ids(order).sort().values

    def metadata(self, ids: Tensor | Sequence[int] | int) -> Any:
        """The metadata of rows by their ids: of one id a value, of a tensor of ids lists as deep as it has dimensions.
        None for -1, which is the id of nothing found."""
        wanted = given.some_ids("ids", ids)
        state, order = self._find_or_nothing(wanted)
        texts = state.texts(order)
        return nested([given.untexted(text) for text in texts], wanted.shape)

    def features(self, ids: Tensor | Sequence[int]) -> Tensor:
        """The features of rows by their ids, ``(..., dim)`` for ids ``(...)``, as they are in the index; 0 for -1,
        which is the id of nothing found."""
        wanted = given.some_ids("ids", ids)
        state, order = self._find_or_nothing(wanted)
        features = torch.zeros(len(order), self.dim, dtype=self.dtype, device=self.device)
        found = order >= 0
        features[found.to(self.device)] = state.features(order[found])
        return features.view(*wanted.shape, self.dim)

    def _find_or_nothing(self, wanted: Tensor) -> tuple[State, Tensor]:
        flat = wanted.reshape(-1)
        state, order = self._store.find(flat)
        given.there("ids", flat[flat != -1], order[flat != -1])
        return state, order

    def refresh(self, encode: Encode, *, batch_size: int = 1024, wait: bool = True) -> Future[int]:
        """Replaces the features of all rows at once by those that ``encode`` makes, as a model that has been trained on
        makes them, while the index can be searched and changed.

        Args:
            encode: ``encode(ids, metadata)`` gives features ``(n, dim)`` for n rows: ids ``(n,)``, metadata a list.
                Called without gradients; with ``wait=False`` by another thread.
            batch_size: the most rows that it is given at a time.
            wait: return when that is done, and raise what ``encode`` raised; or at once.

        Returns:
            A ``concurrent.futures.Future`` of how many rows have other features now: ``done()``, ``result()``, which
            raises what ``encode`` raised.

        Until all are made searches find the old features, and afterwards the new ones; where ``encode`` fails they stay
        the old ones. Rows that are added or updated meanwhile keep what they were given, those that are removed stay
        away. The new features are in memory beside the old ones until then, those of a mapped file too. What was built
        for faiss is built anew.

        Raises:
            RuntimeError: another refresh or a build has not ended.
        """
        if not callable(encode):
            raise TypeError(f"encode: expected a function of ids and metadata, given {checks.describe(encode)}")
        batch = checks.integer("batch_size", batch_size, 1)
        checks.flag("wait", wait)
        if not self._renewal.acquire(blocking=False):
            raise RuntimeError("refresh: the features are being made anew or built already; wait for that to end")
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()

        def run() -> None:
            try:
                with torch.no_grad(), self._store.held() as (state, until):
                    count = self._store.put(self._made_anew(state, until, encode, batch))
            except BaseException as error:
                self._renewal.release()
                done.set_exception(error)
            else:
                self._renewal.release()
                done.set_result(count)

        if wait:
            run()
            done.result()
        else:
            threading.Thread(target=run, name="velm_kernels refresh").start()
        return done

    def _made_anew(self, state: State, until: int, encode: Encode, batch: int) -> State:
        def make(rows: Rows) -> Tensor:
            made = encode(rows.ids, [given.untexted(text) for text in rows.texts])
            return self._features("what encode returned", made, len(rows))

        made, near = self._store.made_anew(state, make, batch), state.approximate
        if near is None or not state.size:
            return replace(made, approximate=None)
        return replace(made, approximate=near.again(made, until))

    def build(self, factory: str | None = None, *, nprobe: int = 16, ef_search: int = 64) -> None:
        """Builds what the engine ``"faiss"`` searches, from the rows that are there. Searches and changes go on
        meanwhile; rows that come later are searched exactly, until the next call, and removed rows are not found.

        Args:
            factory: as ``faiss.index_factory`` takes it, beginning with ``IVF`` or ``HNSW``: ``"IVF4096,Flat"``,
                ``"HNSW32,SQfp16"``, ``"IVF4096,PQ64"`` (where codes are compared with less precision than features, as
                of PQ and SQbf16, four times as many candidates are compared by their features). None: ``IVF`` with
                about ``4 sqrt(rows)`` lists and the dtype of the index.
            nprobe: how many lists of an ``IVF`` a search looks through: more finds more and takes longer.
            ef_search: how many candidates a search of ``HNSW`` keeps.

        Raises:
            RuntimeError: a refresh or another build has not ended.
        """
        from velm_kernels.retrieval import approximate

        checks.integer("nprobe", nprobe, 1, 2**31 - 1)
        checks.integer("ef_search", ef_search, 1, 2**31 - 1)
        if self.device.type != "cpu":
            raise ValueError(f"build: expected an index on the CPU, where faiss searches, given one on {self.device}")
        if factory is not None and not (isinstance(factory, str) and factory.startswith(("IVF", "HNSW"))):
            raise ValueError(
                f"factory: expected a string that begins with IVF or HNSW, given {checks.describe(factory)}"
            )
        if not self._renewal.acquire(blocking=False):
            raise RuntimeError("build: the features are being made anew or built already; wait for that to end")
        try:
            with self._store.held() as (state, until):
                if not state.size:
                    raise ValueError("build: expected rows in the index, and there are none")
                near = approximate.build(state, self._metric, factory, nprobe, ef_search, until)
            self._store.put_approximate(near)
        finally:
            self._renewal.release()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to the file ``path``, in the format of safetensors. It is written aside in the same folder,
        and takes its name when all of it is on the disk: a process that is killed at any moment leaves the index that
        was there or this one, whole, and whoever has mapped the old one keeps it."""
        from velm_kernels.retrieval import stored

        # A later id than what was there when the state was taken does no harm.
        state, next_id = self._store.state, self._next_id
        stored.write(path, state, self._metric, next_id)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        memory_map: bool = True,
        *,
        metric: str | None = None,
        device: torch.device | str | None = None,
        engine: str | None = None,
    ) -> ImageTextIndex:
        """Reads an index from a file.

        Args:
            path: what :meth:`save` has written.
            memory_map: leave features and metadata in the file, from which the system reads what a search needs: the
                index may be larger than memory, and processes share it. Additions are in memory. Otherwise all is
                read, and features are compared with their checksum.
            metric: that the file is expected to have; None: whichever it has.
            device: of the features; elsewhere than on the CPU they are read.
            engine: ``"exact"``, or ``"faiss"`` with what was built when it was saved. None: ``"faiss"`` if something
                was. faiss reads its part with less suspicion than safetensors does: of a file that is not to be trusted
                ask for ``"exact"``, which does not read it.
        """
        from velm_kernels.retrieval import stored

        checks.flag("memory_map", memory_map)
        checks.choice("metric", metric, given.METRICS, or_none=True)
        checks.choice("engine", engine, given.ENGINES, or_none=True)
        where = torch.empty(0, device="cpu" if device is None else device).device
        found = stored.read(path, memory_map, where, engine != "exact" and where.type == "cpu")
        if metric not in (None, found.metric):
            raise ValueError(f"metric: expected {found.metric!r} like {os.fspath(path)}, given {metric!r}")
        index = cls.__new__(cls)
        engine = engine or ("faiss" if found.near else "exact")
        index._begin(Store.of(found.segment, found.near), found.metric, engine, found.next_id)
        return index


def nested(values: list[Any], shape: Sequence[int]) -> Any:
    """A flat list as lists in lists of a shape."""
    if not shape:
        return values[0]
    if len(shape) == 1:
        return values
    size = len(values) // max(1, shape[0])
    return [nested(values[at * size : (at + 1) * size], shape[1:]) for at in range(shape[0])]
