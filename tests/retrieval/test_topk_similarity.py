"""topk_similarity beside torch.topk and faiss: which of equal rows, NaN, rows that are not valid, and that what is
found depends on nothing but a query and the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import INTERPRETED, Backend, every_backend, every_cpu_backend
from velm_kernels import measure, merge_topk, topk_similarity
from velm_kernels.retrieval.topk_similarity import reference

METRICS = reference.METRICS


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# Few queries and many, one row of scores and several blocks of a database; no multiple of anything.
@pytest.mark.parametrize(("queries", "rows", "dim", "k"), [(1, 70, 33, 5), (9, 1100, 40, 17), (37, 130, 150, 3)])
@pytest.mark.parametrize("metric", METRICS)
@every_backend
def test_equals_torch(backend: Backend, metric: str, queries: int, rows: int, dim: int, k: int) -> None:
    if INTERPRETED and rows > 200:
        rows = 140
    q, database = drawn(queries, dim), drawn(rows, dim)
    scores = {
        "dot": lambda: q.double() @ database.double().T,
        "cosine": lambda: torch.cosine_similarity(q.double()[:, None], database.double(), dim=-1),
        "l2": lambda: torch.cdist(q.double(), database.double()).square(),
    }[metric]()
    exact = torch.topk(scores, k, largest=metric != "l2")
    with backend.use():
        values, indices = topk_similarity(q, database, k, metric)
    assert torch.equal(indices, exact.indices)
    torch.testing.assert_close(values, exact.values.float())


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_equals_faiss(metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    queries, database = drawn(12, 40), drawn(900, 40)
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(40)
    index.add(database.numpy())
    exact_values, exact = index.search(queries.numpy(), 1000)
    values, indices = topk_similarity(queries, database, 1000, metric)
    assert torch.equal(indices[:, :50], torch.from_numpy(exact)[:, :50])
    assert torch.equal(indices < 0, torch.from_numpy(exact) < 0)
    torch.testing.assert_close(values[:, :50], torch.from_numpy(exact_values)[:, :50], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("metric", METRICS)
@every_backend
def test_of_equal_rows_the_lower_index(backend: Backend, metric: str, queries: int) -> None:
    """In one tile, in several, in those of several threads; where ids run the other way, the lower id."""
    rows, dim, copies = 150 if INTERPRETED else 1200, 24, [3, 4, 17, 70, 110]
    if not INTERPRETED:
        copies += [511, 700, 1199]
    q = drawn(1, dim).expand(queries, dim).contiguous()
    database = drawn(rows, dim)
    database[copies] = q[0] * 3 if metric != "l2" else q[0] + 0.01
    for k in (2, len(copies) - 1, len(copies)):
        with backend.use():
            values, indices = topk_similarity(q, database, k, metric)
            _, named = topk_similarity(q, database, k, metric, ids=torch.arange(rows).flip(0) * 5)
        assert indices.tolist() == [copies[:k]] * queries
        assert (values == values[:1, :1]).all()
        assert named.tolist() == [[5 * (rows - 1 - place) for place in reversed(copies)][:k]] * queries


@every_backend
def test_all_rows_are_equal(backend: Backend) -> None:
    database = torch.ones(130, 20)
    for queries in (1, 12):
        with backend.use():
            values, indices = topk_similarity(torch.ones(queries, 20), database, 5)
        assert indices.tolist() == [[0, 1, 2, 3, 4]] * queries
        assert (values == 20).all()


@pytest.mark.parametrize("queries", [1, 20])
@every_backend
def test_nan_is_the_greatest(backend: Backend, queries: int) -> None:
    """So it is found first, and last where the least is looked for; infinities are before what is not there."""
    q, database = torch.ones(queries, 20), 0.1 * drawn(60, 20)
    database[[7, 33]] = torch.nan
    database[5], database[6] = torch.inf, -torch.inf
    with backend.use():
        found = {metric: topk_similarity(q, database, 62, metric) for metric in METRICS}
    values, indices = found["dot"]
    assert indices[:, :3].tolist() == [[7, 33, 5]] * queries
    assert indices[:, 59:].tolist() == [[6, -1, -1]] * queries
    assert values[:, :2].isnan().all()
    assert (values[:, 2] == torch.inf).all()
    assert (values[:, 59:] == -torch.inf).all()
    # Of infinite rows a cosine is NaN.
    assert found["cosine"][1][:, :4].tolist() == [[5, 6, 7, 33]] * queries
    values, indices = found["l2"]
    assert indices[:, 56:].tolist() == [[5, 6, 7, 33, -1, -1]] * queries
    assert values[:, 58:60].isnan().all()
    assert (values[:, 60:] == torch.inf).all()


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_rows_that_are_not_valid(backend: Backend, dtype: torch.dtype, queries: int) -> None:
    """Are not read, at the edges of tiles and where whole tiles are of them."""
    rows, k = 110, 9
    q, database = drawn(queries, 32).to(dtype), drawn(rows, 32).to(dtype)
    valid = drawn(rows) > 0
    valid[:50], valid[-1] = False, False
    valid[100:] = False
    for some in (valid, valid & (torch.arange(rows) > 95), torch.zeros_like(valid)):
        exact_values, exact = reference.topk_similarity(q.double(), database[some].double(), k)
        numbers = torch.cat([some.nonzero()[:, 0], torch.tensor([-1])])
        poisoned = database.masked_fill(~some[:, None], torch.nan)
        with backend.use():
            values, indices = topk_similarity(q, poisoned, k, valid=some)
        assert torch.equal(indices, numbers[exact])
        torch.testing.assert_close(values, exact_values.float())


# Where a tile of scores tells little: rows that differ by less than their factors are rounded, similarities that vanish
# beside norms, numbers whose squares underflow or overflow, and rows of all kinds.
def _close(rows: int, dim: int) -> Tensor:
    return drawn(1, dim) + 1e-4 * drawn(rows, dim)


def _across(rows: int, dim: int) -> Tensor:
    """Orthogonal to the first query, and long."""
    query, database = drawn(1, dim), 1e3 * drawn(rows, dim)
    return database - (database @ query.T) / (query @ query.T) * query


def _sizes(rows: int, dim: int) -> Tensor:
    return drawn(rows, dim) * 10 ** torch.linspace(-20, 18, rows)[:, None]


HARD = {
    "close": _close,
    "across": _across,
    "small": lambda rows, dim: 1e-22 * drawn(rows, dim),
    "subnormal": lambda rows, dim: 1e-39 * drawn(rows, dim),
    "large": lambda rows, dim: 1e18 * drawn(rows, dim),
    "sizes": _sizes,
    "few values": lambda rows, dim: drawn(rows, dim).sign() * (drawn(rows, dim).abs() > 1),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_cpu_backend
def test_a_query_among_others_finds_what_it_finds_alone(
    backend: Backend, dtype: torch.dtype, metric: str, kind: str
) -> None:
    """Bit for bit: of many queries tiles of scores are made first, of one they are not."""
    queries, rows, dim = 35, 700, 70
    database = HARD[kind](rows, dim).to(dtype)
    q = torch.cat([drawn(1, dim), 1e-20 * drawn(3, dim), database[5:10].float(), drawn(queries - 9, dim)])
    q = q.to(dtype)
    with backend.use():
        values, indices = topk_similarity(q, database, 10, metric)
        alone = [topk_similarity(one, database, 10, metric) for one in q.split(1)]
    assert torch.equal(indices, torch.cat([one for _, one in alone]))
    torch.testing.assert_close(values, torch.cat([one for one, _ in alone]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("queries", [2, 40])
@every_cpu_backend
def test_parts_find_what_the_whole_does(backend: Backend, queries: int) -> None:
    """However rows are dealt out, and for any number of threads; gradients too."""
    q, database = drawn(queries, 50).requires_grad_(), drawn(2300, 50).requires_grad_()
    with torch.no_grad():
        database[1000:1100] = database[:100]
    weights, runs = drawn(queries, 12), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backend.use():
            values, indices = topk_similarity(q, database, 12)
            runs.append([values, indices, *torch.autograd.grad(values, [q, database], weights)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))
    names = torch.arange(2300)
    for parts in ([names[:5], names[5:1050], names[1050:]], [names[part::3] for part in range(3)]):
        with backend.use():
            found = [topk_similarity(q.detach(), database.detach()[part], 12, ids=part) for part in parts]
        values, indices = merge_topk(*zip(*found, strict=True), k=12)
        assert torch.equal(indices, runs[0][1])
        assert torch.equal(values, runs[0][0])


@every_cpu_backend
def test_offsets_beyond_2_31(backend: Backend) -> None:
    """Rows that span more than 2^31 elements, of which few are touched."""
    step, rows, dim = 1 << 27, 18, 40
    database = torch.empty(rows, step, dtype=torch.bfloat16)[:, :dim]
    database.zero_()
    database[-1], database[-2] = 2.0, 1.0
    for queries in (1, 20):
        with backend.use():
            values, indices = topk_similarity(torch.ones(queries, dim), database, 3)
        assert indices.tolist() == [[rows - 1, rows - 2, 0]] * queries
        assert values.tolist() == [[2.0 * dim, 1.0 * dim, 0.0]] * queries


def test_memory() -> None:
    """No matrix of scores."""
    queries, database = drawn(300, 16), drawn(20_000, 16)
    scores = 300 * 20_000 * 4
    assert measure.peak_memory(lambda: topk_similarity(queries, database, 10)) < scores / 5


@every_cpu_backend
def test_many_are_asked_for(backend: Backend) -> None:
    """As many as there are, or nearly; none."""
    # Of whole numbers, so that all sums are exact.
    queries, database = drawn(20, 30).round(), drawn(1300, 30).round()
    exact = reference.topk_similarity(queries.double(), database.double(), 1400)
    for k in (0, 1290, 1400):
        with backend.use():
            values, indices = topk_similarity(queries, database, k)
        assert torch.equal(indices, exact[1][:, :k])
        assert torch.equal(values, exact[0][:, :k].float())
