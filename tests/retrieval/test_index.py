"""ImageTextIndex: what is found, what is changed, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from velm_kernels import ImageTextIndex
from velm_kernels.retrieval import search, store
from velm_kernels.retrieval.places import Places

pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. topk_similarity runs on plain torch")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def features(rows: int, dim: int = 8, seed: int = 0) -> Tensor:
    """Small whole numbers: many values are equal, and all are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (rows, dim), generator=generator).float()


def nearest(rows: dict[int, Tensor], queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """By sorting what a double loop computes in float64: the written meaning of a search."""
    values = torch.full((len(queries), k), torch.inf if metric == "l2" else -torch.inf, dtype=torch.float64)
    ids = torch.full((len(queries), k), -1)
    for at, query in enumerate(queries.double()):
        scored = []
        for id_, row in rows.items():
            row = row.double()
            if metric == "l2":
                scored.append((float((query - row).square().sum()), id_))
            else:
                norms = float(query.norm() * row.norm()) if metric == "cosine" else 1.0
                scored.append((-float(query @ row) / max(norms, 1e-300), id_))
        for place, (score, id_) in enumerate(sorted(scored)[:k]):
            values[at, place], ids[at, place] = score if metric == "l2" else -score, id_
    return values, ids


def from_dict(made: dict[int, Tensor]) -> Callable[[Tensor, Any], Tensor]:
    return lambda ids, _: torch.stack([made[id_] for id_ in ids.tolist()])


def same(found: Any, wanted: tuple[Tensor, Tensor]) -> None:
    assert found.ids.tolist() == wanted[1].tolist()
    torch.testing.assert_close(found.values.double(), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finds_what_a_loop_finds(metric: str, dtype: torch.dtype) -> None:
    """Ids in no order, equal values among them, in all dtypes."""
    ids = torch.randperm(300) * 3
    index = ImageTextIndex(8, metric=metric, dtype=dtype)
    index.add(features(300), ids)
    rows = dict(zip(ids.tolist(), features(300)))
    queries = features(5, seed=1)
    same(index.search(queries, 20), nearest(rows, queries, 20, metric))
    assert index.dtype == dtype and index.features([int(ids[3])]).dtype == dtype


def test_cosine_divides_by_norms() -> None:
    index = ImageTextIndex(8)
    rows = torch.randn(50, 8) * torch.logspace(-3, 3, 50)[:, None]
    index.add(rows)
    queries = torch.randn(4, 8)
    same(index.search(queries, 9), nearest(dict(enumerate(rows)), queries, 9, "cosine"))


@given(st.data())
def test_any_sequence_of_changes(data: st.DataObject) -> None:
    """Beside a dict: additions with and without ids, removals, updates, refreshes, segments; searches among some."""
    metric = data.draw(st.sampled_from(["dot", "l2"]))
    index, rows, notes = ImageTextIndex(4, metric=metric), {}, {}
    next_id = 0
    for seed, step in enumerate(data.draw(st.lists(st.sampled_from("aAruUfm"), min_size=1, max_size=12)), 1):
        some = data.draw(st.lists(st.sampled_from(sorted(rows)), unique=True, max_size=40)) if rows else []
        count = data.draw(st.sampled_from([0, 1, 7, 300]))
        new = features(count, 4, seed)
        if step in "aA":
            ids = None if step == "a" else [next_id + 2 * i for i in reversed(range(count))]
            texts = [{"step": seed % 3} for _ in range(count)]
            added = index.add(new, ids, texts).tolist()
            assert added == (list(range(next_id, next_id + count)) if ids is None else ids)
            rows.update(zip(added, new))
            notes.update(zip(added, texts))
            next_id = max([next_id, *(id_ + 1 for id_ in added)])
        elif step == "r":
            some = sorted(rows)[: len(rows) * 2 // 3] if count == 300 else some
            index.remove(some)
            for id_ in some:
                del rows[id_], notes[id_]
        elif step == "u":
            new = features(len(some), 4, seed)
            index.update(some, new)
            rows.update(zip(some, new))
        elif step == "U":
            index.update(some, metadata=[None] * len(some))
            notes.update(dict.fromkeys(some))
        elif step == "f":
            made = {id_: features(1, 4, id_ + seed)[0] for id_ in rows}
            assert index.refresh(from_dict(made), batch_size=50).result() == len(rows)
            rows.update(made)
        elif step == "m" and rows:
            index._store.state = _split(index._store.state)
    queries = features(3, 4, 99)
    same(index.search(queries, 6), nearest(rows, queries, 6, metric))
    among = sorted(rows)[::3]
    same(index.search(queries, 6, ids=among), nearest({id_: rows[id_] for id_ in among}, queries, 6, metric))
    by_note = {id_: row for id_, row in rows.items() if (notes[id_] or {}).get("step") in (0, 2)}
    same(index.search(queries, 6, where={"step": [0, 2]}), nearest(by_note, queries, 6, metric))
    assert index.select({"step": [0, 2]}).tolist() == sorted(by_note)
    assert sorted(index.ids.tolist()) == sorted(rows) and len(index) == len(rows)
    assert index.metadata(sorted(rows)) == [notes[id_] for id_ in sorted(rows)]
    if rows:
        assert torch.equal(index.features(sorted(rows)), torch.stack([rows[id_] for id_ in sorted(rows)]))


def _split(state: store.State) -> store.State:
    """The same rows in one more segment, as after a file was mapped."""
    last = state.segments[-1]
    half = last.count // 2
    if last.live is not None or not half:
        return state
    parts = [
        store.Segment(last.features[rows].clone(), last.ids[rows].clone(), last.order[rows].clone(), texts, len(texts))
        for rows in (slice(half), slice(half, last.count))
        if (texts := list(last.texts[rows])) is not None
    ]
    return store.State((*state.segments[:-1], *parts), state.size, state.approximate)


def test_removed_rows_are_unread_and_their_memory_comes_back() -> None:
    index = ImageTextIndex(4, metric="dot")
    index.add(features(2000, 4))
    index._store.state.segments[0].features[:700] = torch.nan
    index.remove(range(700))
    assert not index.search(features(3, 4), 2000).values.isnan().any()
    index._store.state.segments[0].features[700:1400] = torch.nan
    index.remove(range(700, 1400))
    # More than half was dead.
    segment = index._store.state.segments[0]
    assert segment.count == segment.count - segment.dead == 600 and len(segment.features) == 600
    assert index.search(features(3, 4), 2000).ids.min(1).values.tolist() == [-1] * 3


def test_memory_grows_by_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    index, made = ImageTextIndex(4), []
    make = index._store._segment
    monkeypatch.setattr(index._store, "_segment", lambda capacity=0: made.append(capacity) or make(capacity))
    for at in range(3000):
        index.add(torch.ones(1, 4) * at)
    assert made == [256, 512, 1024, 2048, 4096]
    assert index.ids.tolist() == list(range(3000))


def test_places_after_many_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("velm_kernels.retrieval.places.FEW", 5)
    places, known = Places(*torch.empty(2, 0, dtype=torch.int64)), {}
    generator = torch.Generator().manual_seed(0)
    for at in range(300):
        ids = torch.randperm(60, generator=generator)[: at % 9] * 10**15
        new = torch.full_like(ids, -1) if at % 4 == 3 else torch.arange(len(ids)) + 100 * at
        places.put(ids, new)
        known.update(zip(ids.tolist(), new.tolist()))
        asked = torch.randperm(70, generator=generator) * 10**15
        assert places.find(asked).tolist() == [known.get(id_, -1) for id_ in asked.tolist()]


def test_fewer_rows_than_asked_for() -> None:
    index = ImageTextIndex(2, metric="l2")
    found = index.search(torch.ones(2, 2), 3)
    assert found.ids.tolist() == [[-1] * 3] * 2 and found.values.tolist() == [[torch.inf] * 3] * 2
    index.add(torch.eye(2), [5, 9])
    found = index.search(torch.tensor([[1.0, 0.0]]), 3)
    assert found.ids.tolist() == [[5, 9, -1]] and found.values.tolist() == [[0.0, 2.0, torch.inf]]
    assert index.metadata(found.ids) == [[None] * 3]
    assert index.features(found.ids).tolist() == [[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]
    assert index.search(torch.ones(0, 2), 3).ids.shape == (0, 3)
    assert index.search(torch.ones(2, 2), 0).ids.shape == (2, 0)


def test_each_query_without_some() -> None:
    index = ImageTextIndex(3, metric="dot")
    index.add(torch.tensor([[3.0, 0, 0], [2, 0, 0], [1, 0, 0]]))
    queries = torch.tensor([[1.0, 0, 0]] * 3)
    assert index.search(queries, 2, exclude=[0, 2, -1]).ids.tolist() == [[1, 2], [0, 1], [0, 1]]
    found = index.search(queries, 2, exclude=torch.tensor([[0, 1], [-1, 0], [0, 77]]))
    assert found.ids.tolist() == [[2, -1], [1, 2], [1, 2]]
    assert found.values.tolist() == [[1.0, -torch.inf], [2.0, 1.0], [2.0, 1.0]]


def test_values_are_differentiable_in_the_queries() -> None:
    index = ImageTextIndex(4, metric="dot")
    index.add(features(20, 4))
    index._store.state = _split(index._store.state)
    queries = torch.randn(3, 4, requires_grad=True)
    found = index.search(queries, 5, exclude=[2, 3, 4])
    found.values.sum().backward()
    torch.testing.assert_close(queries.grad, index.features(found.ids).sum(1))


def test_metadata_comes_back_as_json_gives_it() -> None:
    index = ImageTextIndex(2)
    given_ = {"caption": "ein Käfer \u2028 \U0001f41e", "box": (1, 2.5), "none": None, "deep": {"a": [True, []]}}
    index.add(torch.ones(4, 2), metadata=[given_, None, "text", 0])
    given_["caption"] = "changed later"
    wanted = {"caption": "ein Käfer \u2028 \U0001f41e", "box": [1, 2.5], "none": None, "deep": {"a": [True, []]}}
    assert index.metadata(torch.tensor([[0, 1], [2, 3]])) == [[wanted, None], ["text", 0]]
    assert index.metadata(2) == "text" and index.metadata(torch.empty(2, 0, dtype=torch.int64)) == [[], []]
    assert index.select(lambda text: text == 0).tolist() == [3]
    assert index.select({"none": None}).tolist() == [0]


REFUSED: list[tuple[str, Callable[[ImageTextIndex], Any], type[Exception], str]] = [
    (
        "width",
        lambda i: i.add(torch.ones(2, 5)),
        ValueError,
        r"features: expected \(n, dim\) with dim = 4, given \(2, 5\)",
    ),
    ("one row", lambda i: i.add(torch.ones(4)), ValueError, r"features: expected \(n, dim\).*given \(4,\)"),
    ("integers", lambda i: i.add(torch.ones(2, 4, dtype=torch.int64)), TypeError, "features: expected dtype"),
    ("no tensor", lambda i: i.add([[1.0] * 4]), TypeError, "features: expected a tensor, given list"),
    ("meta", lambda i: i.add(torch.ones(1, 4, device="meta")), ValueError, "features: expected device cpu"),
    ("NaN", lambda i: i.add(torch.tensor([[1.0] * 4, [0, torch.nan, 0, 0]])), ValueError, "given nan in row 1"),
    (
        "too large",
        lambda i: i.add(torch.full((1, 4), 1e39, dtype=torch.float64)),
        ValueError,
        "float32, given 1e.39 in row 0",
    ),
    ("known id", lambda i: i.add(torch.ones(2, 4), [7, 1]), ValueError, "ids: expected ids that are not in .*given 1$"),
    ("twice", lambda i: i.add(torch.ones(3, 4), [8, 7, 8]), ValueError, "ids: expected different ids, given 8 more"),
    ("negative", lambda i: i.add(torch.ones(1, 4), [-2]), ValueError, "ids: expected integers from 0 on, given -2"),
    (
        "too few ids",
        lambda i: i.add(torch.ones(2, 4), [7]),
        ValueError,
        r"ids: expected \(rows,\) = \(2,\), given \(1,\)",
    ),
    ("float ids", lambda i: i.add(torch.ones(1, 4), torch.ones(1)), TypeError, "ids: expected integers, given"),
    ("text ids", lambda i: i.add(torch.ones(2, 4), "ab"), TypeError, "ids: expected integers"),
    ("huge ids", lambda i: i.add(torch.ones(1, 4), [2**63]), TypeError, "ids: expected integers below 2.63"),
    (
        "metadata",
        lambda i: i.add(torch.ones(1, 4), metadata=[{1, 2}]),
        TypeError,
        r"metadata\[0\]: expected what JSON can hold, given set",
    ),
    ("NaN in it", lambda i: i.add(torch.ones(1, 4), metadata=[{"a": float("nan")}]), TypeError, r"metadata\[0\]"),
    (
        "too little",
        lambda i: i.add(torch.ones(2, 4), metadata=[{}]),
        ValueError,
        "metadata: expected 2 entries, one for each row, given 1",
    ),
    ("no list", lambda i: i.add(torch.ones(2, 4), metadata={"a": 1}), TypeError, "metadata: expected a list"),
    ("unknown", lambda i: i.remove([0, 11, 12]), ValueError, "ids: expected ids that are in the index, given 11, 12$"),
    ("removed twice", lambda i: i.remove([1, 1]), ValueError, "given 1 more than once"),
    ("unknown update", lambda i: i.update([9], torch.ones(1, 4)), ValueError, "ids: .*given 9$"),
    (
        "few updates",
        lambda i: i.update([0, 1], torch.ones(1, 4)),
        ValueError,
        r"features: expected \(n, dim\) = \(2, 4\), given \(1, 4\)",
    ),
    (
        "queries",
        lambda i: i.search(torch.ones(1, 3), 1),
        ValueError,
        r"queries: expected \(queries, dim\) with dim = 4, given \(1, 3\)",
    ),
    (
        "NaN query",
        lambda i: i.search(torch.full((1, 4), torch.nan), 1),
        ValueError,
        "queries: expected finite numbers, given others in row 0",
    ),
    ("k", lambda i: i.search(torch.ones(1, 4), -1), ValueError, "k: expected at least 0, given -1"),
    ("among unknown", lambda i: i.search(torch.ones(1, 4), 1, ids=[5]), ValueError, "ids: .*given 5$"),
    (
        "where",
        lambda i: i.search(torch.ones(1, 4), 1, where=3),
        TypeError,
        "where: expected values by key, or a function",
    ),
    (
        "exclude",
        lambda i: i.search(torch.ones(2, 4), 1, exclude=[1]),
        ValueError,
        r"exclude: expected \(queries,\).*given \(1,\)",
    ),
    (
        "engine",
        lambda i: i.search(torch.ones(1, 4), 1, engine="fast"),
        ValueError,
        "engine: expected one of exact, faiss",
    ),
    ("metadata of", lambda i: i.metadata([1, 44]), ValueError, "ids: .*given 44$"),
    ("features of", lambda i: i.features([-3]), ValueError, "ids: .*given -3$"),
    ("dim", lambda i: ImageTextIndex(0), ValueError, "dim: expected at least 1, given 0"),
    ("metric", lambda i: ImageTextIndex(4, metric="angle"), ValueError, "metric: expected one of dot, cosine, l2"),
    ("dtype", lambda i: ImageTextIndex(4, dtype=torch.float64), TypeError, "dtype: expected torch.float32"),
    ("encode", lambda i: i.refresh(3), TypeError, "encode: expected a function"),
    (
        "encoded",
        lambda i: i.refresh(lambda ids, _: torch.ones(1, 4)),
        ValueError,
        r"what encode returned: expected .*\(3, 4\), given \(1, 4\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "told"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_errors_say_what_was_wrong_and_change_nothing(
    call: Callable[[ImageTextIndex], Any], error: type[Exception], told: str
) -> None:
    index = ImageTextIndex(4)
    index.add(features(3, 4), metadata=[1, 2, 3])
    with pytest.raises(error, match=told):
        call(index)
    assert index.ids.tolist() == [0, 1, 2] and index.metadata([0, 1, 2]) == [1, 2, 3]
    assert torch.equal(index.features([0, 1, 2]), features(3, 4))
    assert index.add(torch.ones(1, 4)).tolist() == [3]


def test_no_ids_are_left() -> None:
    index = ImageTextIndex(1)
    index.add(torch.ones(1, 1), [2**63 - 1])
    with pytest.raises(ValueError, match="ids: expected to be given"):
        index.add(torch.ones(1, 1))
    assert index.search(torch.ones(1, 1), 1).ids.item() == 2**63 - 1


def test_searches_beside_changes_see_one_moment() -> None:
    """Rows come, are changed and go by groups of ten that have one value: a search finds whole groups alone."""
    index = ImageTextIndex(2, metric="dot")
    index.add(torch.full((10, 2), 1.0), range(10))
    stop, wrong = threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            values = index.search(torch.tensor([[1.0, 0.0]]), 40).values[0]
            counts = values[values.isfinite()].unique(return_counts=True)[1].tolist()
            if any(count % 10 for count in counts) or not counts:
                wrong.append(values.tolist())

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for at in range(1, 80):
            first = 10 * (at % 4) + 100
            group = range(first, first + 10)
            if first in index:
                index.remove(group)
            index.add(torch.full((10, 2), float(at)), group)
            index.update(group, torch.full((10, 2), at + 0.5))
            if at % 20 == 0:
                index.refresh(lambda ids, _: (ids // 10)[:, None].expand(-1, 2).float(), batch_size=7)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_what_a_search_has_begun_with_never_changes() -> None:
    """The states before each change find what they found, whatever comes after."""
    index, queries = ImageTextIndex(4, metric="dot"), features(5, 4, 1)
    seen = []

    def look() -> None:
        state = index._store.state
        seen.append((state, search.exact(state, queries, 30, "dot"), state.texts(state.order())))

    index.add(features(100, 4), metadata=list(range(100)))
    look()
    for change in (
        lambda: index.add(features(100, 4, 2)),
        lambda: index.remove(range(0, 100, 7)),
        lambda: index.remove(range(1, 100, 7)),
        lambda: index.update(range(2, 100, 7), features(14, 4, 3)),
        lambda: index.update(range(2, 100, 7), metadata=["new"] * 14),
        lambda: index.refresh(lambda ids, _: features(len(ids), 4, 4)),
        lambda: index.add(features(400, 4, 5), metadata=[0] * 400),
        lambda: index.remove(range(200, 550)),
        lambda: index.add(features(100, 4, 6)),
    ):
        change()
        look()
    for state, found, texts in seen:
        assert all(torch.equal(*both) for both in zip(search.exact(state, queries, 30, "dot"), found))
        assert state.texts(state.order()) == texts


def test_refresh_beside_changes() -> None:
    """The old features until all are made, and rows that change meanwhile keep what they were given."""
    index = ImageTextIndex(2, metric="dot")
    index.add(torch.ones(600, 2), metadata=[{"row": row} for row in range(600)])
    index.remove([3])
    begun, go_on = threading.Event(), threading.Event()

    def encode(ids: Tensor, metadata: list[Any]) -> Tensor:
        assert [one["row"] for one in metadata] == ids.tolist() and not torch.is_grad_enabled()
        begun.set()
        assert go_on.wait(30)
        return torch.stack((ids.float(), torch.zeros(len(ids))), 1)

    done = index.refresh(encode, batch_size=100, wait=False)
    assert begun.wait(30) and not done.done()
    with pytest.raises(RuntimeError, match="wait for that to end"):
        index.refresh(encode)
    index.add(torch.full((50, 2), 7.0), range(1000, 1050))
    index.update([5], torch.full((1, 2), 5.5))
    # More than half of all: nothing may move before the new features are in place.
    index.remove([*range(100, 500), 1001])
    assert torch.equal(index.features([8, 5, 1000]), torch.tensor([[1.0, 1.0], [5.5, 5.5], [7.0, 7.0]]))
    go_on.set()
    assert done.result(30) == 600 - 1 - 1 - 400
    assert torch.equal(index.features([8, 5, 1000]), torch.tensor([[8.0, 0.0], [5.5, 5.5], [7.0, 7.0]]))
    assert len(index) == 599 - 400 + 49
    assert index.search(torch.tensor([[1.0, 0.0]]), 3).ids.tolist() == [[599, 598, 597]]
    # Memory of what went meanwhile comes back.
    assert sum(segment.count for segment in index._store.state.segments) <= 2 * len(index)
    assert index.metadata([8, 599]) == [{"row": 8}, {"row": 599}]


def test_a_refresh_that_fails_changes_nothing() -> None:
    index = ImageTextIndex(2)
    index.add(torch.eye(2))

    def encode(ids: Tensor, _: list[Any]) -> Tensor:
        if int(ids[0]):
            raise OSError("no picture")
        return torch.full((1, 2), 3.0)

    done = index.refresh(encode, batch_size=1, wait=False)
    with pytest.raises(OSError, match="no picture"):
        done.result(30)
    assert torch.equal(index.features([0, 1]), torch.eye(2))
    assert index.refresh(lambda ids, _: torch.ones(len(ids), 2)).result() == 2


def test_what_is_added_in_inference_mode_stays_usable(tmp_path: Path) -> None:
    with torch.inference_mode():
        index = ImageTextIndex(4, metric="dot")
        index.add(torch.ones(300, 4))
        index.update([1], torch.full((1, 4), 2.0))
        index.remove(range(2, 200))
        index.refresh(lambda ids, _: torch.ones(len(ids), 4))
        indices = [index]
        if importlib.util.find_spec("safetensors"):
            index.save(tmp_path / "file")
            indices.append(ImageTextIndex.load(tmp_path / "file"))
        assert index.search(torch.ones(1, 4), 1).values.is_inference()
    for one in indices:
        one.add(torch.ones(300, 4), range(1000, 1300))
        one.remove([0])
        one.refresh(lambda ids, _: torch.full((len(ids), 4), 3.0))
        queries = torch.ones(2, 4, requires_grad=True)
        one.search(queries, 2).values.sum().backward()
        assert torch.equal(queries.grad, torch.full((2, 4), 6.0))


def test_another_default_device() -> None:
    with torch.device("meta"):
        index = ImageTextIndex(4, metric="dot")
        rows = features(400, 4).to("meta")
        assert rows.is_meta and index.device.type == "cpu"
        with pytest.raises(ValueError, match="features: expected device cpu like the index, given meta"):
            index.add(rows)
        index.add(torch.ones(400, 4, device="cpu"), metadata=[1] * 400)
        index.remove(range(300))
        index.update([399], metadata=[2])
        found = index.search(torch.ones(1, 4, device="cpu"), 2, where=lambda told: told == 2, exclude=[-1])
        assert found.ids.tolist() == [[399, -1]] and index.metadata([399]) == [2]
        index.refresh(lambda ids, _: torch.zeros(len(ids), 4, device="cpu"))


def test_copies_are_indices_of_their_own() -> None:
    index = ImageTextIndex(4, metric="dot")
    index.add(features(30, 4), metadata=list(range(30)))
    index.remove([4])
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert torch.equal(other.ids, index.ids) and other.metadata([7]) == [7]
        other.remove([7])
        other.refresh(lambda ids, _: torch.zeros(len(ids), 4))
        assert 7 in index and 7 not in other and other.add(torch.ones(1, 4)).tolist() == [30]
    assert torch.equal(index.features([3]), features(30, 4)[3:4])


def test_public_names() -> None:
    assert velm_kernels.ImageTextIndex is ImageTextIndex
    assert isinstance(ImageTextIndex(2).search(torch.ones(1, 2), 1), velm_kernels.Neighbours)
