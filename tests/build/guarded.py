"""Calls operators on tensors that end, or begin, at a page that may not be touched.

    python -m tests.build.guarded ISA              every operator of the library for ISA
    python -m tests.build.guarded ISA planted      reads one element too many: must die of it

Unlike AddressSanitizer it needs no other build: what is tested are the libraries that are shipped.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

import velm_kernels
from velm_kernels.backends import cpu
from velm_kernels.pooling.reference import MODES
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


def attention(dtype: torch.dtype, at_end: bool, queries: int, keys: int, dim: int) -> None:
    def leaf(*shape: int) -> Tensor:
        return guarded(torch.randn(shape).to(dtype), at_end).requires_grad_()

    query, key, value = leaf(2, 4, queries, dim), leaf(2, 2, keys, dim), leaf(2, 2, keys, dim + 1)
    weights = leaf(dim), leaf(dim)
    start = guarded(torch.zeros(2, queries, dtype=torch.int32), at_end)
    stop = guarded(torch.randint(0, keys + 1, (2, queries), dtype=torch.int32), at_end)
    mask = guarded(torch.rand(2, 1, queries, keys) > 0.2, at_end)
    key_mask = guarded(torch.rand(2, keys) > 0.2, at_end)
    for options in (
        {},
        {"bias": leaf(1, 4, queries, keys), "mask": mask},
        {"key_ranges": (start, stop), "key_mask": key_mask, "dropout_p": 0.1},
        {"query_norm_weight": weights[0], "key_norm_weight": weights[1], "is_causal": True},
    ):
        out, mass = velm_kernels.cross_attention(query, key, value, return_key_mass=True, **options)
        wanted = [query, key, value, *(t for t in options.values() if isinstance(t, Tensor) and t.requires_grad)]
        torch.autograd.grad(out, wanted, guarded(torch.ones_like(out), at_end))
        assert out.isfinite().all() and mass.isfinite().all()
    a, b = leaf(1, 2, queries, dim), leaf(1, 2, keys, dim)
    value_a, value_b = leaf(1, 2, queries, dim), leaf(1, 2, keys, dim)
    outs = velm_kernels.bidirectional_attention(a, b, value_a, value_b)
    torch.autograd.grad(outs, (a, b, value_a, value_b), [guarded(torch.ones_like(out), at_end) for out in outs])


def linear(dtype: torch.dtype, at_end: bool, rows: int, in_features: int, out_features: int) -> None:
    shapes = ((rows, in_features), (out_features, in_features), (out_features,), (rows, out_features))
    x, weight, bias, residual = (guarded(torch.randn(s).to(dtype), at_end).requires_grad_() for s in shapes)
    with use_product("velm"):
        out = velm_kernels.linear(x, weight, bias, "gelu", residual)
        torch.autograd.grad(out, (x, weight, bias), guarded(torch.ones_like(out), at_end))
    assert out.isfinite().all()


def pooling(dtype: torch.dtype, at_end: bool, tokens: int, dim: int) -> None:
    mask = guarded(torch.rand(2, tokens) > 0.3, at_end)
    bounds = guarded(torch.tensor([0, tokens // 3, 2 * tokens], dtype=torch.int32), at_end)
    for mode in MODES:
        for channels_first in (False, True):
            shape = (2, dim, tokens) if channels_first else (2, tokens, dim)
            x = guarded(torch.randn(shape).to(dtype), at_end).requires_grad_()
            for out in (
                velm_kernels.masked_pool(x, mask=mask, mode=mode, channels_first=channels_first),
                velm_kernels.segment_pool(x.view(2 * tokens, dim), bounds, mode),
            ):
                torch.autograd.grad(out, x, guarded(torch.ones_like(out), at_end))
                assert out.isfinite().all()
    x, rows = (guarded(torch.randn(2, n, dim).to(dtype), at_end).requires_grad_() for n in (tokens, 3))
    out, _ = torch.ops.velm.attention_pool_forward(x, rows, None, mask, None, "cpu")
    torch.autograd.grad(out, (x, rows), guarded(torch.ones_like(out), at_end))
    assert out.isfinite().all()


def fusion(dtype: torch.dtype, at_end: bool, rows: int, dx: int, dy: int, out_features: int) -> None:
    shapes = ((rows, dx), (rows, dy), (out_features, dx, dy), (out_features,))
    leaves = [guarded(torch.randn(s).to(dtype), at_end).requires_grad_() for s in shapes]
    out = velm_kernels.bilinear(*leaves)
    torch.autograd.grad(out, leaves, guarded(torch.ones_like(out), at_end))
    assert out.isfinite().all()
    for layout in ("inner", "outer"):
        a, b = (guarded(torch.randn(rows, 3 * dx).to(dtype), at_end).requires_grad_() for _ in range(2))
        out = velm_kernels.factorized_pool(a, b, 3, layout, True, True, 0.1)
        torch.autograd.grad(out, (a, b), guarded(torch.ones_like(out), at_end))
        assert out.isfinite().all()
    for first in (False, True):
        x = guarded(torch.randn((2, dx, dy) if first else (2, dy, dx)).to(dtype), at_end).requires_grad_()
        gamma, beta = (guarded(torch.randn(2, dx).to(dtype), at_end).requires_grad_() for _ in range(2))
        out = velm_kernels.film(x, gamma, beta, channels_first=first)
        torch.autograd.grad(out, (x, gamma, beta), guarded(torch.ones_like(out), at_end))
    hashes = [velm_kernels.make_sketch(dim, out_features) for dim in (dx, dy)]
    hashes = [velm_kernels.Sketch(*(guarded(part, at_end) for part in pair)) for pair in hashes]
    pair = [guarded(torch.randn(rows, dim).to(dtype), at_end).requires_grad_() for dim in (dx, dy)]
    out = velm_kernels.compact_bilinear(*pair, *hashes, out_features)
    torch.autograd.grad(out, pair, guarded(torch.ones_like(out), at_end))
    weights = guarded(torch.randn(2, 2), at_end).requires_grad_()
    out = velm_kernels.weighted_sum([x.transpose(1, 2), gamma], weights)
    torch.autograd.grad(out, (x, gamma, weights), guarded(torch.ones_like(out), at_end))
    assert out.isfinite().all()


def bilinear_attention(dtype: torch.dtype, at_end: bool, regions: int, words: int, k: int) -> None:
    shapes = ((2, regions, k), (2, words, k), (3, k), (3,))
    leaves = [guarded(torch.randn(s).to(dtype), at_end).requires_grad_() for s in shapes]
    masks = {"v_mask": guarded(torch.rand(2, regions) > 0.3, at_end)}
    masks["q_lengths"] = guarded(torch.tensor([words // 2, words], dtype=torch.int32), at_end)
    maps, logits = velm_kernels.bilinear_attention(*leaves, return_logits=True, **masks)
    grads = [guarded(torch.ones_like(maps), at_end) for _ in range(2)]
    torch.autograd.grad((maps, logits), leaves, grads)
    attention = guarded(maps.detach(), at_end).requires_grad_()
    out = velm_kernels.bilinear_attention_pool(*leaves[:2], attention, **masks)
    torch.autograd.grad(out, (*leaves[:2], attention), guarded(torch.ones_like(out), at_end))
    assert maps.isfinite().all() and out.isfinite().all()


def main() -> None:
    isa = sys.argv[1]
    torch.manual_seed(0)
    if sys.argv[2:] == ["planted"]:
        values = guarded(torch.ones(10), at_end=True)
        print(ctypes.c_float.from_address(values.data_ptr() + 4 * 9).value, flush=True)
        print(ctypes.c_float.from_address(values.data_ptr() + 4 * 10).value)
    with velm_kernels.use_backend("cpu"), cpu.use_isa(isa):
        for dtype in cpu.DTYPES:
            for at_end in (True, False):
                for sizes in ((1, 1, 1), (3, 17, 5), (33, 65, 33), (7, 33, 64), (70, 31, 200)):
                    attention(dtype, at_end, *sizes)
                for sizes in ((1, 1, 1), (3, 17, 5), (33, 65, 33), (70, 100, 129)):
                    linear(dtype, at_end, *sizes)
                for sizes in ((1, 1), (19, 33), (33, 50)):
                    pooling(dtype, at_end, *sizes)
                for sizes in ((1, 1, 1, 1), (3, 17, 5, 2), (33, 14, 40, 19)):
                    fusion(dtype, at_end, *sizes)
                for sizes in ((1, 1, 1), (5, 17, 33), (100, 14, 300)):
                    bilinear_attention(dtype, at_end, *sizes)
    print("done")


if __name__ == "__main__":
    main()
