"""For each row of one set the most similar row of another: a product whose rows are reduced where they are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments, cpu, cuda, flops, forced, register, triton
from velm_kernels.backends.library import declare
from velm_kernels.layout import unit_last_stride


def _fake(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape, dtype = a.shape[:2], torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(shape, dtype=dtype), a.new_empty(shape, dtype=torch.int32)


# a: (batch, rows, dim), b: (batch, columns, dim), one dtype, last stride 1, other strides arbitrary. For each row of a
# the largest cosine of its angle to a row of b, (batch, rows) float32 (float64 for float64), and the first row of b
# that has it, (batch, rows) int32. The angle to a row of zeros has cosine 0; NaN is never the largest, and -inf, with
# any row of b, stands where there is nothing else. Not differentiable.
declare("match_rows", "Tensor a, Tensor b", "(Tensor, Tensor)", fake=_fake)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.square().sum(2, keepdim=True).sqrt()
    return torch.where(norms == 0.0, 0.0, rows / norms)


def _reference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = (_unit(rows.to(wide)) for rows in (a, b))
    similarity = a @ b.transpose(1, 2)
    similarity = torch.where(similarity.isnan(), -torch.inf, similarity)
    largest = similarity.amax(2) if b.shape[1] else similarity.new_full(similarity.shape[:2], -torch.inf)
    first = (similarity == largest[..., None]).to(torch.uint8)
    return largest, first.argmax(2).int() if b.shape[1] else largest.new_zeros(largest.shape, dtype=torch.int32)


def _flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    batch, rows, dim = a
    return int(2 * batch * rows * b[1] * dim)


flops.register("match_rows", _flops)


def _too_many(arguments: Arguments) -> list[str]:
    rows = max(arguments["a"].shape[1], arguments["b"].shape[1])
    # On the CPU numbers of rows are held as float32.
    return [] if rows <= 2**24 else [f"there are {rows} rows, and kernels take 2^24"]


register("match_rows", "reference", _reference)
cpu.register_cpu("match_rows", more_reasons=_too_many)
cuda.register_cuda("match_rows", _too_many)
triton.register_triton("match_rows", "pooling.triton_rows", _too_many)


def match_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`velm::match_rows` of rows in any layout."""
    a, b = unit_last_stride(a), unit_last_stride(b)
    similarity, best = torch.ops.velm.match_rows(a, b, forced())
    return similarity, best
