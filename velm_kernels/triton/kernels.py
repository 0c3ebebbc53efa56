"""What Triton kernels of every family call. Blocks are written `b_...`, pointers `p_...`.

Two things that Triton 3.6 cannot do shape these helpers. One returns tensors and tuples of them: a constant that is
returned would become a tensor, and None an error. And a tuple inside of a tuple loses its constants, 1 and None, in the
body of a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Larger than every index, small enough that adding a block size cannot overflow int32.
MAX_INDEX = tl.constexpr(1 << 30)
# Terms that a product of float32 sums in tensor cores at the most, before it is added to others. Simulated with
# truncation at 4096 keys and head_dim 128, relative errors of a weighted sum are 2.6e-7 with 32 terms, 2.8e-7 with 64,
# 4.3e-7 with 128 and 3.9e-5 where all are summed there; of torch's float32 3.6e-7.
LONGEST_CHAIN = tl.constexpr(64)


@triton.jit
def to_int64(x):
    return tl.cast(x, tl.int64)


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """float32 to `dtype`, nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion rounds ties up and loses the carry into the exponent.
        b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_up = b_bits + (((b_bits >> 16) & 1) + 0x7FFF)
        b_up = tl.where(b_x != b_x, b_bits | 0x400000, b_up)
        return (b_up >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def product_add(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """`b_acc` plus a matrix product.

    Tensor cores truncate their sums, so that one over thousands of keys that is kept in them loses a hundred times what
    float32 does. In 16 bits nobody sees it. For float32, the three products of "tf32x3" begin at zero and are added to
    `b_acc` by an ordinary addition, which rounds (Ootomo and Yokota, 2022), and what is summed before is short:
    tests/triton/test_accumulation.py looks for both in what the compiler makes of it."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    else:
        tl.static_assert(PRECISION != "tf32x3" or b_a.shape[1] <= LONGEST_CHAIN)
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """Matrix product with float32 accumulation."""
    return product_add(b_a, b_b, tl.zeros((b_a.shape[0], b_b.shape[1]), tl.float32), PRECISION)


@triton.jit
def sequence(cu_seqlens, b, total):
    """Start and length of packed sequence `b`, kept inside the tensor whatever `cu_seqlens` says; (0, total) where
    nothing is packed."""
    if cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        stop = tl.minimum(tl.load(cu_seqlens + b + 1), total)
        return start, tl.maximum(stop - start, 0)
    else:
        return 0, total


@triton.jit
def tanh(b_x):
    """Relative error of a few units in the last place; the exponential alone would lose small arguments."""
    b_z = b_x * b_x
    b_series = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_series = b_series * b_z - 5.37397155531e-2
    b_series = b_series * b_z + 1.33314422036e-1
    b_series = b_series * b_z - 3.33332819422e-1
    b_series = b_series * b_z * b_x + b_x
    b_e = tl.exp2(b_x * (2.0 * LOG2E))
    return tl.where(tl.abs(b_x) < 0.625, b_series, 1.0 - 2.0 / (b_e + 1.0))


@triton.jit
def sum_partials_kernel(partial, total, count, elements, BLOCK: tl.constexpr):
    """total[e] = sum over `count` of partial[:, e], in order, in float32."""
    b_e = to_int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    b_ok = b_e < elements
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, count):
        b_sum += tl.load(partial + to_int64(i) * elements + b_e, mask=b_ok, other=0.0)
    tl.store(total + b_e, round_to(b_sum, total.dtype.element_ty), mask=b_ok)
