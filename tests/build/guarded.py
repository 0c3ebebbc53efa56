"""Calls operators on tensors that end, or begin, at a page that may not be touched.

    python -m tests.build.guarded ISA              every operator of the library for ISA
    python -m tests.build.guarded ISA planted      reads one element too many: must die of it

Unlike AddressSanitizer it needs no other build: what is tested are the libraries that are shipped.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import velm_kernels
from velm_kernels import cases
from velm_kernels.backends import cpu
from velm_kernels.cases import Arguments, Case, incoming, results
from velm_kernels.products import use_product

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_kept: list[mmap.mmap] = []


def guarded(values: Tensor, at_end: bool) -> Tensor:
    """A copy of `values`, between two pages that may not be touched: right before the second, or right after the
    first."""
    values = values.contiguous()
    size = values.numel() * values.element_size()
    pages = max(1, -(-size // _PAGE))
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _libc.mprotect(start + page * _PAGE, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * _PAGE - size if at_end else _PAGE
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
    copy = whole.view(values.dtype).view(values.shape)
    return copy.copy_(values)


def called(case: Case, arguments: Arguments, at_end: bool) -> None:
    """Forward and backward, with every tensor between pages, incoming gradients too."""

    def guard(value: object) -> object:
        return guarded(value, at_end) if isinstance(value, Tensor) and value.numel() else value

    arguments = tree_map(guard, arguments)
    given = case.with_leaves(arguments, [leaf.requires_grad_() for leaf in case.leaves(arguments)])
    outs = results(case.function(**given))
    pairs = [(out, guard(grad)) for out, grad in zip(outs, incoming(outs), strict=True) if out.requires_grad]
    smooth, grads = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(smooth, case.leaves(given), grads, materialize_grads=True)
    # Of what lies beside a tensor nothing came in.
    assert not any(value.isnan().any() for value in (*outs, *gradients)), case


def sizes_of(case: Case) -> Iterator[dict[str, int]]:
    """From one element to more than vectors and blocks hold, most of them odd."""
    yield dict.fromkeys(case.sizes, 1)
    yield dict(case.sizes)
    yield case.crossing
    yield {name: min(size, 70) for name, size in case.larger.items()}


def main() -> None:
    isa = sys.argv[1]
    torch.manual_seed(0)
    if sys.argv[2:] == ["planted"]:
        values = guarded(torch.ones(10), at_end=True)
        print(ctypes.c_float.from_address(values.data_ptr() + 4 * 9).value, flush=True)
        print(ctypes.c_float.from_address(values.data_ptr() + 4 * 10).value)
    with velm_kernels.use_backend("cpu"), cpu.use_isa(isa), use_product("velm"):
        for case in cases.every():
            for dtype in cpu.DTYPES:
                for sizes in sizes_of(case):
                    arguments = case.arguments(dtype, **sizes)
                    for at_end in (True, False):
                        called(case, arguments, at_end)
    print("done")


if __name__ == "__main__":
    main()
