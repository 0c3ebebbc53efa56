"""The engine "faiss" of ImageTextIndex."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from velm_kernels import ImageTextIndex
from velm_kernels.retrieval import approximate, files

pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. topk_similarity runs on plain torch")
METRICS = ("dot", "cosine", "l2")


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss")


def clustered(rows: int, dim: int = 16, seed: int = 0) -> Tensor:
    """Around 20 places, as features of pictures lie."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=torch.Generator().manual_seed(7))
    return centres[torch.randint(20, (rows,), generator=generator)] + 0.3 * torch.randn(rows, dim, generator=generator)


def filled(metric: str, dtype: torch.dtype = torch.float32, rows: int = 3000) -> ImageTextIndex:
    index = ImageTextIndex(16, metric=metric, dtype=dtype, engine="faiss")
    index.add(clustered(rows), torch.randperm(rows, generator=torch.Generator().manual_seed(1)) * 2)
    return index


def same(found: Any, wanted: Any) -> None:
    """The same ids, but where values differ in the last places alone, whose sums were added in another order."""
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-5, atol=1e-5)
    other = (found.ids != wanted.ids).nonzero().tolist()
    for query, place in other:
        near = (wanted.values[query] - wanted.values[query, place]).abs() < 1e-4
        assert found.ids[query, place] in wanted.ids[query, near] or near[-1]
    assert len(other) <= 0.02 * found.ids.numel()


@pytest.mark.parametrize(
    ("metric", "factory"),
    [(metric, None) for metric in METRICS] + [("dot", "IVF8,Flat"), ("l2", "HNSW16,Flat"), ("cosine", "HNSW16,Flat")],
)
def test_looking_everywhere_finds_what_is_exact(faiss: Any, metric: str, factory: str | None) -> None:
    """With rows that came, changed and went since it was built."""
    index, queries = filled(metric), clustered(9, seed=3)
    same(index.search(queries, 7), index.search(queries, 7, engine="exact"))
    index.build(factory, nprobe=1000, ef_search=2000)
    near = index._store.state.approximate
    assert near.index.ntotal == 3000 and near.factory == (factory or "IVF76,Flat")
    index.add(queries + 0.1)
    index.update(index.search(queries, 2).ids.unique()[:5], torch.ones(5, 16))
    index.remove(index.search(queries, 5).ids[::2].unique())
    for k in (1, 7, 40):
        same(index.search(queries, k), index.search(queries, k, engine="exact"))
    among = index.ids[::2]
    same(index.search(queries, 7, ids=among), index.search(queries, 7, ids=among, engine="exact"))
    exclude = index.search(queries, 3).ids
    same(index.search(queries, 7, exclude=exclude), index.search(queries, 7, exclude=exclude, engine="exact"))
    assert index._store.state.approximate.index is near.index


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_have_codes_of_16_bits(faiss: Any, dtype: torch.dtype) -> None:
    index, queries = filled("dot", dtype), clustered(9, seed=3)
    index.build(nprobe=1000)
    near = index._store.state.approximate
    assert near.factory == f"IVF76,{approximate.CODES[dtype]}"
    assert len(approximate.packed(near.index)) < 3000 * (2 * 16 + 8) + 76 * 16 * 4 + 20000
    same(index.search(queries, 7), index.search(queries, 7, engine="exact"))


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW16,Flat", "IVF32,PQ8x4"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_finds_most_of_what_is_exact(faiss: Any, factory: str) -> None:
    index, queries = filled("l2", rows=6000), clustered(50, seed=3)
    index.build(factory, nprobe=8)
    found, wanted = index.search(queries, 10), index.search(queries, 10, engine="exact")
    hits = (found.ids[:, :, None] == wanted.ids[:, None]).any(1).float().mean()
    assert (0.7 if "PQ" in factory else 0.9) < hits
    # Values are those of the rows that were found.
    rows = index.features(found.ids)
    torch.testing.assert_close(found.values, (queries[:, None] - rows).square().sum(-1), rtol=1e-4, atol=1e-4)
    assert bool((found.values[:, 1:] >= found.values[:, :-1]).all())


def test_few_are_found_where_few_are_looked_at(faiss: Any) -> None:
    index = filled("dot")
    index.build("IVF64,Flat", nprobe=1)
    queries = clustered(9, seed=3).requires_grad_()
    found = index.search(queries, 1000)
    is_nothing = found.ids < 0
    assert is_nothing.any() and not is_nothing.all()
    assert bool((found.values[is_nothing] == -torch.inf).all())
    # What comes behind the last is nothing too.
    assert torch.equal(is_nothing, is_nothing.sort(dim=1).values)
    found.values.masked_fill(is_nothing, 0.0).sum().backward()
    torch.testing.assert_close(queries.grad, index.features(found.ids).sum(1), rtol=1e-4, atol=1e-4)


def test_a_refresh_builds_anew(faiss: Any) -> None:
    index, queries = filled("dot"), clustered(9, seed=3)
    index.build("IVF8,Flat", nprobe=8)
    made = clustered(6000, seed=5)

    def encode(ids: Tensor, _: list[Any]) -> Tensor:
        if int(ids[0]) == int(index.ids[0]):
            index.add(queries)
            index.remove(index.ids[100:200])
        return made[ids]

    index.refresh(encode, batch_size=1000)
    near = index._store.state.approximate
    assert near.index.ntotal == 3000 and near.factory == "IVF8,Flat" and near.nprobe == 8
    same(index.search(queries, 30), index.search(queries, 30, engine="exact"))


def test_is_in_the_file(faiss: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    index, queries = filled("cosine"), clustered(9, seed=3)
    index.build("IVF8,Flat", nprobe=8)
    # Of the first rows, too, some are no longer there.
    index.remove([*index.ids[:5].tolist(), *index.search(queries, 3).ids.unique().tolist()])
    index.add(queries * 2)
    index.save(tmp_path / "file")
    loaded = ImageTextIndex.load(tmp_path / "file")
    assert loaded.engine == "faiss" and loaded._store.state.approximate.index.ntotal == 3000
    same(loaded.search(queries, 20), index.search(queries, 20, engine="exact"))
    loaded.add(queries * 3)
    loaded.remove(loaded.search(queries, 1).ids.unique())
    same(loaded.search(queries, 20), loaded.search(queries, 20, engine="exact"))
    assert ImageTextIndex.load(tmp_path / "file", engine="exact")._store.state.approximate is None
    # A file without it.
    plain = ImageTextIndex(16)
    plain.add(queries)
    plain.save(tmp_path / "plain")
    assert ImageTextIndex.load(tmp_path / "plain").engine == "exact"
    same(ImageTextIndex.load(tmp_path / "plain", engine="faiss").search(queries, 2), plain.search(queries, 2))


@pytest.mark.parametrize(
    ("settings", "packed", "rows", "told"),
    [
        ("{", None, None, "expected what was built for faiss with its settings"),
        ('{"factory": "IVF8,Flat", "until": 3000, "nprobe": 8}', None, None, "ef_search"),
        (None, torch.arange(100, dtype=torch.uint8), None, "what was built for faiss cannot be read"),
        (None, None, torch.arange(2999), "expected 2999 rows of 16 in what was built for faiss, given 3000 of 16"),
        (None, None, torch.arange(3000) + 1, r"given others \(rows\)"),
    ],
)
def test_files_whose_part_for_faiss_is_broken(
    faiss: Any, tmp_path: Path, settings: str | None, packed: Tensor | None, rows: Tensor | None, told: str
) -> None:
    pytest.importorskip("safetensors")
    index, path = filled("dot"), tmp_path / "file"
    index.build("IVF8,Flat")
    index.save(path)
    found = files.read(path, False)
    assert set(json.loads(found.facts["faiss"])) == {"factory", "until", "nprobe", "ef_search"}
    changed = {"faiss": packed, "faiss_rows": rows}
    parts = [changed[name] if changed.get(name) is not None else tensor for name, tensor in found.tensors.items()]
    facts = {**found.facts, "faiss": settings or found.facts["faiss"]}
    files.write(path, facts, [files.whole(name, part) for name, part in zip(found.tensors, parts)])
    with pytest.raises(ValueError, match=told):
        ImageTextIndex.load(path)
    assert len(ImageTextIndex.load(path, engine="exact")) == 3000


def test_what_cannot_be_built(faiss: Any) -> None:
    index = filled("dot", rows=30)
    for factory, told in (
        ("Flat", "factory: expected a string that begins with IVF or HNSW, given str 'Flat'"),
        ("IVF4,Flatter", "factory: expected what faiss.index_factory makes, given 'IVF4,Flatter'"),
        ("IVF64,Flat", "factory: 'IVF64,Flat' cannot be trained by 30 rows"),
    ):
        with pytest.raises(ValueError, match=told):
            index.build(factory)
    with pytest.raises(ValueError, match="nprobe: expected at least 1, given 0"):
        index.build(nprobe=0)
    with pytest.raises(ValueError, match="expected rows in the index, and there are none"):
        ImageTextIndex(4).build()
    index.build()
    assert index._store.state.approximate.factory == "IVF1,Flat"
    same(index.search(torch.ones(1, 16), 40), index.search(torch.ones(1, 16), 40, engine="exact"))
    index.remove(index.ids)
    assert index.search(torch.ones(1, 16), 2).ids.tolist() == [[-1, -1]]


def test_faiss_is_not_needed_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = filled("dot", rows=50)
    assert index.search(torch.ones(1, 16), 2).ids.shape == (1, 2)
    with pytest.raises(ImportError, match=r"pip install 'velm_kernels\[faiss\]'"):
        index.build()
