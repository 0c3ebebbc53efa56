"""What the module of facts says about the processor, compared with what the operating system says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import velm_kernels

facts = pytest.importorskip("velm_kernels._facts")

# Names of compilers to names of /proc/cpuinfo, where they differ.
KERNEL_NAMES = {"sse4.2": "sse4_2", "lzcnt": "abm", "bmi": "bmi1", "avxvnni": "avx_vnni"}
KERNEL_NAMES |= {name: name.replace("avx512", "avx512_") for name in ("avx512vnni", "avx512bf16", "avx512fp16")}


def kernel_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return set(found.group(1).split()) if found else set()


@pytest.mark.skipif(not kernel_flags(), reason="the system lists no processor flags")
def test_features_are_those_the_kernel_reports() -> None:
    features = set(facts.cpu()["features"])
    checked = {"sse4.2", "popcnt", "movbe", "lzcnt", "bmi", "bmi2", "avx", "f16c", "fma", "avx2", "avxvnni"}
    checked |= {"avx512" + suffix for suffix in ("f", "dq", "cd", "bw", "vl", "vnni", "bf16", "fp16")}
    assert {name for name in checked if KERNEL_NAMES.get(name, name) in kernel_flags()} == features & checked


@pytest.mark.skipif(not kernel_flags(), reason="the system lists no processor flags")
def test_vendor_and_model_are_those_the_kernel_reports() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert f": {facts.cpu()['vendor']}\n" in cpuinfo
    assert f": {facts.cpu()['model']}\n" in cpuinfo
    assert re.search(rf"^cpu family\s*: {facts.cpu()['family']}$", cpuinfo, re.MULTILINE)
    assert re.search(rf"^model\s*: {facts.cpu()['model_number']}$", cpuinfo, re.MULTILINE)


def test_instruction_sets_begin_with_the_portable_one() -> None:
    isas = facts.cpu()["isas"]
    assert isas == ["baseline", "avx2", "avx512", "avx512_bf16"][: len(isas)] != []
    assert ("avx512" in isas) <= ("avx512f" in facts.cpu()["features"])


def test_build_is_of_this_version() -> None:
    build = facts.build()
    assert build["version"] == velm_kernels.__version__
    assert "baseline" in build["isas"]


def test_peaks_are_plausible_and_ordered() -> None:
    one = facts.peak_fp32(threads=1, seconds=0.2)
    assert 1e9 < one < 1e12
    bf16 = facts.peak_bf16(threads=1, seconds=0.2)
    assert (bf16 is not None) == ("avx512bf16" in facts.cpu()["features"])
    assert 1e8 < facts.copy_bandwidth(threads=1, bytes=64 << 20, seconds=0.1) < 1e12


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"threads": -1}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_impossible_measurements_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be positive"):
        facts.peak_fp32(**arguments)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
def test_peak_kernels_stay_in_registers() -> None:
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", facts.__file__], capture_output=True, text=True, check=True
    ).stdout
    if "%zmm" not in code:
        pytest.skip("no AVX-512 kernels on this architecture")
    for instruction in (r"vfmadd\w+ps", "vdpbf16ps"):
        # The accumulator is the last operand; one in memory would show as an address instead.
        accumulators = re.findall(rf"{instruction}\s+\S*%zmm\d+,(\S+)", code)
        assert len(set(accumulators)) >= 20, instruction
        assert all(name.startswith("%zmm") for name in accumulators)
    assert not re.search(r"(vfmadd\w+ps|vdpbf16ps)\s+\S*\(", code)
