"""The CUDA kernels do not spill, and occupy no more than resources.csv says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda import resources
from tests.cuda.resources import Resources

ROOT = resources.ROOT
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("c++filt") is None or resources.disassembler() is None,
    reason="nvcc, c++filt or cuobjdump is missing",
)


# One architecture, of what has changed since the table was written; `python -m tests.cuda.resources` compiles all.
@needs_nvcc
@pytest.mark.parametrize("source", resources.sources(), ids=resources.name_of)
def test_resources(source: Path) -> None:
    if resources.is_current(source):
        return
    table, now = resources.read(), resources.compile_for(source, ("80",))
    assert now
    assert [text for key, found in now.items() for text in resources.complaints(key, found, table.get(key))] == []
    assert {key for key in table if key[0] == resources.name_of(source) and key[2] == "80"} == set(now)


def test_the_table_has_all_architectures_and_no_complaints() -> None:
    table = resources.read()
    of_arch = {arch: {key[:2] for key in table if key[2] == arch} for arch in resources.ARCHITECTURES}
    assert of_arch["80"]
    assert all(instances == of_arch["80"] for instances in of_arch.values())
    assert [text for key, found in table.items() for text in resources.complaints(key, found, found)] == []


def test_a_changed_source_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = resources.sources()[0]
    monkeypatch.setattr(resources, "DIGESTS", tmp_path / "digests.csv")
    resources.write_digests(resources.sources())
    assert resources.is_current(source)
    # A header that it includes by way of another.
    for name in (source, Path("device/view.h")):
        monkeypatch.setattr(resources, "ROOT", tmp_path / name.stem)
        shutil.copytree(ROOT / "csrc", resources.ROOT / "csrc")
        assert resources.is_current(source)
        (resources.ROOT / "csrc" / name).write_text("changed")
        assert not resources.is_current(source)


def test_worse_resources_are_noticed() -> None:
    key, good = ("merge_attention", "forward_kernel<float, 4>", "80"), Resources(40, 0, 1024, 0.75, 0)
    assert resources.complaints(key, good, good) == []
    assert resources.complaints(key, good, None)
    for worse in (
        Resources(40, 8, 1024, 0.75, 0),
        Resources(56, 0, 1024, 0.75, 0),
        Resources(40, 0, 1024, 0.5, 0),
        Resources(40, 0, 2048, 0.75, 0),
    ):
        assert resources.complaints(key, worse, good)


@pytest.mark.parametrize("source", ["cross_attention_forward", "cross_attention_grad_query", "a_new_source"])
def test_missing_matrix_instructions_are_noticed(source: str) -> None:
    with_products, without = Resources(40, 0, 1024, 0.75, 128), Resources(40, 0, 1024, 0.75, 0)
    key = (source, "some_kernel<__half, 64>", "80")
    assert resources.complaints(key, with_products, with_products) == []
    # Also where the table says that there were none.
    assert resources.complaints(key, without, with_products) == resources.complaints(key, without, without) != []
    assert resources.complaints(("cross_attention_norm", *key[1:]), without, with_products)
    assert resources.complaints(("cross_attention_row_sums", "delta_kernel<float>", "80"), without, without) == []


def test_the_compilers_are_understood() -> None:
    output = """ptxas info    : Compiling entry function '_ZN4velm4cuda1kIfLi4EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN4velm4cuda1kIfLi4EEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 65 registers, used 1 barriers, 8192 bytes smem, 452 bytes cmem[0]
"""
    machine_code = """
		Function : other
        /*00b0*/                   HMMA.16816.F32 R4, R4, R8, R12 ;
		Function : _ZN4velm4cuda1kIfLi4EEEvPKT_
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   HMMA.1688.F32.TF32 R4, R4, R8, R12 ;
"""
    # 72 registers a thread after rounding: 28 warps, 7 blocks of 4, 56 percent are 7 of 16.
    expected = {("y", "k<float, 4>", "80"): Resources(65, 16, 8192, 0.438, 2)}
    assert resources.parse(output, machine_code, Path("x/y.cu"), "80") == expected
