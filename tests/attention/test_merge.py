"""merge_attention on every backend: numbers, absent shards, torch features, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.attention.merge_attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(function: Any, outs: Tensor, lses: Tensor, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
    out, logsumexp = function(outs, lses)
    finite = torch.where(torch.isinf(logsumexp), 0.0, logsumexp)
    grads = torch.autograd.grad([out, finite], [outs, lses], [upstream[0].to(out.dtype), upstream[1].to(lses.dtype)])
    return {"out": out.detach(), "logsumexp": logsumexp.detach(), "grad_outs": grads[0], "grad_logsumexps": grads[1]}


def draw(
    shards: int, batch: int, heads: int, queries: int, dim: int, dtype: torch.dtype, seed: int, spread: float
) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outs = randn(shards, batch, heads, queries, dim).to(dtype)
    lses = (spread * randn(shards, batch, heads, queries)).float()
    lses[torch.rand(lses.shape, generator=generator) < 0.3] = -torch.inf
    return outs, lses, (randn(batch, heads, queries, dim), randn(batch, heads, queries))


def exact_and_plain(outs: Tensor, lses: Tensor, upstream: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    exact = run(reference.merge_attention, outs.double(), lses.double(), upstream)
    return exact, run(reference.merge_attention, outs, lses, upstream)


@every_kernel
@given(
    shards=st.integers(1, 5),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.one_of(st.integers(0, 8), st.integers(0, 70)),
    dim=st.one_of(st.sampled_from([16, 64]), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    layout=st.sampled_from(["heads first", "queries first", "columns first"]),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(3, 1, 2, 0, 4, torch.float32, 1.0, "heads first", False, 0)
@example(2, 1, 0, 3, 4, torch.float32, 1.0, "heads first", False, 0)
def test_numbers(
    backend: Backend,
    shards: int,
    batch: int,
    heads: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    spread: float,
    layout: str,
    packed: bool,
    seed: int,
) -> None:
    outs, lses, upstream = draw(shards, 1 if packed else batch, heads, queries, dim, dtype, seed, spread)
    exact, plain = exact_and_plain(outs, lses, upstream)
    poisoned = torch.where((lses == -torch.inf)[..., None], torch.nan, outs)
    if layout == "queries first":
        poisoned = poisoned.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "columns first":
        poisoned = poisoned.transpose(3, 4).contiguous().transpose(3, 4)

    def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        if packed:
            out, logsumexp = velm_kernels.merge_attention(outs[:, 0].transpose(1, 2), lses[:, 0])
            return out.transpose(0, 1)[None], logsumexp[None]
        return velm_kernels.merge_attention(outs, lses)

    with backend.use():
        got = run(merge, poisoned, lses, upstream)
    # The terms of these sums cancel: their errors are compared with the terms.
    weights = torch.exp(lses.double() - exact["logsumexp"]).nan_to_num(0.0)
    products = (upstream[0] * outs.double()).abs().sum(-1)
    floors = {"grad_logsumexps": 0.25 * float((weights * (products + (weights * products).sum(0) + 1)).norm())}
    for name in got:
        arithmetic = torch.float32 if name == "logsumexp" else dtype
        assert_accurate(name, got[name], plain[name], exact[name], arithmetic, floor=floors.get(name, 0.0))
    absent = lses == -torch.inf
    assert not got["grad_logsumexps"][absent].any() and not got["grad_outs"][absent].any()
    everywhere = absent.all(0)
    assert not got["out"][everywhere].any() and (got["logsumexp"][everywhere] == -torch.inf).all()


@every_backend_with_cuda
@pytest.mark.parametrize("offset", [30.0, -1000.0])
def test_logsumexps_far_from_zero(backend: Backend, offset: float) -> None:
    """Weights are as exact as their differences, whatever the last place of the logsumexp of all shards."""
    outs, lses, upstream = draw(3, 2, 2, 7, 16, torch.float32, 0, 2.0)
    exact, plain = exact_and_plain(outs, lses + offset, upstream)
    with backend.use():
        got = run(velm_kernels.merge_attention, outs, lses + offset, upstream)
    for name in got:
        assert_accurate(name, got[name], plain[name], exact[name])


@every_backend_with_cuda
def test_shards_of_the_keys_merge_to_attention_over_all(backend: Backend) -> None:
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (9, 40, 40))
    upstream = torch.randn(2, 3, 9, 8)
    lengths = torch.tensor([17, 40])

    def sharded() -> Tensor:
        parts = [
            velm_kernels.cross_attention(
                query,
                key[:, :, first:stop],
                value[:, :, first:stop],
                key_lengths=(lengths - first).clamp(0, stop - first),
                return_logsumexp=True,
            )
            for first, stop in ((0, 13), (13, 20), (20, 40))
        ]
        outs, lses = zip(*parts, strict=True)
        return velm_kernels.merge_attention(outs, lses)[0]

    with backend.use():
        whole = velm_kernels.cross_attention(query, key, value, key_lengths=lengths)
        merged = sharded()
        expected = torch.autograd.grad(whole, (query, key, value), upstream)
        got = torch.autograd.grad(merged, (query, key, value), upstream)
    torch.testing.assert_close(merged, whole)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
