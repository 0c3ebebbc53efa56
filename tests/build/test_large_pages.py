"""Large results are asked for in large pages before they are written (csrc/simd/pages.h)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from velm_kernels.backends import cpu

SMAPS = Path("/proc/self/smaps")
# More than glibc ever takes from memory that it has, so that the mapping is the result's own.
MEBIBYTES = 40

pytestmark = [
    pytest.mark.skipif(
        not (SMAPS.exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()),
        reason="the system has no large pages to ask for, or does not tell",
    ),
    pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library"),
]


def flags_at(address: int) -> set[str]:
    """The flags of the mapping that holds an address."""
    holds = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif holds and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"no mapping holds {address:#x}")


def pooled_tokens() -> Tensor:
    grad_x = torch.empty(1, MEBIBYTES * 256, 1024)
    settings = (MEBIBYTES * 256, False, 0, 3.0)
    cpu.op("pool_backward")(torch.ones(1, 1024), None, None, None, None, torch.empty(0), *settings, grad_x)
    return grad_x


def factors() -> Tensor:
    a = torch.ones(1, 1, 1024).expand(1, MEBIBYTES * 256, 1024)
    grad = torch.ones(1, MEBIBYTES * 256, 1024)
    grad_a = torch.empty(a.shape)
    cpu.op("factorized_pool_backward")(grad, a, a, None, 1, False, False, False, 0.0, grad_a, None)
    return grad_a


def gathered_rows() -> Tensor:
    index = torch.zeros(1, MEBIBYTES * 256, dtype=torch.int32)
    out = torch.empty(1, MEBIBYTES * 256, 1024)
    cpu.op("gather_rows_forward")(torch.ones(1, 1, 1024), index, None, None, index, None, None, out)
    return out


@pytest.mark.parametrize("make", [pooled_tokens, factors, gathered_rows])
def test_large_results_are_advised(make: Callable[[], Tensor]) -> None:
    plain = torch.ones(MEBIBYTES << 18)
    middle = MEBIBYTES << 19
    if "hg" in flags_at(plain.data_ptr() + middle):
        pytest.skip("the allocator asks for large pages for everything itself")
    result = make()
    assert result.numel() == plain.numel() and result.is_contiguous()
    assert "hg" in flags_at(result.data_ptr() + middle)
