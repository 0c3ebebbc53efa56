"""Approximate search by faiss, which is imported when it is first used."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from velm_kernels.retrieval.search import Found, worst
from velm_kernels.retrieval.store import State, lasting
from velm_kernels.retrieval.topk_similarity.reference import LEAST_NORM, similarity

# Rows that are handed over at a time, and numbers that are gathered at a time.
ROWS, NUMBERS = 65536, 1 << 24
# How many more candidates are looked at where codes are compared with less precision than features are: of SQbf16 faiss
# rounds queries to bfloat16 on processors that multiply it.
MORE, PRECISE = 4, ("Flat", "SQfp16")
CODES = {torch.float32: "Flat", torch.float16: "SQfp16", torch.bfloat16: "SQbf16"}


def library() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "engine: 'faiss' needs the package faiss-cpu, pip install 'velm_kernels[faiss]'; 'exact' needs none"
        ) from error
    return faiss


@dataclass(frozen=True)
class Approximate:
    """An index of faiss of the rows that an index had at one moment; it is never changed.

    Attributes:
        index: of faiss, which knows rows by their place here.
        order: ``(rows,)``, their numbers in the store.
        until: rows with this number and later ones are not in it.
        alive: ``(rows,)``, which are still there, or None for all.
        factory: what ``index`` was made by; nprobe, ef_search: how far it looks.
    """

    index: Any
    order: Tensor
    until: int
    metric: str
    factory: str
    nprobe: int
    ef_search: int
    alive: Tensor | None = None

    def without(self, order: Tensor) -> Approximate:
        """Rows that are no longer there are not found from now on."""
        places = self._places(order)
        alive = (
            torch.ones(len(self.order), dtype=torch.bool, device="cpu") if self.alive is None else self.alive.clone()
        )
        alive[places] = False
        return replace(self, alive=alive)

    def again(self, state: State, until: int) -> Approximate:
        """The same of another state."""
        return build(state, self.metric, self.factory, self.nprobe, self.ef_search, until)

    def _places(self, order: Tensor) -> Tensor:
        if not len(self.order):
            return order[:0]
        at = torch.searchsorted(self.order, order).clamp(max=len(self.order) - 1)
        return at[self.order[at] == order]

    def search(self, state: State, queries: Tensor, k: int, order: Tensor | None) -> Found:
        """``(values, ids)``, at most ``(queries, k)``, in no order; values are computed from the features of the rows
        that were found."""
        many = k if self.factory.rpartition(",")[2] in PRECISE else MORE * k
        many = min(many, len(self.order))
        if not many or not len(queries):
            return queries.new_empty((len(queries), 0)).float(), torch.empty(
                len(queries), 0, dtype=torch.int64, device="cpu"
            )
        rows = _rows(queries.detach(), self.metric)
        _, places = self.index.search(rows, many, params=self._parameters(order, many))
        places = torch.from_numpy(places)
        numbers = torch.where(places < 0, -1, self.order[places.clamp(min=0)])
        values, ids = [], []
        for some, number in zip(queries.split(step := self._step(many)), numbers.split(step)):
            chosen, is_nothing = number.reshape(-1), number < 0
            features = state.features(chosen).view(*number.shape, -1).float()
            features = features.masked_fill(is_nothing[..., None], 0.0)
            found = similarity(some.float()[:, None], features, self.metric)
            values.append(found.masked_fill(is_nothing, worst(self.metric)))
            ids.append(torch.where(is_nothing, -1, state.ids(chosen).view(number.shape)))
        return torch.cat(values), torch.cat(ids)

    def _step(self, many: int) -> int:
        return max(1, NUMBERS // (many * self.index.d))

    def _parameters(self, order: Tensor | None, many: int) -> Any:
        faiss = library()
        chosen = self.alive
        if order is not None:
            chosen = torch.zeros(len(self.order), dtype=torch.bool, device="cpu")
            chosen[self._places(order)] = True
            chosen = chosen if self.alive is None else chosen & self.alive
        if self.factory.startswith("IVF"):
            parameters = faiss.SearchParametersIVF(nprobe=self.nprobe)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, many))
        if chosen is not None:
            parameters.sel = _selector(chosen)
        return parameters


def _selector(chosen: Tensor) -> Any:
    import numpy

    # The selector keeps the array, whose bits faiss reads where they are.
    return library().IDSelectorBitmap(numpy.packbits(chosen.numpy(), bitorder="little"))


def _rows(features: Tensor, metric: str) -> Any:
    """As faiss takes them: float32, and of norm 1 where their products are cosines."""
    rows = features.float()
    if metric == "cosine":
        rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=LEAST_NORM)
    return rows.contiguous().numpy()


def usual(rows: int, dtype: torch.dtype) -> str:
    """About ``4 sqrt(rows)`` lists, as faiss advises up to some millions, of at least 39 rows each."""
    return f"IVF{max(1, min(int(4 * math.sqrt(rows)), rows // 39))},{CODES[dtype]}"


@lasting
def build(state: State, metric: str, factory: str | None, nprobe: int, ef_search: int, until: int) -> Approximate:
    """The rows that are there; their features are read twice, some at a time."""
    faiss = library()
    order = state.order()
    features = state.segments[0].features
    factory = factory or usual(len(order), features.dtype)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(features.shape[1], factory, kind)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"factory: expected what faiss.index_factory makes, given {factory!r} ({reason})") from None
    if not index.is_trained:
        some = torch.randperm(len(order), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        some = some[: 256 * max(getattr(index, "nlist", 1), 256)].sort().values
        try:
            index.train(_rows(state.features(order[some]), metric))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"factory: {factory!r} cannot be trained by {len(order)} rows ({reason})") from None
    for numbers in order.split(ROWS):
        index.add(_rows(state.features(numbers), metric))
    return Approximate(index, order, until, metric, factory, nprobe, ef_search)


def packed(index: Any) -> Tensor:
    """The bytes of an index of faiss."""
    return torch.from_numpy(library().serialize_index(index))


def unpacked(path: str, packed: Tensor, rows: Tensor, settings: dict[str, Any]) -> Approximate:
    """What :func:`packed` has made, of ``rows`` by their numbers, -1 where one is no longer there."""
    try:
        index = library().deserialize_index(packed.numpy())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path}: what was built for faiss cannot be read: {reason}") from None
    alive = rows >= 0
    # As those before them, so that numbers never decrease: the first of equal ones is found.
    order = rows.cummax(0).values if len(rows) else rows
    near = Approximate(index, order, **settings)
    return near if bool(alive.all()) else replace(near, alive=alive)
