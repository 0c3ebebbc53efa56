"""The CUDA kernels do not spill, and occupy no more than resources.csv says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda import resources
from tests.cuda.resources import Resources

ROOT = resources.ROOT
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("c++filt") is None, reason="nvcc or c++filt is not on the path"
)


# One architecture, of what has changed since the table was written; `python -m tests.cuda.resources` compiles all.
@needs_nvcc
@pytest.mark.parametrize("source", resources.sources(), ids=lambda source: source.stem)
def test_resources(source: Path) -> None:
    if resources.is_current(source):
        return
    table, now = resources.read(), resources.compile_for(source, "80")
    assert now
    assert [text for key, found in now.items() for text in resources.complaints(key, found, table.get(key))] == []
    assert {key for key in table if key[0] == source.stem and key[2] == "80"} == set(now)


def test_the_table_has_all_architectures_and_no_complaints() -> None:
    table = resources.read()
    of_arch = {arch: {key[:2] for key in table if key[2] == arch} for arch in resources.ARCHITECTURES}
    assert of_arch["80"]
    assert all(instances == of_arch["80"] for instances in of_arch.values())
    assert [text for key, found in table.items() for text in resources.complaints(key, found, found)] == []


def test_a_changed_source_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = resources.sources()[0]
    monkeypatch.setattr(resources, "DIGESTS", tmp_path / "digests.csv")
    resources.write_digests()
    assert resources.is_current(source)
    # A header that it includes by way of another.
    for name in (source, Path("device/span.h")):
        monkeypatch.setattr(resources, "ROOT", tmp_path / name.stem)
        shutil.copytree(ROOT / "csrc", resources.ROOT / "csrc")
        assert resources.is_current(source)
        (resources.ROOT / "csrc" / name).write_text("changed")
        assert not resources.is_current(source)


def test_worse_resources_are_noticed() -> None:
    key, good = ("merge", "forward_kernel<float, 4>", "80"), Resources(40, 0, 1024, 0.75)
    assert resources.complaints(key, good, good) == []
    assert resources.complaints(key, good, None)
    for worse in (
        Resources(40, 8, 1024, 0.75),
        Resources(56, 0, 1024, 0.75),
        Resources(40, 0, 1024, 0.5),
        Resources(40, 0, 2048, 0.75),
    ):
        assert resources.complaints(key, worse, good)


def test_ptxas_is_understood() -> None:
    output = """ptxas info    : Compiling entry function '_ZN4velm4cuda1kIfLi4EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN4velm4cuda1kIfLi4EEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 65 registers, used 1 barriers, 8192 bytes smem, 452 bytes cmem[0]
"""
    # 72 registers a thread after rounding: 28 warps, 7 blocks of 4, 56 percent are 7 of 16.
    assert resources.parse(output, Path("x/y.cu"), "80") == {("y", "k<float, 4>", "80"): Resources(65, 16, 8192, 0.438)}
