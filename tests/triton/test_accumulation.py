"""float32 sums are not kept in tensor cores, which truncate them: read from what the compiler makes of the kernels."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from velm_kernels.backends import triton as backend

pytestmark = pytest.mark.skipif(backend.is_interpreted(), reason="compiles kernels")

REGISTER = re.compile(r"%\w+")
BEGINS = re.compile(r", (0|%p\d+), 1, 1")


def chains(ptx: str, rounds: int) -> int:
    """The most matrix instructions that one number goes through, each adding to the one before, where every loop runs
    so many times. Any other instruction begins anew."""
    lines = [line.strip().removesuffix(";") for line in ptx.splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    length: dict[str, int] = {}
    longest = 0

    def run(start: int, stop: int) -> None:
        nonlocal longest
        for i in range(start, stop):
            line = re.sub(r"^@!?%p\d+\s+", "", lines[i])
            name, _, rest = line.partition(" ") if " " in line else line.partition("\t")
            registers = REGISTER.findall(rest)
            target = labels.get(rest.strip(), i) if name.startswith("bra") else i
            if target < i:
                for _ in range(rounds - 1):
                    run(target, i)
            elif name.startswith(("mma.sync", "wgmma.mma_async")):
                groups = [REGISTER.findall(group) for group in re.findall(r"\{([^}]*)\}", rest)]
                # wgmma adds to its own registers, unless a 0 or false says that it begins.
                sums = groups[-1] if name.startswith("mma.sync") else groups[0]
                begins = name.startswith("wgmma") and BEGINS.search(rest)
                if begins and begins[1].startswith("%"):
                    begins = length.get(begins[1]) == -1
                now = 1 + (0 if begins else max(length.get(register, 0) for register in sums))
                length.update(dict.fromkeys(groups[0], now))
                longest = max(longest, now)
            elif name == "setp.ne.b32" and rest.endswith(", 0, 0"):
                # A predicate that is false.
                length[registers[0]] = -1
            elif registers and name.startswith(("mov.", "selp.")):
                length[registers[0]] = max([length.get(register, 0) for register in registers[1:]], default=0)
            elif registers and not name.startswith(("st.", "wgmma", "bar", "bra")):
                written = re.match(r"\{([^}]*)\}", rest.strip())
                length.update(dict.fromkeys(REGISTER.findall(written[1]) if written else registers[:1], 0))

    run(0, len(lines))
    return longest


def ptx_of(kind: str, level: str, arch: int) -> str:
    from tests.triton import compiling, resources

    return compiling.compile_for(resources.launch_of((kind, level, "float32", 256, arch)), arch).asm["ptx"]


def most_terms() -> int:
    """Instructions that sum the three products of the longest chain, 8 terms each."""
    from velm_kernels.triton.kernels import LONGEST_CHAIN

    return 3 * LONGEST_CHAIN.value // 8


@pytest.mark.parametrize("kind", ["forward", "bilinear_weight"])
@pytest.mark.parametrize("arch", [80, 90])
def test_sums_of_float32_leave_the_tensor_cores(kind: str, arch: int) -> None:
    """However often a loop runs, no number goes through more matrix instructions than one product has."""
    ptx = ptx_of(kind, "loaded" if kind == "forward" else "plain", arch)
    assert 0 < chains(ptx, 2) <= most_terms()
    assert chains(ptx, 4) == chains(ptx, 2)


def test_sums_of_float32_leave_tensor_memory() -> None:
    """On sm_100 what was summed there is read and added in registers."""
    from tests.triton import compiling, resources

    launch = resources.launch_of(("bilinear_weight", "plain", "float32", 256, 100))
    compiled = compiling.compile_for(launch, 100)
    assert "tcgen05.mma" in compiled.asm["ptx"]
    assert re.search(r"arith\.addf %\w+, %arg\d+", compiled.asm["ttgir"])


def test_sums_that_stay_are_noticed() -> None:
    """A product of 16 bits keeps its sum in the registers of the matrix instructions for the whole loop."""
    from tests.triton import compiling, resources

    for arch in (80, 90):
        launch = resources.launch_of(("bilinear_weight", "plain", "float16", 256, arch))
        ptx = compiling.compile_for(launch, arch).asm["ptx"]
        assert chains(ptx, 3) > chains(ptx, 2) > chains(ptx, 1)


def test_dtypes_that_need_it() -> None:
    assert backend.precision(torch.float32) == "tf32x3"
