"""attention_pool on every backend: numbers, unread tokens, both ways, torch features, bad arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_once, every_backend_with_cuda, every_cpu_backend, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.pooling.attention_pool import _canonical_rows, _folds, attention_pool, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "query", "key_weight", "value_weight", "value_bias")


def inputs(
    generator: torch.Generator, batch: int, tokens: int, queries: int, heads: int, head_dim: int, dim: int, shared: bool
) -> dict[str, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features, values = heads * head_dim, heads * (head_dim + 1)
    return {
        "x": randn(batch, tokens, dim),
        "query": randn(*(() if shared else (batch,)), queries, features),
        # Scores and values as large as those of a trained layer.
        "key_weight": 2 * randn(features, dim) * dim**-0.5,
        "value_weight": randn(values, dim) * dim**-0.5,
        "value_bias": randn(values),
    }


def run(function: Any, tensors: dict[str, Tensor], upstream: Tensor, **given: Any) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **given)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def compare(
    backend: Backend, tensors: dict[str, Tensor], live: Tensor, upstream: Tensor, dtype: torch.dtype, **given: Any
) -> dict[str, Tensor]:
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = run(reference.attention_pool, {n: t.double() for n, t in rounded.items()}, upstream, **given)
    plain = run(reference.attention_pool, rounded, upstream, **given)
    # Plain torch may fold by hand as well: what it then rounds in between is another.
    with velm_kernels.use_backend("reference"):
        by_hand = run(attention_pool, rounded, upstream, **given)
    poisoned = rounded | {"x": torch.where(live[..., None], rounded["x"], torch.nan)}
    with backend.use():
        got = run(attention_pool, poisoned, upstream, **given)
    for name in got:
        floor = 1e-2 * float(upstream.norm()) if name.startswith("grad") else 0.0
        assert_accurate(name, got[name], [plain[name], by_hand[name]], exact[name], dtype, floor=floor, ulps=8.0)
    assert not got["grad_x"][~live].any()
    return got


@every_kernel
@settings(max_examples=min(12, settings().max_examples))
@given(
    batch=st.integers(0, 3),
    tokens=st.one_of(st.integers(0, 20), st.integers(60, 150)),
    queries=st.integers(1, 3),
    heads=st.integers(1, 5),
    head_dim=st.integers(3, 16),
    dim=st.integers(1, 70),
    shared=st.booleans(),
    lengths=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.none() | st.just(0.7),
    seed=st.integers(0, 2**16),
)
@example(2, 70, 1, 5, 16, 64, True, True, False, torch.float32, None, 0)
@example(1, 150, 2, 3, 16, 48, False, False, True, torch.float32, None, 1)
@example(3, 33, 1, 4, 8, 32, False, True, True, torch.bfloat16, None, 2)
@example(2, 0, 1, 2, 4, 8, True, False, False, torch.float32, None, 3)
def test_numbers(
    backend: Backend,
    batch: int,
    tokens: int,
    queries: int,
    heads: int,
    head_dim: int,
    dim: int,
    shared: bool,
    lengths: bool,
    masked: bool,
    dtype: torch.dtype,
    scale: float | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = inputs(generator, batch, tokens, queries, heads, head_dim, dim, shared)
    given: dict[str, Any] = {"heads": heads, "scale": scale}
    live = torch.ones(batch, tokens, dtype=torch.bool)
    if lengths:
        given["lengths"] = torch.randint(0, tokens + 1, (batch,), generator=generator)
        live &= torch.arange(tokens) < given["lengths"][:, None]
    if masked:
        given["mask"] = torch.rand(tokens, generator=generator) > 0.4
        live &= given["mask"]
    upstream = torch.randn(batch, queries, heads * (head_dim + 1), generator=generator, dtype=torch.float64)
    # A row of nothing is 0 here, and the bias alone in an ordinary projection.
    empty = ~live.any(1)
    upstream[empty] = 0.0
    if empty.any():
        tensors["value_bias"].zero_()
    got = compare(backend, tensors, live, upstream.to(dtype).double(), dtype, **given)
    assert not got["out"][empty].any()


@every_backend_with_cuda
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [(70, 0, 3, 140), ()], ids=str)
def test_packed_tokens(backend: Backend, shared: bool, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = inputs(generator, len(sizes), sum(sizes), 2, 3, 16, 40, shared)
    tensors["x"] = torch.randn(sum(sizes), 40, generator=generator, dtype=torch.float64)
    upstream = torch.randn(len(sizes), 2, 51, generator=generator, dtype=torch.float64)
    bounds = torch.tensor([0, *itertools.accumulate(sizes)])
    if not sizes:
        with backend.use():
            float32 = {name: tensor.float() for name, tensor in tensors.items()}
            assert run(attention_pool, float32, upstream, heads=3, cu_seqlens=bounds)["out"].shape == (0, 2, 51)
        return
    tensors["value_bias"].zero_()
    live = torch.ones(sum(sizes), dtype=torch.bool)
    got = compare(backend, tensors, live, upstream, torch.float32, heads=3, cu_seqlens=bounds)
    assert not got["out"][1].any()


@every_backend_with_cuda
def test_no_token_no_bias(backend: Backend) -> None:
    tensors = {n: t.float() for n, t in inputs(torch.Generator().manual_seed(0), 2, 9, 1, 2, 4, 24, True).items()}
    bounds, live = torch.tensor([0, 9, 9]), torch.tensor([[True], [False]]).expand(2, 9)
    packed = tensors | {"x": tensors["x"][0]}
    with backend.use():
        outs = [
            run(attention_pool, tensors, torch.ones(2, 1, 10), heads=2, lengths=torch.tensor([9, 0])),
            run(attention_pool, tensors, torch.ones(2, 1, 10), heads=2, mask=live),
            run(attention_pool, packed, torch.ones(2, 1, 10), heads=2, cu_seqlens=bounds),
        ]
        nothing = attention_pool(**(tensors | {"x": tensors["x"][:, :0]}), heads=2)
    for got in outs:
        assert got["out"][0].any() and not got["out"][1].any()
        torch.testing.assert_close(got["grad_value_bias"], torch.ones(10))
    assert not nothing.any()


@every_backend_once
def test_both_ways_are_the_same(backend: Backend) -> None:
    """With many queries keys and values are formed; and the key bias matters in neither."""
    generator = torch.Generator().manual_seed(0)
    tensors = {n: t.float() for n, t in inputs(generator, 2, 20, 16, 2, 8, 24, False).items()}
    key_bias = torch.randn(16, requires_grad=True)
    lengths = torch.tensor([20, 7])
    assert not _folds(tensors["x"], tensors["query"], tensors["key_weight"], tensors["value_weight"], 2)
    few = tensors | {"query": tensors["query"][:, :1]}
    assert _folds(few["x"], few["query"], few["key_weight"], few["value_weight"], 2)
    upstream = torch.randn(2, 16, 18)
    poisoned = tensors | {"x": tensors["x"].clone()}
    poisoned["x"][1, 7:] = torch.nan
    packed = torch.cat([tensors["x"][0], tensors["x"][1, :7]])
    bounds = torch.tensor([0, 20, 27])
    with backend.use():
        got = run(attention_pool, poisoned, upstream, heads=2, lengths=lengths, key_bias=key_bias)
        one = attention_pool(**few, heads=2, lengths=lengths, key_bias=key_bias)
        (grad,) = torch.autograd.grad(one.sum(), key_bias)
        ragged = attention_pool(**(tensors | {"x": packed}), heads=2, cu_seqlens=bounds)
    expected = run(reference.attention_pool, tensors, upstream, heads=2, lengths=lengths, key_bias=key_bias)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(one, got["out"][:, :1], rtol=2e-4, atol=2e-5)
    assert torch.equal(grad, torch.zeros(16))
    torch.testing.assert_close(ragged, got["out"], rtol=2e-4, atol=2e-5)


@every_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [5, 40])
def test_rows_that_are_nearly_one_token(backend: Backend, count: int, dtype: torch.dtype) -> None:
    """Gradients of scores keep their digits where what was pooled is nearly one token, whose rounding they would be
    otherwise; in segments of one piece and of several, with so few rows that products are kept and with more."""
    generator = torch.Generator().manual_seed(0)
    sizes, dim = (30, 200, 0, 64, 65), 70
    x, rows, grad = (
        torch.randn(shape, generator=generator).mul(size).to(dtype)
        for shape, size in (((sum(sizes), dim), 1), ((1, count, dim), 3), ((len(sizes), count, dim), 1))
    )

    def plain(x: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([(rows[0] @ part.T).softmax(-1) @ part for part in x.split(sizes)])

    bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)

    def ours(x: Tensor, rows: Tensor) -> Tensor:
        with backend.use():
            out, _ = torch.ops.velm.attention_pool_forward(x, rows, None, None, bounds, backend.name)
            return out

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, rows)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    # The kernel rounds its results alone to 16 bits, which makes an error of 0.2 ulp.
    results = zip(
        ("grad_x", "grad_rows"),
        gradients(ours, dtype),
        gradients(plain, torch.float32),
        gradients(plain, torch.float64),
        strict=True,
    )
    for name, got, rounded, exact in results:
        assert_accurate(name, got, rounded, exact, ulps=0.3)


@every_cpu_backend
@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_same_bits_for_any_number_of_threads(backend: Backend, shared: bool, count: int) -> None:
    tensors = inputs(torch.Generator().manual_seed(0), 2, 900, 1, 5, 8, 70, shared)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rows = torch.randn(1 if shared else 2, count, 70, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x = tensors["x"].clone().requires_grad_()
        with backend.use():
            arguments = _canonical_rows(x, rows, None, None, None)
            out, _ = torch.ops.velm.attention_pool_forward(*arguments.values(), "cpu")
        results.append([out, *torch.autograd.grad(out.cos().sum(), (x, rows))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_flops() -> None:
    tensors = inputs(torch.Generator().manual_seed(0), 2, 5, 1, 2, 3, 12, True)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    lengths = torch.tensor([3, 0])

    def call(*leaves: Tensor) -> Tensor:
        return attention_pool(**dict(zip(NAMES, leaves, strict=True)), heads=2, lengths=lengths)

    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call(*leaves)
    # The query into the key weight, scores and pooled tokens, the value weight.
    assert counter.get_total_flops() == 2 * 6 * 12 + 4 * 2 * (2 * 5 * 12) + 2 * 2 * 8 * 12
