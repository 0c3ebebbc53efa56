"""What the shared libraries contain, ask for and export, read with the tools that come with the compiler."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import velm_kernels
from velm_kernels.backends import cpu

LIBRARIES = [path for isa in (*cpu.INSTRUCTION_SETS, *cpu.TEST_ONLY) if (path := cpu.library_path(isa)).exists()]

pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="no CPU library was built"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed"),
]
every_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)


def tool(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def disassembled() -> dict[Path, str]:
    return {path: tool("objdump", "-d", "--no-show-raw-insn", path) for path in LIBRARIES}


@every_library
def test_exports_nothing_but_its_description(library: Path) -> None:
    exported = [line.split()[-1] for line in tool("nm", "-D", "--defined-only", library).splitlines()]
    assert sorted(exported) == ["velm_build_info", "velm_signatures"]


@every_library
def test_needs_only_the_stable_interface_of_torch(library: Path) -> None:
    undefined = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    # What the C++ runtime and the C library provide carries a version; torch's symbols do not.
    unversioned = [name for name in undefined if "@" not in name]
    start_files = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
    foreign = {name for name in unversioned if not name.startswith(("aoti_torch_", "torch_"))}
    assert foreign <= start_files
    assert any(name.startswith("aoti_torch_") for name in unversioned)


@every_library
def test_is_found_by_name_alone(library: Path) -> None:
    dynamic = tool("readelf", "-d", library)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    needed = set(re.findall(r"\(NEEDED\).*\[([^\]]+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert {name for name in needed if "torch" in name or "python" in name or "c10" in name} == {"libtorch_cpu.so"}


@every_library
def test_instructions_are_those_of_its_set(library: Path, disassembled: dict[Path, str]) -> None:
    isa = library.stem.removeprefix("libvelm_cpu_")
    code = disassembled[library]
    if "%rsp" not in code:
        pytest.skip("not x86")
    assert ("%zmm" in code) == isa.startswith("avx512")
    assert ("%ymm" in code) == (isa != "baseline")
    assert ("vdpbf16ps" in code) == (isa == "avx512_bf16")


def innermost_loops(function: str) -> list[list[str]]:
    """The instructions of every loop of a disassembled function that has no other loop inside."""
    code = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", function, re.MULTILINE)
    position = {address: i for i, (address, _) in enumerate(code)}
    jumps = [(i, re.match(r"j\w+\s+([0-9a-f]+)", instruction)) for i, (_, instruction) in enumerate(code)]
    targets = [(position.get(jump[1], len(code)), i) for i, jump in jumps if jump]
    loops = {(start, stop) for start, stop in targets if start <= stop}
    inner = [one for one in loops if not any(one != two and one[0] <= two[0] and two[1] <= one[1] for two in loops)]
    return [[instruction for _, instruction in code[start : stop + 1]] for start, stop in inner]


# Every product of attention, by the template arguments of simd::product: which stride of the left operand is 1, and
# what becomes of the values already there.
BF16_PRODUCTS = {
    "Lb0ELNS0_5StartE3E": "scores: of queries and keys, times the scale",
    "Lb0ELNS0_5StartE0E": "gradients of weights: of values and grad_out",
    "Lb1ELNS0_5StartE2E": "out: of weights and values, after those before it were scaled",
    "Lb1ELNS0_5StartE1E": "grad_query: of score gradients and keys",
    "Lb0ELNS0_5StartE1E": "grad_key and grad_value: of score gradients and queries, of weights and grad_out",
}


def compiled_products(folder: Path) -> str:
    """The machine code of the same products, compiled for a processor that this one is not."""
    here = Path(__file__).parent
    flags = (
        "-std=c++20 -O3 -march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16 -ffp-contract=fast -fno-trapping-math"
    )
    include, source = here.parents[1] / "csrc", here / "bf16_products.cpp"
    tool("g++", *flags.split(), "-Wno-psabi", "-I", include, "-c", source, "-o", folder / "products.o")
    return tool("objdump", "-d", "--no-show-raw-insn", folder / "products.o")


def test_bf16_products_keep_their_sums_in_registers(disassembled: dict[Path, str], tmp_path: Path) -> None:
    library = next((path for path in LIBRARIES if path.stem == "libvelm_cpu_avx512_bf16"), None)
    if library is None and platform.machine() != "x86_64":
        pytest.skip("not x86")
    code = disassembled[library] if library else compiled_products(tmp_path)
    functions = [text for text in code.split("\n\n") if "vdpbf16ps" in text]
    loops = [loop for function in functions for loop in innermost_loops(function)]
    assert any("vdpbf16ps" in instruction for loop in loops for instruction in loop)
    for loop in loops:
        if any("vdpbf16ps" in instruction for instruction in loop):
            assert not [one for one in loop if "%zmm" in one and re.search(r"\(%r[sb]p", one)], loop
    for arguments, product in BF16_PRODUCTS.items():
        # 2 vectors of columns, words of pairs
        symbol = rf"<_ZN4velm4simd7productILi2E{arguments}jE"
        bodies = [loop for text in functions if re.search(symbol + r"[^>]*>:", text) for loop in innermost_loops(text)]
        largest = max(([one for one in loop if "zmm" in one] for loop in bodies), key=len, default=[])
        # two steps of 12 rows: two products for every word of the left operand that is read, and nothing is stored
        assert sum("vdpbf16ps" in one for one in largest) == 48, product
        assert sum("vpbroadcastd" in one for one in largest) == 24, product
        assert not [one for one in largest if re.match(r"vmov\w+\s+%zmm\d+,.*\(", one)], product


@every_library
def test_describes_itself(library: Path) -> None:
    describe = ctypes.CDLL(str(library)).velm_build_info
    describe.restype = ctypes.c_char_p
    info = dict(line.split("=", 1) for line in describe().decode().splitlines())
    isa = library.stem.removeprefix("libvelm_cpu_")
    assert (info["version"], info["isa"], info["namespace"]) == (velm_kernels.__version__, isa, f"velm_cpu_{isa}")


def test_every_library_that_runs_here_has_the_same_operators() -> None:
    operators = {}
    for isa in cpu.usable():
        with cpu.use_isa(isa):
            operators[isa] = {schema.partition("(")[0] for schema in cpu._schemas if cpu.has(schema.partition("(")[0])}
    assert "baseline" in operators
    assert all(found == operators["baseline"] for found in operators.values())


@every_library
def test_kernels_take_what_is_declared(library: Path) -> None:
    isa = library.stem.removeprefix("libvelm_cpu_")
    if cpu.why_not(isa) is not None:
        pytest.skip(f"this processor cannot run {isa} code")
    describe = ctypes.CDLL(str(library)).velm_signatures
    describe.restype = ctypes.c_char_p
    noted = {line.partition("(")[0] for line in describe().decode().splitlines()}
    known = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    # Registered without VELM_KERNEL, a kernel would be compared with nothing.
    assert noted == {name for home, _, name in known if home == f"velm_cpu_{isa}" and cpu._is_registered(isa, name)}


@pytest.mark.parametrize(
    "taken",
    [
        "Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, Tensor(a!) out",  # one fewer
        "Tensor x, Tensor? gamma, Tensor beta, bool regions_contiguous, float gamma_offset, Tensor(a!) out",
        "Tensor x, Tensor gamma, Tensor beta, int regions_contiguous, float gamma_offset, Tensor(a!) out",
    ],
)
def test_a_library_of_other_sources_is_a_reason(taken: str) -> None:
    library = cpu.library_path("baseline")
    assert cpu.open_library(library, cpu._schemas) is None
    reason = cpu.open_library(library, [f"film_forward({taken}) -> ()"])
    assert reason is not None
    assert reason.startswith("libvelm_cpu_baseline.so was built from other sources: its film_forward takes (Tensor, ")


def test_so_it_is_where_an_operator_is_declared_after_the_library_was_opened() -> None:
    assert cpu.why_not("baseline") is None
    with pytest.raises(RuntimeError, match=r"built from other sources: its maxsim_best takes \(Tensor, "):
        cpu.declare("maxsim_best(Tensor z) -> ()")


def test_a_library_of_older_sources_is_a_reason() -> None:
    older = Path(torch.__file__).parent / "lib" / "libc10.so"
    reason = cpu.open_library(older, [])
    assert reason == "libc10.so was built from older sources: build it again (`make lib`, or `pip install .`)"
