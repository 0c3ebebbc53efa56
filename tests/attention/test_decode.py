"""Few queries over many keys: the kernel that reads every key and value once, in blocks, chunks and groups of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_cpu_backend, first_and_last_cpu_backend
from tests.numbers import assert_accurate
from velm_kernels.attention.cross_attention import reference

# In each layout keys are cut into several chunks.
KEYS = 1100


def heads_first(*shape: int) -> Tensor:
    return torch.randn(*shape)


def heads_last(batch: int, heads: int, length: int, dim: int) -> Tensor:
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def in_turns(batch: int, heads: int, length: int, dim: int) -> Tensor:
    """A half of what a projection to keys and values leaves: what lies between is NaN."""
    both = torch.full((batch, length, heads, 2 * dim), torch.nan)
    both[..., :dim] = torch.randn(batch, length, heads, dim)
    return both[..., :dim].transpose(1, 2)


LAYOUTS = {"heads first": heads_first, "heads last": heads_last, "in turns": in_turns}


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another dtype with the same strides, NaN between its elements."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.full((span,), torch.nan, dtype=dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def check(backend: Backend, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
    plain = reference.cross_attention(query, key, value, **options)
    exact = reference.cross_attention(query.double(), key.double(), value.double(), **options)
    with backend.use():
        got = velm_kernels.cross_attention(query, key, value, **options, return_logsumexp=True, return_key_mass=True)
    for name, ours, theirs, truth in zip(("out", "logsumexp", "key_mass"), got, plain, exact, strict=True):
        assert_accurate(name, ours, theirs, truth, query.dtype)


# Rows of a key head: as many as the kernel has loops for, and numbers between; head_dim and value_dim.
SIZES = [(1, 1, 128, 128), (2, 1, 64, 80), (1, 3, 80, 64), (4, 1, 128, 128), (5, 1, 33, 15), (4, 2, 64, 64)]
# All of them in each layout, and each in each dtype.
DECODED = [
    *((torch.float32, layout, sizes) for layout in LAYOUTS for sizes in SIZES),
    *(
        (dtype, list(LAYOUTS)[(place + shift) % len(LAYOUTS)], sizes)
        for shift, dtype in enumerate((torch.bfloat16, torch.float16))
        for place, sizes in enumerate(SIZES)
    ),
]


@first_and_last_cpu_backend
@pytest.mark.parametrize(("dtype", "layout", "sizes"), DECODED, ids=str)
def test_numbers(backend: Backend, dtype: torch.dtype, layout: str, sizes: tuple[int, int, int, int]) -> None:
    group, queries, head_dim, value_dim = sizes
    torch.manual_seed(group)
    query = heads_last(2, 3 * group, queries, head_dim).to(dtype)
    key, value = (converted(LAYOUTS[layout](2, 3, KEYS, dim), dtype) for dim in (head_dim, value_dim))
    check(backend, query, key, value, key_lengths=torch.tensor([KEYS, KEYS - 130]))


@every_cpu_backend
@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_blocks_of_which_some_heads_see_nothing(backend: Backend, layout: str) -> None:
    """Hidden keys and values are NaN, also where they fill whole blocks, of all heads or of one."""
    torch.manual_seed(0)
    query = torch.randn(2, 6, 1, 64)
    key, value = (LAYOUTS[layout](2, 3, KEYS, 64) for _ in range(2))
    mask = torch.rand(2, 6, 1, KEYS) > 0.3
    mask[..., 200:500] = False
    mask[:, 2:4, :, 600:1000] = False
    unseen = ~mask.view(2, 3, 2, KEYS).any(2)
    clean = [tensor.masked_fill(unseen[..., None], 0.0) for tensor in (key, value)]
    exact = reference.cross_attention(query.double(), *(tensor.double() for tensor in clean), mask=mask)
    plain = reference.cross_attention(query, *clean, mask=mask)
    poisoned = [tensor.masked_fill(unseen[..., None], torch.nan) for tensor in (key, value)]
    with backend.use():
        got = velm_kernels.cross_attention(query, *poisoned, mask=mask, return_logsumexp=True)
    for name, ours, theirs, truth in zip(("out", "logsumexp"), got, plain, exact, strict=False):
        assert_accurate(name, ours, theirs, truth, torch.float32)


@first_and_last_cpu_backend
@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_same_bits_for_any_number_of_threads(backend: Backend, layout: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 16, 1, 64)
    key, value = (LAYOUTS[layout](1, 4, 3000, 64) for _ in range(2))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with backend.use():
                results.append(velm_kernels.cross_attention(query, key, value, return_logsumexp=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@every_cpu_backend
def test_a_value_reaches_only_rows_that_see_it(backend: Backend) -> None:
    """NaN of a score and of a value come out, in the row and the column that they belong to."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 32), torch.randn(1, 2, KEYS, 32), torch.randn(1, 2, KEYS, 32)
    value[0, 0, 777, 5] = torch.nan
    key[0, 1, 333, 7] = torch.nan
    with backend.use():
        out = velm_kernels.cross_attention(query, key, value)
    expected = torch.zeros(1, 4, 1, 32, dtype=torch.bool)
    expected[0, :2, :, 5] = True
    expected[0, 2:] = True
    assert torch.equal(out.isnan(), expected)
