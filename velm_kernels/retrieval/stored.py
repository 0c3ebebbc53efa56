"""An index as the contents of a file: which tensors stand for it, and what has to be true of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.retrieval import files, given
from velm_kernels.retrieval.files import Part, whole
from velm_kernels.retrieval.store import MappedTexts, Segment, State, lasting

# Rows that are written to a file at a time.
ROWS = 8192
NEAR = ("faiss", "faiss_rows")


@dataclass(frozen=True)
class Stored:
    """What a file says of an index: its rows, what was built for faiss, the id that comes next."""

    segment: Segment
    near: Any
    metric: str
    next_id: int
    facts: Any


def write(path: str | os.PathLike[str], state: State, metric: str, next_id: int, **facts: str) -> None:
    facts = {"metric": metric, "next_id": str(next_id), **facts, **near_facts(state)}
    files.write(path, facts, parts_of(state))


@lasting
def read(path: str | os.PathLike[str], memory_map: bool, device: torch.device, with_near: bool) -> Stored:
    contents, name = files.read(path, memory_map, () if with_near else NEAR), os.fspath(path)
    metric = contents.facts.get("metric", "")
    if metric not in given.METRICS:
        raise ValueError(f"{name}: expected one of the metrics {', '.join(given.METRICS)}, given {metric!r}")
    segment, next_id = segment_of(name, contents, device, memory_map and device.type == "cpu")
    near = near_of(name, contents, metric, segment) if NEAR[0] in contents.tensors else None
    return Stored(segment, near, metric, next_id, contents.facts)


def near_facts(state: State) -> dict[str, str]:
    near = state.approximate
    if near is None:
        return {}
    # Rows in a file are numbered from 0 on.
    until = int(torch.searchsorted(state.order(), near.until))
    told = {"until": until, **{name: getattr(near, name) for name in ("factory", "nprobe", "ef_search")}}
    return {"faiss": json.dumps(told)}


def parts_of(state: State) -> Iterator[Any]:
    """The tensors of a file: the rows that are there, and what was built for faiss."""
    order = state.order()
    features = state.segments[0].features
    offsets, at = torch.zeros(len(order) + 1, dtype=torch.int64, device="cpu"), 0
    for some in order.split(ROWS):
        lengths = torch.tensor([len(text) for text in state.texts(some)], dtype=torch.int64, device="cpu")
        offsets[at + 1 : at + 1 + len(some)] = lengths
        at += len(some)
    offsets = offsets.cumsum(0)

    def texts() -> Iterator[Tensor]:
        for some in order.split(ROWS):
            if joined := b"".join(state.texts(some)):
                yield torch.frombuffer(bytearray(joined), dtype=torch.uint8)

    shape = (len(order), features.shape[1])
    yield whole("ids", state.ids(order))
    yield whole("offsets", offsets)
    yield Part("features", features.dtype, shape, lambda: (state.features(some) for some in order.split(ROWS)))
    yield Part("metadata", torch.uint8, (int(offsets[-1]),), texts)
    if state.approximate:
        from velm_kernels.retrieval import approximate

        # By the rows of the file; -1 where the row is no longer there.
        rows = torch.searchsorted(order, state.approximate.order).clamp(max=max(0, len(order) - 1))
        if len(order):
            rows = torch.where(order[rows] == state.approximate.order, rows, -1)
        else:
            rows = torch.full_like(rows, -1)
        yield whole(NEAR[0], approximate.packed(state.approximate.index))
        yield whole(NEAR[1], rows)


def segment_of(path: str, found: Any, device: torch.device, mapped: bool) -> tuple[Segment, int]:
    """The rows of a file, and the id that comes next."""
    tensors, wrong = found.tensors, f"{path}: expected the index of "
    missing = [name for name in ("features", "ids", "offsets", "metadata") if name not in tensors]
    if missing:
        raise ValueError(f"{wrong}features, ids, offsets and metadata, given none of {', '.join(missing)}")
    features, ids, offsets, blob = (tensors[name] for name in ("features", "ids", "offsets", "metadata"))
    if features.dim() != 2 or features.shape[1] < 1 or features.dtype not in given.DTYPES:
        raise ValueError(f"{wrong}features (rows, dim), given {checks.describe(features)}")
    rows = len(features)
    if ids.dtype != torch.int64 or ids.shape != (rows,):
        raise ValueError(f"{wrong}an id for each of {rows} rows, given {checks.describe(ids)}")
    given.ids(f"{path}: ids", ids)
    if offsets.dtype != torch.int64 or offsets.shape != (rows + 1,) or blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"{wrong}metadata for each of {rows} rows, given {checks.describe(offsets)} of it")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(blob) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{wrong}metadata one after the other in {len(blob)} bytes, given other offsets")
    next_id = found.facts.get("next_id", "")
    if not next_id.isdecimal() or (rows and int(next_id) <= int(ids.max())):
        raise ValueError(f"{wrong}the id that comes next, above all others, given {next_id!r}")
    order = torch.arange(rows, device="cpu")
    texts = MappedTexts(blob, offsets)
    return Segment(features.to(device), ids.to(device), order, texts, rows, mapped=mapped), int(next_id)


def near_of(path: str, found: Any, metric: str, segment: Segment) -> Any:
    """What was built for faiss."""
    from velm_kernels.retrieval import approximate

    packed, rows = (found.tensors.get(name) for name in NEAR)
    try:
        told = json.loads(found.facts["faiss"])
        numbers = {name: int(told[name]) for name in ("until", "nprobe", "ef_search")}
        settings = {"metric": metric, "factory": str(told["factory"]), **numbers}
        if rows is None or rows.dtype != torch.int64 or (len(rows) and int(rows.max()) >= numbers["until"]):
            raise ValueError("rows")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected what was built for faiss with its settings, given others ({error})"
        ) from None
    near = approximate.unpacked(path, packed, rows, settings)
    if near.index.ntotal != len(rows) or near.index.d != segment.features.shape[1]:
        raise ValueError(
            f"{path}: expected {len(rows)} rows of {segment.features.shape[1]} in what was built for faiss, given "
            f"{near.index.ntotal} of {near.index.d}"
        )
    return near
