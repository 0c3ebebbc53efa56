"""The machine code of float32 products: what tensor cores leave is added by ordinary instructions."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cuda import resources

KERNEL = """
#include "device/products.h"

// As many products as a tile of keys has, in one accumulator.
__global__ void products(const float4* a, const float2* b, float4* to, int steps) {
  float d[4] = {};
  for (int k = 0; k < steps; ++k) {
    velm::device::Split<4> left;
    velm::device::Split<2> right;
    const float4 x = a[k * blockDim.x + threadIdx.x];
    const float2 y = b[k * blockDim.x + threadIdx.x];
    left.set(0, x.x), left.set(1, x.y), left.set(2, x.z), left.set(3, x.w), right.set(0, y.x), right.set(1, y.y);
    velm::device::multiply_split(d, left, right);
  }
  to[threadIdx.x] = make_float4(d[0], d[1], d[2], d[3]);
}
"""


@pytest.mark.skipif(
    shutil.which("nvcc") is None or resources.disassembler() is None, reason="nvcc or cuobjdump is missing"
)
def test_no_accumulator_lives_in_tensor_cores(tmp_path: Path) -> None:
    """An accumulator there is cut off with every product: of 4096 it has lost all digits that float32 has beyond tf32.

    So the first of three products begins with zeros (register RZ), and their sum is added by four FADD.
    """
    source, ptx, cubin = (tmp_path / f"products.{ending}" for ending in ("cu", "ptx", "cubin"))
    source.write_text(KERNEL)
    nvcc, disassembler = shutil.which("nvcc"), resources.disassembler()
    assert nvcc is not None and disassembler is not None
    resources.run(
        nvcc, "-std=c++20", "-O3", "-I", resources.ROOT / "csrc", "-arch=compute_80", "-ptx", "-o", ptx, source
    )
    for arch in resources.ARCHITECTURES:
        resources.run(nvcc, f"-arch=sm_{arch}", "-cubin", "-o", cubin, ptx)
        code = resources.run(disassembler, "-sass", cubin)
        products = re.findall(r"HMMA\.1688\.F32\.TF32 (\w+), [\w.]+, [\w.]+, (\w+)", code)
        assert products and len(products) % 3 == 0
        fresh = [to for to, begin in products if begin == "RZ"]
        assert 3 * len(fresh) == len(products), (arch, products)
        # What is left of a sum after its three products is in four registers from the last one's on.
        results = {f"R{int(to[1:]) + i}" for to, begin in products if begin != "RZ" for i in range(4)}
        added = [regs for regs in re.findall(r"FADD \w+, (\w+)(?:\.reuse)?, (\w+)", code) if results & set(regs)]
        assert len(added) >= 4 * len(fresh), (arch, code)
