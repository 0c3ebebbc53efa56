"""The Triton kernels compile for every architecture, do not spill, and occupy no more than resources.csv says."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.triton import compiling
from velm_kernels.backends import triton as backend

pytestmark = pytest.mark.skipif(backend.is_interpreted(), reason="compiles kernels")

# What a run of all tests compiles: each kernel with products, and each architecture. `python -m tests.triton.resources`
# compiles all instances.
CHECKED = [
    ("forward", "plain", "float16", 64, 80),
    ("forward", "loaded", "float16", 128, 80),
    ("grad_query", "loaded", "float32", 256, 80),
    ("grad_key_value", "plain", "float16", 64, 90),
    ("grad_bias", "loaded", "float16", 64, 90),
    ("key_mass", "loaded", "float16", 64, 120),
    ("forward", "plain", "float16", 64, 100),
    ("linear_epilogue", "plain", "float16", 256, 90),
    ("dropout_residual", "plain", "float16", 256, 80),
    ("pool_max", "plain", "float16", 256, 80),
    ("bilinear", "plain", "float16", 256, 90),
    ("attention_pool_products", "plain", "float16", 256, 80),
]


@pytest.mark.parametrize("key", CHECKED, ids=lambda key: "-".join(map(str, key)))
def test_resources(key: tuple[str, str, str, int, int]) -> None:
    from tests.triton import resources

    table = resources.read()
    blocks, now = resources.measure(key)
    assert key in table, "python -m tests.triton.resources --write"
    assert table[key][0] == blocks, "block sizes changed: python -m tests.triton.resources --write"
    assert resources.complaints(key, now, table[key][1]) == []


def test_the_table_is_complete() -> None:
    from tests.triton import resources

    expected = set(resources.instances(resources.ARCHITECTURES, resources.DTYPES, resources.DIMENSIONS))
    assert {entry for entry, _ in resources.ATTENTION} >= {kind for kind, _ in backend.TABLE}
    assert set(resources.read()) == expected, "python -m tests.triton.resources --missing --write"


def test_the_table_has_no_complaints() -> None:
    from tests.triton import resources

    table = resources.read()
    assert table
    assert [text for key, (_, found) in table.items() for text in resources.complaints(key, found, None)] == []


def test_the_table_knows_the_block_sizes() -> None:
    """Block sizes are not changed without asking the compiler again."""
    from tests.triton import resources

    for key, (blocks, _) in resources.read().items():
        config = resources.launch_of(key).config
        assert blocks == f"{config.block_m}x{config.block_n}x{config.num_stages}", key


def test_older_versions_compiled_these_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.triton import resources, versions

    table = versions.read()
    assert set(table) == set(resources.instances(resources.ARCHITECTURES, resources.DTYPES, resources.DIMENSIONS))
    for version in versions.OLDER:
        numbers = tuple(int(number) for number in version.split("."))
        monkeypatch.setattr(backend, "version", lambda numbers=numbers: numbers)
        resources._launches.cache_clear()
        for key, cells in table.items():
            compiled = cells[version].split(":")[0]
            if not compiled and key[0] in versions.NEWEST_FIRST:
                continue
            assert compiled == resources.blocks_and_warps(key), f"Triton {version}, {key}: make triton-versions"
    resources._launches.cache_clear()


def test_digests_tell_sources_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from tests.triton import resources

    forward, backward = (
        resources.launch_of((kind, "plain", "float16", 64, 80)).kernel for kind in ("forward", "grad_query")
    )
    before = compiling.digest(forward)
    assert before == compiling.digest(forward) != compiling.digest(backward)
    # A constant that it knows.
    monkeypatch.setitem(forward.fn.__globals__, "NOTHING", tl.constexpr(0.0))
    assert compiling.digest(forward) != before


def test_worse_resources_are_noticed() -> None:
    from tests.triton import resources

    key = ("forward", "plain", "float16", 64, 80)
    good = compiling.Resources(128, 0, 49152, 4, 0.25, "mma.sync")
    assert resources.complaints(key, good, good) == []
    for worse in (
        compiling.Resources(128, 8, 49152, 4, 0.25, "mma.sync"),
        compiling.Resources(168, 0, 49152, 4, 0.125, "mma.sync"),
        compiling.Resources(128, 0, 99152, 4, 0.25, "mma.sync"),
        compiling.Resources(128, 0, 49152, 4, 0.25, "none"),
    ):
        assert resources.complaints(key, worse, good)
    assert resources.complaints(key, compiling.Resources(128, 0, 200000, 4, 0.25, "mma.sync"), None)
