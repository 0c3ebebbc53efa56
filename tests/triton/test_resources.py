"""The Triton kernels compile for every architecture, do not spill, and occupy no more than resources.csv says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

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
            asked_last = bool({key[0], key[1]} & set(versions.NEWEST_FIRST)) or key[3] > versions.WIDEST
            if not compiled and asked_last:
                continue
            assert compiled == resources.blocks_and_warps(key), f"Triton {version}, {key}: make triton-versions"
    resources._launches.cache_clear()


@triton.jit
def _doubled(x, out, BLOCK: tl.constexpr):
    b_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + b_i, 2.0 * tl.load(x + b_i))


@triton.jit
def _twice(b_values, THREE: tl.constexpr):
    if THREE:
        return 3.0 * b_values
    else:
        return 2.0 * b_values


@triton.jit
def _multiplied(source, target, SIZE: tl.constexpr, THREE: tl.constexpr):
    """The same by other names, where not THREE."""
    b_at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(target + b_at, _twice(tl.load(source + b_at), THREE))


def test_digests_tell_what_is_compiled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.triton import resources

    x = torch.empty(1024, device="meta")

    def digest(kernel: Any, constants: dict[str, Any], warps: int = 4, arch: int = 80) -> str:
        launch = backend.Launch("", kernel, 1, (x, x), constants, backend.Config(128, 0, warps, 1))
        return compiling.digest(launch, arch)

    same = digest(_doubled, {"BLOCK": 128})
    assert digest(_multiplied, {"SIZE": 128, "THREE": False}) == same
    others = [
        digest(_multiplied, {"SIZE": 128, "THREE": True}),
        digest(_doubled, {"BLOCK": 256}),
        digest(_doubled, {"BLOCK": 128}, warps=8),
        digest(_doubled, {"BLOCK": 128}, arch=90),
    ]
    assert len({same, *others}) == 5

    # A constant that a kernel knows.
    forward = resources.launch_of(("forward", "plain", "float16", 64, 80))
    before = compiling.digest(forward, 80)
    monkeypatch.setitem(forward.kernel.fn.__globals__, "LOG2E", tl.constexpr(1.0))
    assert compiling.digest(forward, 80) != before


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
