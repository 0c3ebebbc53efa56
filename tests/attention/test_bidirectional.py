"""bidirectional_attention on every backend: numbers, unread positions, torch features, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import velm_kernels
from tests.conftest import (
    CUDA_KERNELS,
    INTERPRETED,
    Backend,
    every_backend_once,
    every_cpu_backend,
    every_kernel,
    first_and_last_cpu_backend,
)
from tests.numbers import assert_accurate
from velm_kernels.attention.bidirectional_attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query_a", "query_b", "value_a", "value_b")
LARGEST = 40 if INTERPRETED else 150
SEED = 2**40 + 12345


def run(function: Any, tensors: list[Tensor], upstream: list[Tensor], used: tuple[bool, ...], **arguments: Any) -> Any:
    """The four results and the gradients of the four tensors, from the results that are ``used``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    results = function(*leaves, **arguments)
    finite = [torch.where(torch.isinf(result), 0.0, result) for result in results]
    chosen = [(result, grad.to(result.dtype)) for result, grad, use in zip(finite, upstream, used) if use]
    outputs, wanted = zip(*chosen)
    grads = torch.autograd.grad(outputs, leaves, wanted, allow_unused=True, materialize_grads=True)
    named = dict(zip(("out_a", "out_b", "logsumexp_a", "logsumexp_b"), (result.detach() for result in results)))
    return named | {f"grad_{name}": grad for name, grad in zip(NAMES, grads)}


def floors(tensors: list[Tensor], masks: dict[str, Any], upstream: list[Tensor], scale: float, keep: float) -> Any:
    """Half of the results' sizes if their terms did not cancel, with even attention weights."""
    query_a, query_b, value_a, value_b = (tensor.double().abs() for tensor in tensors)

    def spread(grad: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        terms = grad.abs() @ value.transpose(-1, -2) / keep + 1
        if mask is None:
            return terms / max(1, terms.shape[-1])
        return terms * mask[:, None, None] / mask.sum(-1).clamp(min=1)[:, None, None, None]

    scores = spread(upstream[0], value_b, masks["mask_b"])
    scores = 0.5 * scale * (scores + spread(upstream[1], value_a, masks["mask_a"]).transpose(-1, -2))
    sizes = {"grad_query_a": scores @ query_b, "grad_query_b": scores.transpose(-1, -2) @ query_a}
    # The weights of a query add up to 1, so every output is about as large as one value.
    for name, query, value in (("out_a", query_a, value_b), ("out_b", query_b, value_a)):
        mean = value.mean((2, 3), keepdim=True).nan_to_num()
        sizes[name] = 0.5 * mean.expand(*query.shape[:3], value.shape[3])
    return {name: float(torch.linalg.vector_norm(size)) for name, size in sizes.items()}


def check(
    backend: Backend, batch: int, heads: int, a: int, b: int, dims: tuple[int, int, int], dtype: torch.dtype,
    masked: tuple[bool, bool], input_scale: float, dropout_p: float, used: tuple[bool, ...], layout: str, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def laid_out(x: Tensor) -> Tensor:
        if layout == "queries first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "columns first" else x

    dim, dim_a, dim_b = dims
    shapes = ((a, dim), (b, dim), (a, dim_a), (b, dim_b))
    tensors = [randn(batch, heads, *shape).to(dtype) for shape in shapes]
    tensors[:2] = [(input_scale * tensor.double()).to(dtype) for tensor in tensors[:2]]
    tensors = [laid_out(tensor) for tensor in tensors]
    masks = {
        "mask_a": randn(batch, a) > -0.3 if masked[0] else None,
        "mask_b": randn(batch, b) > -0.3 if masked[1] else None,
    }
    if masked[0] and seed % 4 == 0:
        masks["mask_a"][0] = False  # type: ignore[index]
    upstream = [randn(batch, heads, a, dim_b), randn(batch, heads, b, dim_a)]
    upstream += [randn(batch, heads, a), randn(batch, heads, b)]
    settings: dict[str, Any] = {**masks, "dropout_p": dropout_p}
    exact = run(reference.bidirectional_attention, [t.double() for t in tensors], upstream, used, **settings,
                seed=torch.tensor(SEED))  # fmt: skip
    plain = run(reference.bidirectional_attention, tensors, upstream, used, **settings, seed=torch.tensor(SEED))
    poisoned = [tensor.clone() for tensor in tensors]
    if masked[0]:
        poisoned[2].transpose(1, 2)[~masks["mask_a"]] = torch.nan  # type: ignore[operator]
    if masked[1]:
        poisoned[3].transpose(1, 2)[~masks["mask_b"]] = torch.inf  # type: ignore[operator]
    with backend.use():
        got = run(velm_kernels.bidirectional_attention, [laid_out(t) for t in poisoned], upstream, used, **settings,
                  seed=SEED, return_logsumexp=True)  # fmt: skip
    least = floors(tensors, masks, upstream, dim**-0.5, 1 - dropout_p)
    for name in got:
        assert_accurate(name, got[name], plain[name], exact[name], dtype, floor=least.get(name, 0.0))
    return got


flags = st.tuples(st.booleans(), st.booleans())
BF16 = torch.bfloat16
# What the examples of single cases change something of.
ORDINARY: dict[str, Any] = {
    "batch": 1,
    "heads": 1,
    "a": 3,
    "b": 3,
    "dims": (4, 4, 4),
    "dtype": torch.float32,
    "masked": (True, True),
    "input_scale": 1.0,
    "dropout_p": 0.0,
    "used": (True,) * 4,
    "layout": "heads first",
    "seed": 1,
}


@every_kernel
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    a=st.one_of(st.integers(0, 10), st.integers(0, LARGEST)),
    b=st.one_of(st.integers(0, 10), st.integers(0, LARGEST)),
    dims=st.tuples(*[st.one_of(st.sampled_from([8, 64]), st.integers(1, 70))] * 3),
    dtype=st.sampled_from(DTYPES),
    masked=flags,
    input_scale=st.sampled_from([0.1, 1.0, 3.0]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    used=st.sampled_from([(True,) * 4, (True, False, False, False), (False, True, True, False)]),
    layout=st.sampled_from(["heads first", "queries first", "columns first"]),
    seed=st.integers(0, 2**16),
)
@example(**ORDINARY | {"a": 0, "b": 3})
@example(**ORDINARY | {"a": 3, "b": 0})
@example(
    **ORDINARY
    | {"batch": 2, "a": 30, "b": 101, "dims": (256, 64, 33), "dtype": BF16, "layout": "queries first", "seed": 4}
)
@example(
    **ORDINARY
    | {
        "heads": 2,
        "a": 147,
        "b": 99,
        "dims": (33, 1, 17),
        "dtype": BF16,
        "masked": (True, False),
        "dropout_p": 0.3,
        "seed": 5,
    }
)
def test_numbers(backend: Backend, **case: Any) -> None:
    if backend.name == "device_on_host":
        case |= {"a": min(case["a"], 70), "b": min(case["b"], 70)}
    check(backend, **case)


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        # Rows and columns of every instance of the kernels, beyond one tile of each.
        {"dims": (256, 72, 8), "dtype": torch.float16, "dropout_p": 0.2},
        {"dims": (20, 128, 33), "a": 66, "b": 34, "dropout_p": 0.2},
        {"dims": (72, 16, 16), "dtype": torch.bfloat16, "used": (False, False, True, True)},
        {"dims": (64, 24, 64), "dtype": torch.float16, "a": 66, "b": 130, "masked": (False, False), "dropout_p": 0.2},
        # Columns split among blocks.
        {"dims": (10, 16, 40), "a": 20, "b": 600, "dropout_p": 0.2},
        {"dims": (130, 16, 8), "a": 520, "b": 33, "heads": 1, "dtype": torch.bfloat16},
        # The directions one by one.
        {"dims": (140, 8, 200), "dropout_p": 0.2},
    ],
    ids=str,
)
def test_cuda_tiles(backend: Backend, case: dict[str, Any]) -> None:
    check(backend, **ORDINARY | {"a": 35, "b": 67, "heads": 2, "seed": 2} | case)


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_cuda_refuses_more_than_256_features(backend: Backend) -> None:
    tensors = [torch.randn(1, 1, 3, dim) for dim in (8, 8, 257, 8)]
    with backend.use(), pytest.raises(velm_kernels.backends.NoBackendError, match="257"):
        velm_kernels.bidirectional_attention(*tensors)


@first_and_last_cpu_backend
@pytest.mark.parametrize("lengths", [(900, 110), (110, 900)], ids=str)
def test_long_sequences_and_same_bits_for_any_number_of_threads(backend: Backend, lengths: tuple[int, int]) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            check(backend, 1, 2, *lengths, (24, 16, 40), torch.float32, (True, True), 2.0, 0.2, (True,) * 4,
                  "heads first", 1)
        )  # fmt: skip
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@every_cpu_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(20, 50), (110, 30)], ids=str)
def test_rows_that_are_nearly_one_key(backend: Backend, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """The rounding of out to 16 bits must not be what is left of the gradients of scores."""
    generator = torch.Generator().manual_seed(0)
    a, b = lengths
    shapes = ((a, 16), (b, 16), (a, 16), (b, 16), (a, 16), (b, 16))
    sizes = (3, 3, 1, 1, 1, 1)
    *tensors, grad_a, grad_b = (
        torch.randn(2, 2, *shape, generator=generator).mul(size).to(dtype)
        for shape, size in zip(shapes, sizes, strict=True)
    )
    upstream, used, none = [grad_a.double(), grad_b.double()], (True, True), {"mask_a": None, "mask_b": None}
    with backend.use():
        got = run(velm_kernels.bidirectional_attention, tensors, upstream, used, **none)
    plain, exact = (
        run(reference.bidirectional_attention, [t.to(like) for t in tensors], upstream, used, **none)
        for like in (torch.float32, torch.float64)
    )
    for name in ("grad_query_a", "grad_query_b"):
        assert_accurate(name, got[name], plain[name], exact[name], ulps=0.5)


@every_backend_once
def test_dropout_is_the_same_in_a_compiled_call(backend: Backend) -> None:
    tensors = [torch.randn(2, 2, n, d).requires_grad_() for n, d in ((5, 8), (7, 8), (5, 6), (7, 4))]
    mask_b = torch.rand(2, 7) > 0.5

    def loss(*tensors: Tensor) -> Tensor:
        results = velm_kernels.bidirectional_attention(*tensors, mask_b=mask_b, dropout_p=0.3, seed=3)
        return sum(result.square().sum() for result in results)

    with backend.use():
        eager = torch.autograd.grad(loss(*tensors), tensors)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for ours, theirs in zip(compiled, eager):
        assert torch.equal(ours, theirs)


def test_is_what_grounding_dino_computes() -> None:
    """Its scores minus their maximum, clamped at +-50000, in the order of its own arithmetic."""
    query_a, query_b, value_a, value_b = (torch.randn(2, 3, n, 8) for n in (11, 6, 11, 6))
    mask_a, mask_b = torch.rand(2, 11) > 0.3, torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    scores = (query_a * 8**-0.5) @ query_b.transpose(-1, -2)
    scores = (scores - scores.max()).clamp(-50000, 50000)
    transposed = scores.transpose(-1, -2)
    transposed = (transposed - transposed.max(-1, keepdim=True)[0]).clamp(-50000, 50000)
    transposed = transposed.masked_fill(~mask_a[:, None, None], -torch.inf).softmax(-1)
    weights = scores.masked_fill(~mask_b[:, None, None], -torch.inf).softmax(-1)
    out_a, out_b = velm_kernels.bidirectional_attention(
        query_a, query_b, value_a, value_b, mask_a=mask_a, mask_b=mask_b
    )
    torch.testing.assert_close(out_a, weights @ value_b)
    torch.testing.assert_close(out_b, transposed @ value_a)


def test_float64_is_exact_to_float64() -> None:
    tensors = [
        torch.randn(2, 2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((3, 4), (5, 4), (3, 6), (5, 2))
    ]
    masks = {"mask_a": torch.tensor([[True, False, True]] * 2), "mask_b": torch.tensor([[True] * 5, [False] * 5])}

    def finite(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = velm_kernels.bidirectional_attention(*tensors, **masks, dropout_p=0.3, seed=1, return_logsumexp=True)
        return tuple(torch.where(torch.isinf(result), 0.0, result) for result in results)

    assert torch.autograd.gradcheck(finite, tensors, fast_mode=True)


def test_flops() -> None:
    tensors = [torch.randn(2, 2, n, d, requires_grad=True) for n, d in ((3, 8), (5, 8), (3, 6), (5, 4))]
    with FlopCounterMode(display=False) as counter:
        out_a, out_b = velm_kernels.bidirectional_attention(*tensors)
        (out_a.sum() + out_b.sum()).backward()
    pairs = 2 * 2 * 3 * 5
    assert counter.get_total_flops() == 2 * pairs * (8 + 6 + 4) + 2 * pairs * (3 * 8 + 2 * 6 + 2 * 4)


Q_A, Q_B = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("tensors", "more", "error", "message"),
    [
        ((Q_A[0], Q_B, Q_A, Q_B), {}, ValueError, r"query_a: expected .*given \(3, 4, 8\)"),
        ((Q_A, Q_B[..., :4], Q_A, Q_B), {}, ValueError, r"query_b: expected .*\(2, 3, 5, 8\), given \(2, 3, 5, 4\)"),
        ((Q_A, Q_B, Q_B, Q_B), {}, ValueError, r"value_a: expected .*\(2, 3, 4, 8\), given \(2, 3, 5, 8\)"),
        ((Q_A, Q_B, Q_A, Q_B.half()), {}, TypeError, "value_b: expected dtype torch.float32, given torch.float16"),
        ((Q_A, Q_B, Q_A, 1.0), {}, TypeError, "value_b: expected a tensor, given float"),
        ((Q_A, Q_B, Q_A, Q_B.to("meta")), {}, ValueError, "value_b: expected device cpu like query_a, given meta"),
        ((Q_A, Q_B, Q_A, Q_B), {"mask_a": torch.ones(2, 5).bool()}, ValueError, r"mask_a: .*\(2, 4\), given \(2, 5\)"),
        ((Q_A, Q_B, Q_A, Q_B), {"mask_b": torch.ones(2, 5)}, TypeError, "mask_b: .*torch.bool, given torch.float32"),
        (
            (Q_A, Q_B, Q_A, Q_B),
            {"dropout_p": 1.0},
            ValueError,
            r"dropout_p: .* probability in \[0, 1\), given 1",
        ),
        ((Q_A, Q_B, Q_A, Q_B), {"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed: expected an integer"),
    ],
)
def test_bad_arguments(tensors: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        velm_kernels.bidirectional_attention(*tensors, **more)
