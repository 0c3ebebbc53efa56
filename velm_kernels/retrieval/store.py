"""The rows of an index in memory, or in a file that is mapped into it.

What searches read is a :class:`State` that never changes: whoever adds, removes or replaces rows makes another one of
it and puts that in its place. Inside of a store a row is known by a number that counts rows as they come (``order``):
it is found by bisection, and stays the same where rows move.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from velm_kernels.retrieval.places import Places

# The fewest rows that memory is taken for, and whose dead ones are worth taking out.
LEAST = 256


class MappedTexts(Sequence[bytes]):
    """Bytes of every row, one after the other: ``blob (bytes,)``, row i from ``offsets[i]`` to ``offsets[i + 1]``."""

    def __init__(self, blob: Tensor, offsets: Tensor) -> None:
        self._blob, self._offsets = blob, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        start, stop = self._offsets[row : row + 2].tolist()
        return ctypes.string_at(self._blob.data_ptr() + start, stop - start)


F = TypeVar("F", bound=Callable[..., Any])


def lasting(function: F) -> F:
    """What is kept is made outside of inference mode, or it could neither be written on nor have a part in a gradient
    later."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, outside)


@dataclass(frozen=True)
class Rows:
    """Rows on their way into a store or out of one: ``features (rows, dim)``, ``ids (rows,)`` on the CPU, and the
    metadata of each as JSON, nothing where there is none."""

    features: Tensor
    ids: Tensor
    texts: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Segment:
    """Rows that lie one after the other, in the order in which they came.

    Attributes:
        features: ``(capacity, dim)``; ids: ``(capacity,)``; order: ``(capacity,)``, on the CPU. What is behind
            ``count`` is free.
        texts: the metadata of each row.
        live: ``(count or fewer,)`` on the CPU, which rows are still there; those behind its end are. None: all.
        dead: how many are not.
        mapped: lies in a file, and stays as it is.
    """

    features: Tensor
    ids: Tensor
    order: Tensor
    texts: Sequence[bytes]
    count: int
    live: Tensor | None = None
    dead: int = 0
    mapped: bool = False

    def mask(self) -> Tensor | None:
        """``(count,)``, which rows are there, or None for all."""
        if self.live is None or len(self.live) == self.count:
            return self.live
        return torch.cat((self.live, self.live.new_ones(self.count - len(self.live))))

    def rows(self) -> Tensor:
        """The numbers of the rows that are there."""
        mask = self.mask()
        return torch.arange(self.count, device="cpu") if mask is None else mask.nonzero().flatten()

    def find(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """``(which of order are here, in which rows)``, those that are no longer there among them."""
        if not self.count:
            return (none := order.new_empty(0)), none
        at = torch.searchsorted(self.order[: self.count], order).clamp(max=self.count - 1)
        here = (self.order[at] == order).nonzero().flatten()
        return here, at[here]

    def without(self, rows: Tensor) -> Segment:
        mask = self.mask()
        live = torch.ones(self.count, dtype=torch.bool, device="cpu") if mask is None else mask.clone()
        live[rows] = False
        return replace(self, live=live, dead=self.dead + len(rows))

    def take(self, rows: Tensor) -> Rows:
        at = rows.to(self.features.device)
        return Rows(self.features[at], self.ids[at].cpu(), [self.texts[row] for row in rows.tolist()])


@dataclass(frozen=True)
class State:
    """An index at one moment.

    Attributes:
        segments: of rows, which came in the order of the segments.
        size: how many rows are there.
        approximate: what searches faster (:class:`velm_kernels.retrieval.approximate.Approximate`), if it was built.
    """

    segments: tuple[Segment, ...]
    size: int = 0
    approximate: Any = None

    def order(self) -> Tensor:
        """The numbers of all rows that are there, increasing."""
        return torch.cat([segment.order[segment.rows()] for segment in self.segments])

    def features(self, order: Tensor) -> Tensor:
        """``(rows, dim)``, of the rows of these numbers."""
        first = self.segments[0].features
        features = first.new_empty((len(order), first.shape[1]))
        for segment in self.segments:
            here, rows = segment.find(order)
            features[here.to(first.device)] = segment.features[rows.to(first.device)]
        return features

    def ids(self, order: Tensor) -> Tensor:
        """On the CPU."""
        ids = torch.empty_like(order)
        for segment in self.segments:
            here, rows = segment.find(order)
            ids[here] = segment.ids[rows.to(segment.ids.device)].cpu()
        return ids

    def texts(self, order: Tensor) -> list[bytes]:
        """The metadata of the rows of these numbers, nothing for -1."""
        texts = [b""] * len(order)
        for segment in self.segments:
            for at, row in zip(*(one.tolist() for one in segment.find(order))):
                texts[at] = segment.texts[row]
        return texts


class Store:
    """The state of an index, and everything that changes it. Changes wait for each other; who reads takes ``state``."""

    @lasting
    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim, self.dtype, self.device = dim, dtype, device
        self.lock = threading.RLock()
        self.state = State((self._segment(),))
        self._places = Places(*torch.empty(2, 0, dtype=torch.int64, device="cpu"))
        self._next = 0
        # While others compute with the rows of segments these stay where they are.
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: a copy is one of the rows."""
        with self.lock:
            return {**self.__dict__, "lock": None, "_held": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    @classmethod
    @lasting
    def of(cls, segment: Segment, near: Any = None) -> Store:
        """A store of rows that are there already, with what searches them faster."""
        features = segment.features
        store = cls(features.shape[1], features.dtype, features.device)
        store.state = State((segment, store._segment()), segment.count, near)
        store._places = Places(segment.ids.cpu(), segment.order)
        store._next = segment.count
        return store

    def _segment(self, capacity: int = 0) -> Segment:
        features = torch.empty(capacity, self.dim, dtype=self.dtype, device=self.device)
        ids = torch.empty(capacity, dtype=torch.int64, device=self.device)
        return Segment(features, ids, torch.empty(capacity, dtype=torch.int64, device="cpu"), [], 0)

    def find(self, ids: Tensor) -> tuple[State, Tensor]:
        """The state, and in it the numbers of the rows of ``ids``; -1 where there is none."""
        with self.lock:
            return self.state, self._places.find(ids)

    @lasting
    def append(self, rows: Rows) -> None:
        with self.lock:
            order = self._numbers(len(rows))
            state = self._with(self.state, rows, order)
            self._places.put(rows.ids, order)
            self.state = state

    @lasting
    def remove(self, ids: Tensor) -> None:
        """Takes out rows that are there."""
        with self.lock:
            order = self._places.find(ids)
            self.state = self._without(self.state, order)
            self._places.put(ids, torch.full_like(ids, -1))
            self._compact()

    @lasting
    def update(self, rows: Rows) -> None:
        """Puts rows in the places of those that have their ids, in one step."""
        with self.lock:
            order = self._numbers(len(rows))
            state = self._with(self._without(self.state, self._places.find(rows.ids)), rows, order)
            self._places.put(rows.ids, order)
            self.state = state
            self._compact()

    def _numbers(self, count: int) -> Tensor:
        first, self._next = self._next, self._next + count
        return torch.arange(first, first + count, device="cpu")

    def _with(self, state: State, rows: Rows, order: Tensor) -> State:
        last = self._longer(state.segments[-1], rows, order)
        return replace(state, segments=(*state.segments[:-1], last), size=state.size + len(rows))

    def _longer(self, segment: Segment, rows: Rows, order: Tensor) -> Segment:
        """What is behind ``count`` nobody reads yet; where it is too little, twice as much is taken."""
        count = segment.count + len(rows)
        if count > len(segment.ids):
            larger = self._segment(max(LEAST, count, 2 * segment.count))
            for name in ("features", "ids", "order"):
                getattr(larger, name)[: segment.count] = getattr(segment, name)[: segment.count]
            segment = replace(segment, features=larger.features, ids=larger.ids, order=larger.order)
        new = slice(segment.count, count)
        segment.features[new], segment.ids[new], segment.order[new] = rows.features, rows.ids, order
        # Of a list, too, only the first `count` are read. More are there where an addition failed half way.
        texts = segment.texts if isinstance(segment.texts, list) else list(segment.texts)
        texts[segment.count :] = rows.texts
        return replace(segment, texts=texts, count=count)

    def _without(self, state: State, order: Tensor) -> State:
        segments = []
        for segment in state.segments:
            _, rows = segment.find(order)
            segments.append(segment.without(rows) if len(rows) else segment)
        near = state.approximate and state.approximate.without(order)
        return replace(state, segments=tuple(segments), size=state.size - len(order), approximate=near)

    def _compact(self) -> None:
        """Segments of which more than half is dead are written anew, so that what removal costs is spread over it."""
        if self._held:
            return

        def compact(segment: Segment) -> Segment:
            if segment.mapped or segment.count < LEAST or 2 * segment.dead <= segment.count:
                return segment
            rows = segment.rows()
            return self._longer(self._segment(), segment.take(rows), segment.order[rows])

        self.state = replace(self.state, segments=tuple(map(compact, self.state.segments)))

    @contextlib.contextmanager
    def held(self) -> Iterator[tuple[State, int]]:
        """The state now, and the number of the row that comes next. As long as this lasts, the rows of its segments
        stay in the places that they have."""
        with self.lock:
            self._held += 1
            now = self.state, self._next
        try:
            yield now
        finally:
            with self.lock:
                self._held -= 1
                self._compact()

    @lasting
    def put_approximate(self, near: Any) -> None:
        """What was built of an earlier state, without the rows that have gone since."""
        with self.lock:
            gone = near.order[~torch.isin(near.order, self.state.order())]
            self.state = replace(self.state, approximate=near.without(gone) if len(gone) else near)

    @lasting
    def made_anew(self, state: State, make: Callable[[Rows], Tensor], batch: int) -> State:
        """The state with other features, which ``make(rows)`` gives for ``batch`` rows at a time."""
        segments = []
        for segment in state.segments:
            features = torch.zeros_like(segment.features)
            for rows in segment.rows().split(batch) if segment.count > segment.dead else ():
                features[rows.to(self.device)] = make(segment.take(rows))
            segments.append(replace(segment, features=features, mapped=False))
        return replace(state, segments=tuple(segments))

    @lasting
    def put(self, made: State) -> int:
        """All of what was made anew takes its place at once; rows that came since keep what they have, and those that
        went stay away. Returns how many rows are other ones now. Only while the state that it was made of is held."""
        with self.lock:
            now, segments = self.state, []
            for new, current in zip(made.segments, now.segments):
                features, since = new.features, slice(new.count, current.count)
                if len(features) < len(current.features):
                    features = torch.empty_like(current.features)
                    features[: new.count] = new.features[: new.count]
                features[since] = current.features[since]
                segments.append(replace(current, features=features, mapped=False))
            before = made.order()
            stayed = torch.isin(before, now.order(), assume_unique=True)
            near = made.approximate and made.approximate.without(before[~stayed])
            self.state = replace(now, segments=tuple(segments), approximate=near)
            return int(stayed.sum())
