"""Numbers of cross-attention on every backend: outputs, extras and every gradient against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import velm_kernels
from tests.attention.cases import Case, cases
from tests.conftest import (
    INTERPRETED,
    Backend,
    every_backend_with_cuda,
    every_cpu_backend,
    every_kernel,
    first_and_last_cpu_backend,
)
from tests.numbers import assert_accurate
from velm_kernels.attention.cross_attention import reference

LARGEST = 40 if INTERPRETED else 150
SEED = 2**40 + 12345


def run(function: Any, tensors: dict[str, torch.Tensor], upstream: list[torch.Tensor], **arguments: Any) -> Any:
    """Results of ``function`` (out, logsumexp, key_mass) and the gradients of all ``tensors``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, logsumexp, key_mass = function(**leaves, **arguments)
    finite = torch.where(torch.isinf(logsumexp), 0.0, logsumexp)
    wanted = upstream[0].to(out.dtype), upstream[1].to(finite.dtype)
    loss_gradients = torch.autograd.grad(
        [out, finite], list(leaves.values()), wanted, allow_unused=True, materialize_grads=True
    )
    results = {"out": out.detach(), "logsumexp": logsumexp.detach(), "key_mass": key_mass}
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, loss_gradients, strict=True)}
    return results


def check(case: Case, backend: Backend) -> dict[str, torch.Tensor]:
    tensors = case.tensors()
    masking = case.masking()
    visible = case.visible(masking, tensors.get("bias"))
    options = case.settings() | masking
    upstream = case.upstream()
    floors = case.floors(tensors, visible, upstream[0])
    seed = torch.tensor(SEED)
    exact = run(reference.cross_attention, {n: t.double() for n, t in tensors.items()}, upstream, **options, seed=seed)
    plain = run(reference.cross_attention, tensors, upstream, **options, seed=seed)
    with backend.use():
        got = run(
            velm_kernels.cross_attention,
            case.poisoned(tensors, visible),
            upstream,
            **options,
            seed=SEED,
            return_logsumexp=True,
            return_key_mass=True,
        )
    for name, value in got.items():
        assert_accurate(name, value, plain[name], exact[name], case.dtype, floor=floors.get(name, 0.0))
    return got


@every_kernel
@given(case=cases(largest=LARGEST))
@example(case=Case(queries=0))
@example(case=Case(keys=0, bias_shape=(True, True, True, True)))
@example(case=Case(queries=33, keys=257, head_dim=64, value_dim=64, group=2, dtype=torch.bfloat16))
@example(
    case=Case(queries=37, keys=211, head_dim=33, value_dim=15, group=2, dtype=torch.bfloat16, layout="sliced",
              masks=frozenset({"key_ranges"}), norms=(True, True), softcap=3.0, dropout_p=0.2)
)  # fmt: skip
@example(
    case=Case(queries=7, keys=101, head_dim=1, value_dim=1, dtype=torch.bfloat16, is_causal=True,
              masks=frozenset({"key_mask"}), bias_shape=(False, True, True, True))
)  # fmt: skip
@example(case=Case(queries=1, keys=300, head_dim=64, value_dim=64, group=4, masks=frozenset({"key_lengths"})))
@example(case=Case(queries=2, keys=2 * LARGEST, group=2, dropout_p=0.2, softcap=5.0, masks=frozenset({"key_mask"})))
@example(case=Case(queries=20, keys=40, bias_shape=(False, True, True, True), masks=frozenset({"key_ranges"})))
@example(case=Case(queries=20, keys=40, bias_shape=(False, False, False, False), dropout_p=0.3))
@example(case=Case(head_dim=256, value_dim=256, queries=17, keys=19, norms=(True, True)))
def test_numbers(backend: Backend, case: Case) -> None:
    if INTERPRETED:
        # Tiles of 16 x 16: fewer rows cross the same borders.
        case = replace(case, queries=min(case.queries, 20), keys=min(case.keys, 300 if case.queries <= 2 else 40))
    elif backend.name == "device_on_host":
        case = replace(case, queries=min(case.queries, 70), keys=min(case.keys, 300 if case.queries <= 2 else 70))
    check(case, backend)


@first_and_last_cpu_backend
@pytest.mark.parametrize(("queries", "keys"), [(70, 530), (2, 3100)])
def test_same_bits_for_any_number_of_threads(backend: Backend, queries: int, keys: int) -> None:
    case = Case(
        batch=1, kv_heads=3, group=2, queries=queries, keys=keys, bias_shape=(False, False, True, True), dropout_p=0.1,
        masks=frozenset({"key_ranges"}), norms=(True, True), poison=False,
    )  # fmt: skip
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(check(case, backend))
    for name, other in itertools.product(results[0], results[1:]):
        assert torch.equal(results[0][name], other[name]), name


@every_cpu_backend
def test_key_mass_of_more_keys_than_weights_are_kept_for(backend: Backend) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 1, 33_000, 4), torch.randn(1, 1, 33_000, 4)
    *_, plain = reference.cross_attention(query, key, value)
    *_, exact = reference.cross_attention(query.double(), key.double(), value.double())
    with backend.use():
        _, mass = velm_kernels.cross_attention(query, key, value, return_key_mass=True)
    # The weights are exponentials of differences to a logsumexp near 10, whose last place is 8 of those of a weight.
    assert_accurate("key_mass", mass, plain, exact, torch.float32, ulps=16)


SHARED_BIASES = [(False, True, True, True), (False, False, True, True), (True, True, True, True)]


@first_and_last_cpu_backend
@pytest.mark.parametrize("bias_shape", SHARED_BIASES)
def test_bias_shared_along_the_batch(backend: Backend, bias_shape: tuple[bool, bool, bool, bool]) -> None:
    """Tiles of bias and of its gradient serve several batch entries, each of which sees a part of its own."""
    masks = frozenset({"key_lengths", "key_ranges"})
    check(Case(batch=3, kv_heads=2, group=1, queries=70, keys=230, bias_shape=bias_shape, masks=masks), backend)


# The reference takes the sequences one by one: slow.
@every_kernel
@settings(max_examples=min(12, settings.default.max_examples))
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=0, max_size=4),
    is_causal=st.booleans(),
    ranges=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(lengths=[], is_causal=False, ranges=False, dtype=torch.float32)
@example(lengths=[(3, 0), (0, 5), (1, 200)], is_causal=False, ranges=False, dtype=torch.float32)
@example(lengths=[(1, 1)], is_causal=False, ranges=False, dtype=torch.float32)
def test_varlen_is_each_sequence_alone(
    backend: Backend, lengths: list[tuple[int, int]], is_causal: bool, ranges: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, head_dim, value_dim = 4, 2, 24, 16
    generator = torch.Generator().manual_seed(len(lengths))
    cu_q = torch.tensor([0, *itertools.accumulate(q for q, _ in lengths)])
    cu_k = torch.tensor([0, *itertools.accumulate(k for _, k in lengths)])
    tokens, key_tokens = int(cu_q[-1]), int(cu_k[-1])

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = randn(tokens, heads, head_dim), randn(key_tokens, kv_heads, head_dim)
    value, upstream = randn(key_tokens, kv_heads, value_dim), randn(tokens, heads, value_dim)
    arguments: dict[str, Any] = {"is_causal": is_causal, "dropout_p": 0.1}
    start = torch.zeros(tokens, dtype=torch.int64)
    stop = torch.cat([torch.zeros(0, dtype=torch.int64)] + [torch.full((q,), k - k // 3) for q, k in lengths])

    def packed(function: Any, dtype: torch.dtype, **more: Any) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        results = function(*leaves, **arguments, **more)
        grads = torch.autograd.grad(results[0], leaves, upstream.to(dtype), materialize_grads=True, allow_unused=True)
        return [result.detach() for result in results] + list(grads)

    def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> list[torch.Tensor]:
        parts = [(query.new_zeros(0, heads, value_dim), query.new_zeros(heads, 0), query.new_zeros(heads, 0))]
        for s in range(len(lengths)):
            rows, cols = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
            inputs = [t.transpose(0, 1)[None] for t in (query[rows], key[cols], value[cols])]
            if ranges:
                more["key_ranges"] = (start[None, rows], stop[None, rows])
            out, logsumexp, mass = reference.cross_attention(*inputs, **more, first_batch=s, seed=torch.tensor(SEED))
            parts.append((out[0].transpose(0, 1), logsumexp[0], mass[0]))
        outs, logsumexps, masses = zip(*parts, strict=True)
        # Without any sequence there is nothing to differentiate; autograd wants a graph all the same.
        return [torch.cat(outs) + 0 * query.sum(), torch.cat(logsumexps, 1), torch.cat(masses, 1)]

    exact, plain = packed(one_by_one, torch.float64), packed(one_by_one, dtype)
    with backend.use():
        got = packed(
            velm_kernels.cross_attention_varlen,
            dtype,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            seed=SEED,
            return_logsumexp=True,
            return_key_mass=True,
            **({"key_ranges": (start, stop)} if ranges else {}),
        )
    names = ("out", "logsumexp", "key_mass", "grad_query", "grad_key", "grad_value")
    # The gradient of scores over one key is 0: its terms, which cancel, are as large as upstream gradients.
    floors = dict.fromkeys(("grad_query", "grad_key"), 0.5 * float(torch.linalg.vector_norm(upstream)))
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=True):
        assert_accurate(name, ours, theirs, truth, dtype, floor=floors.get(name, 0.0))


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_backend_with_cuda
def test_rows_that_attend_to_nearly_one_key(backend: Backend, dtype: torch.dtype, rows: str) -> None:
    """What is left of their gradients is a difference of nearly equal numbers; where rows are many, one of them was
    rounded to 16 bits, as those of plain torch are."""
    queries, keys = (1, 50) if rows == "few" else (70, 40 if INTERPRETED else 300)
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (1, 2, queries, 64), "key": (1, 2, keys, 64), "value": (1, 2, keys, 64)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    nearest = torch.randint(keys, (1, 2, queries, 1), generator=generator)
    tensors["bias"] = torch.full((1, 2, queries, keys), -8.0).scatter(3, nearest, 0.0).to(dtype)
    upstream = [torch.randn(1, 2, queries, 64, generator=generator), torch.zeros(1, 2, queries)]
    exact = run(reference.cross_attention, {name: x.double() for name, x in tensors.items()}, upstream)
    plain = run(reference.cross_attention, tensors, upstream)
    with backend.use():
        extras = {"return_logsumexp": True, "return_key_mass": True}
        got = run(velm_kernels.cross_attention, tensors, upstream, **extras)
    for name in ("grad_query", "grad_key", "grad_bias"):
        assert_accurate(name, got[name], plain[name], exact[name], dtype)


@every_backend_with_cuda
def test_expanded_inputs(backend: Backend) -> None:
    """One query set for the whole batch (Q-Former) and one key for all heads arrive as stride 0."""
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(3, 1, 20, 16), torch.randn(3, 1, 20, 16)
    with backend.use():
        got = velm_kernels.cross_attention(
            query.expand(3, -1, -1, -1), key.expand(-1, 4, -1, -1), value.expand(-1, 4, -1, -1)
        )
        same = velm_kernels.cross_attention(query.repeat(3, 1, 1, 1), key.repeat(1, 4, 1, 1), value.repeat(1, 4, 1, 1))
    assert torch.equal(got, same)


def test_float64_is_computed_by_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    query, key = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    got = velm_kernels.cross_attention(query, key, key)
    torch.testing.assert_close(got, reference.cross_attention(query, key, key)[0])
    assert not recwarn.list
