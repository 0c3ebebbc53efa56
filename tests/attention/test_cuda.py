"""The CUDA kernels of cross-attention on threads of the host: numbers, layouts, large offsets, masks that hide."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

import velm_kernels
from tests.attention.cases import Case, cases
from tests.attention.test_cross_attention import check
from tests.conftest import DEVICE_ON_HOST, Backend
from tests.numbers import assert_accurate
from velm_kernels.attention.cross_attention import reference
from velm_kernels.backends import cuda

pytestmark = list(DEVICE_ON_HOST.marks)

SEED = 2**40 + 12345


def on_device(*args: Any, **kwargs: Any) -> Any:
    with velm_kernels.use_backend("device_on_host"):
        return velm_kernels.cross_attention(*args, **kwargs)


# Interpreted threads are slow: few examples, and besides every instance of the kernel.
@settings(max_examples=8)
@given(case=cases(largest=70))
@example(case=Case(queries=0))
@example(case=Case(keys=0, bias_shape=(True, True, True, True)))
@example(case=Case(queries=33, keys=130, head_dim=64, value_dim=64, group=2, dtype=torch.bfloat16, is_causal=True))
@example(
    case=Case(queries=37, keys=111, head_dim=33, value_dim=15, group=2, dtype=torch.bfloat16, layout="sliced",
              masks=frozenset({"key_ranges"}), norms=(True, True), softcap=3.0, dropout_p=0.2)
)  # fmt: skip
@example(
    case=Case(queries=7, keys=101, head_dim=1, value_dim=1, dtype=torch.float16, is_causal=True,
              masks=frozenset({"key_mask"}), bias_shape=(False, True, True, True), bias_float32=True)
)  # fmt: skip
@example(case=Case(queries=1, keys=200, head_dim=64, value_dim=64, group=4, masks=frozenset({"key_lengths"})))
@example(case=Case(queries=20, keys=40, bias_shape=(False, False, False, False), dropout_p=0.3))
@example(case=Case(head_dim=256, value_dim=256, queries=17, keys=19, norms=(True, True)))
@example(case=Case(batch=1, head_dim=130, value_dim=256, queries=66, keys=70, dtype=torch.float16))
@example(case=Case(head_dim=100, value_dim=128, queries=20, keys=90, dtype=torch.bfloat16, masks=frozenset({"mask"})))
@example(case=Case(batch=1, head_dim=128, value_dim=72, queries=70, keys=66, masks=frozenset({"mask", "key_lengths"})))
# Keys split among blocks.
@example(case=Case(batch=3, kv_heads=1, queries=1, keys=800, group=4, dtype=torch.bfloat16, head_dim=72, value_dim=72,
                   masks=frozenset({"key_lengths"})))  # fmt: skip
@example(
    case=Case(queries=3, keys=777, head_dim=24, value_dim=15, group=2, masks=frozenset({"key_ranges", "key_mask"}),
              bias_shape=(False, True, True, True), softcap=3.0, norms=(True, True), dropout_p=0.2)
)  # fmt: skip
@example(
    case=Case(batch=1, kv_heads=1, queries=70, keys=1030, value_dim=136, dtype=torch.float16, is_causal=True,
              masks=frozenset({"mask"}))
)  # fmt: skip
def test_forward(case: Case) -> None:
    tensors, masking = case.tensors(), case.masking()
    visible = case.visible(masking, tensors.get("bias"))
    given = case.settings() | masking
    floors = case.floors(tensors, visible, case.upstream()[0])
    exact = reference.cross_attention(**{n: t.double() for n, t in tensors.items()}, **given, seed=torch.tensor(SEED))
    plain = reference.cross_attention(**tensors, **given, seed=torch.tensor(SEED))
    got = on_device(**case.poisoned(tensors, visible), **given, seed=SEED, return_logsumexp=True)
    for name, ours, theirs, truth in zip(("out", "logsumexp"), got, plain, exact, strict=False):
        assert_accurate(name, ours, theirs, truth, case.dtype, floor=floors.get(name, 0.0))


FULL = (True, True, True, True)


@settings(max_examples=6)
@given(case=cases(largest=50))
@example(case=Case(queries=0))
@example(case=Case(keys=0, bias_shape=FULL))
@example(case=Case(queries=70, keys=80, head_dim=64, value_dim=64, batch=1, group=2, dtype=torch.bfloat16))
@example(
    case=Case(queries=37, keys=71, head_dim=33, value_dim=15, group=2, dtype=torch.bfloat16, layout="sliced",
              masks=frozenset({"key_ranges"}), norms=(True, True), softcap=3.0, dropout_p=0.2)
)  # fmt: skip
@example(
    case=Case(queries=90, keys=101, head_dim=24, value_dim=16, dtype=torch.float16, is_causal=True, batch=1,
              masks=frozenset({"key_mask"}), bias_shape=FULL, bias_float32=True, softcap=3.0)
)  # fmt: skip
@example(case=Case(queries=20, keys=70, bias_shape=FULL, dropout_p=0.3, masks=frozenset({"mask", "key_ranges"})))
@example(case=Case(head_dim=256, value_dim=256, queries=17, keys=19, norms=(True, True), dtype=torch.bfloat16))
@example(case=Case(head_dim=100, value_dim=128, queries=70, keys=40, batch=1, dtype=torch.float16))
@example(case=Case(head_dim=100, value_dim=128, queries=20, keys=70, batch=1, is_causal=True))
@example(
    case=Case(batch=3, queries=70, keys=41, bias_shape=(False, True, True, True), dtype=torch.bfloat16,
              masks=frozenset({"key_lengths", "key_ranges"}), softcap=3.0)
)  # fmt: skip
@example(case=Case(queries=70, keys=41, bias_shape=(False, False, False, True), bias_float32=True, is_causal=True))
@example(case=Case(queries=7, keys=70, bias_shape=(True, True, True, False), dtype=torch.float16, head_dim=256))
@example(case=Case(queries=70, keys=40, bias_shape=(False, False, False, False), dropout_p=0.2))
@example(
    case=Case(batch=1, head_dim=200, value_dim=136, queries=40, keys=50, bias_shape=FULL, masks=frozenset({"key_mask"}))
)
@example(case=Case(batch=1, head_dim=72, value_dim=256, queries=40, keys=40, kv_heads=1, norms=(True, True)))
@example(case=Case(batch=1, kv_heads=1, queries=2, keys=520, group=2, masks=frozenset({"key_lengths"}), dropout_p=0.2))
def test_gradients(case: Case) -> None:
    """Outputs, extras and all gradients."""
    check(case, Backend("device_on_host"))


@pytest.mark.parametrize(("queries", "keys"), [(64, 4096), (2048, 40)])
def test_long_sums(queries: int, keys: int) -> None:
    """Tensor cores cut off what they add: an accumulator left to them for 4096 keys has an error of 4e-5."""
    case = Case(batch=1, kv_heads=1, queries=queries, keys=keys, head_dim=64, value_dim=64)
    check(case, Backend("device_on_host"))


def test_same_bits_twice() -> None:
    case = Case(batch=1, queries=70, keys=80, group=2, bias_shape=FULL, dropout_p=0.1, norms=(True, True))
    first, second = (check(case, Backend("device_on_host")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lengths", [[], [(3, 0), (0, 5), (70, 20), (1, 130)], [(3, 40), (0, 9), (2, 600)]], ids=str)
def test_varlen_is_each_sequence_alone(lengths: list[tuple[int, int]]) -> None:
    cu_q = torch.tensor([0, *itertools.accumulate(q for q, _ in lengths)])
    cu_k = torch.tensor([0, *itertools.accumulate(k for _, k in lengths)])
    query = torch.randn(int(cu_q[-1]), 4, 24)
    key, value = torch.randn(int(cu_k[-1]), 2, 24), torch.randn(int(cu_k[-1]), 2, 16)
    stop = torch.cat([torch.zeros(0, dtype=torch.int64)] + [torch.full((q,), k - k // 3) for q, k in lengths])
    ranges = (torch.zeros_like(stop), stop)
    with velm_kernels.use_backend("device_on_host"):
        out, lse = velm_kernels.cross_attention_varlen(
            query, key, value, cu_q, cu_k, key_ranges=ranges, dropout_p=0.1, seed=SEED, return_logsumexp=True
        )
    assert out.shape == (len(query), 4, 16) and lse.shape == (4, len(query))
    for s in range(len(lengths)):
        rows, columns = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))

        def alone(dtype: torch.dtype, s: int = s, rows: slice = rows, columns: slice = columns) -> Any:
            inputs = [t.to(dtype).transpose(0, 1)[None] for t in (query[rows], key[columns], value[columns])]
            of_rows = (ranges[0][None, rows], ranges[1][None, rows])
            seed = torch.tensor(SEED)
            return reference.cross_attention(*inputs, key_ranges=of_rows, dropout_p=0.1, first_batch=s, seed=seed)

        plain, exact = alone(torch.float32), alone(torch.float64)
        assert_accurate("out", out[rows].transpose(0, 1)[None], plain[0], exact[0])
        assert_accurate("logsumexp", lse[:, rows][None], plain[1], exact[1])


def test_keys_are_split_by_shapes_alone() -> None:
    """Among as many blocks as cuda_forward.h says, with equal shares of the keys that lengths leave."""

    def launched(batch: int, heads: int, queries: int, keys: int, **masks: Any) -> list[dict[str, Any]]:
        query, key = torch.randn(batch, heads, queries, 16).bfloat16(), torch.randn(batch, 2, keys, 16).bfloat16()
        cuda.launches()
        on_device(query, key, key, **masks)
        return [dict(launch) for launch in cuda.launches()]

    assert [launch["blocks"] for launch in launched(1, 2, 1, 511)] == [2]
    assert [launch["blocks"] for launch in launched(2, 4, 33, 1024)] == [2 * 2 * 2 * 2, 2 * 4 * 33 / 4]
    # More rows, more keys to a split.
    assert [launch["blocks"] for launch in launched(1, 2, 64, 1023)] == [2]
    # Of 1024 keys for each of 4 splits 300 are there: 5 tiles.
    lengths = torch.tensor([300])
    first, merged = launched(1, 2, 1, 1024, key_lengths=lengths)
    assert first["blocks"] == 2 * 4 and merged["blocks"] == 1
    whole = launched(1, 2, 1, 300)[0]
    assert whole["matrix_instructions"] == first["matrix_instructions"]
    # Warps without rows multiply nothing.
    assert 4 * whole["matrix_instructions"] == launched(1, 2, 64, 300)[0]["matrix_instructions"]


def test_expanded_inputs() -> None:
    """One query set for the whole batch (Q-Former) and one key for all heads arrive as stride 0."""
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(3, 1, 20, 16), torch.randn(3, 1, 20, 16)
    got = on_device(query.expand(3, -1, -1, -1), key.expand(-1, 4, -1, -1), value.expand(-1, 4, -1, -1))
    same = on_device(query.repeat(3, 1, 1, 1), key.repeat(1, 4, 1, 1), value.repeat(1, 4, 1, 1))
    assert torch.equal(got, same)


def test_past_2_to_the_31_elements() -> None:
    """Rows as far apart as in a tensor too big to hold: memory that is not touched is not there."""
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)

    def spread(x: Tensor) -> Tensor:
        _, heads, rows, dim = x.shape
        apart = (far.numel() - dim) // (heads * rows - 1) // 8 * 8
        return far.as_strided(x.shape, (0, rows * apart, apart, 1)).copy_(x)

    query, key, value = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    assert torch.equal(on_device(query, spread(key), value), on_device(query, key, value))
    assert torch.equal(on_device(spread(query), key, value), on_device(query, key, value))


def test_a_mask_that_hides_nothing_changes_no_bit() -> None:
    """A tile that all rows see and one that masks are applied to give the same numbers."""
    query, key, value = torch.randn(1, 1, 70, 32), torch.randn(1, 1, 64, 32), torch.randn(1, 1, 64, 32)
    everything = torch.ones(1, 64, dtype=torch.bool)
    assert torch.equal(on_device(query, key, value), on_device(query, key, value, key_mask=everything))
