"""Decomposed relative positions of a grid of keys: the tables of a model, and attention with the biases from them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import velm_kernels
from tests.attention.cases import Case, cases
from tests.attention.test_cross_attention import check
from tests.conftest import BACKENDS, INTERPRETED, ONCE, TRITON, Backend, first_and_last_cpu_backend
from velm_kernels import cross_attention, decomposed_position_bias
from velm_kernels.attention.cross_attention import reference


def tables(height: int, width: int, dim: int, seed: int = 0, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2 * size - 1, dim, generator=generator).to(**options) for size in (height, width))  # type: ignore[return-value]


def test_bias_of_every_pair_from_the_tables() -> None:
    """Pair by pair, as the paper writes it."""
    height, width = 3, 5
    query = torch.randn(2, 3, height * width, 8, dtype=torch.float64)
    of_height, of_width = tables(height, width, 8, dtype=torch.float64)
    bias = reference.bias_on_grid(*decomposed_position_bias(query, of_height, of_width, (height, width)))
    for one in range(height * width):
        for other in range(height * width):
            (y, x), (v, u) = divmod(one, width), divmod(other, width)
            entry = of_height[y - v + height - 1] + of_width[x - u + width - 1]
            torch.testing.assert_close(bias[:, :, one, other], query[:, :, one] @ entry)


@pytest.mark.parametrize(
    ("query_size", "key_size"), [((6, 4), (3, 4)), ((2, 4), (6, 8)), ((5, 3), (4, 7)), ((1, 1), (1, 9))]
)
def test_other_grids_of_keys(query_size: tuple[int, int], key_size: tuple[int, int]) -> None:
    """Coordinates of the finer grid are those of the coarser one, and tables of another length are interpolated."""
    query = torch.randn(1, 2, query_size[0] * query_size[1], 8)
    sides = [max(pair) for pair in zip(query_size, key_size)]
    given = tables(*sides, 8)
    height, width = decomposed_position_bias(query, *given, query_size, key_size)
    assert height.shape == (1, 2, query.shape[2], key_size[0]) and width.shape == (1, 2, query.shape[2], key_size[1])
    for y in range(query_size[0]):
        for v in range(key_size[0]):
            at = y * max(key_size[0] / query_size[0], 1.0) - v * max(query_size[0] / key_size[0], 1.0)
            entry = given[0][int(at + (key_size[0] - 1) * max(query_size[0] / key_size[0], 1.0))]
            row = slice(y * query_size[1], (y + 1) * query_size[1])
            torch.testing.assert_close(height[:, :, row, v], query[:, :, row] @ entry)
    longer = tables(2 * sides[0], sides[1], 8)
    resized = torch.nn.functional.interpolate(longer[0].t()[None], 2 * sides[0] - 1, mode="linear")[0].t()
    torch.testing.assert_close(
        decomposed_position_bias(query, *longer, query_size, key_size)[0],
        decomposed_position_bias(query, resized, longer[1], query_size, key_size)[0],
    )


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"query_size": (3, 4)}, ValueError, ["query_size", "15 queries", "(3, 4)"]),
        ({"query_size": 15}, TypeError, ["query_size", "(height, width)", "15"]),
        ({"key_size": (-1, 4)}, ValueError, ["key_size", "-1"]),
        ({"rel_pos_height": torch.zeros(5, 7)}, ValueError, ["rel_pos_height", "(distances, head_dim)", "(5, 7)"]),
        ({"rel_pos_width": torch.zeros(9, 8).bfloat16()}, TypeError, ["rel_pos_width", "float32", "bfloat16"]),
        ({"query": torch.zeros(15, 8)}, ValueError, ["query", "(batch, heads, queries, head_dim)", "(15, 8)"]),
    ],
)
def test_bad_tables(changed: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    given = {"query": torch.zeros(2, 2, 15, 8), "rel_pos_height": torch.zeros(5, 8), "rel_pos_width": torch.zeros(9, 8)}
    with pytest.raises(error) as raised:
        decomposed_position_bias(**(given | {"query_size": (3, 5)} | changed))
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"rel_pos_width": None}, ValueError, ["rel_pos_width", "as rel_pos_height is", "None"]),
        ({"rel_pos_height": None}, ValueError, ["rel_pos_height", "as rel_pos_width is", "None"]),
        ({"rel_pos_height": torch.zeros(2, 4, 5, 4)}, ValueError, ["= 6 keys", "(2, 4, 5, 4)", "(2, 4, 5, 3)"]),
        ({"rel_pos_height": torch.zeros(4, 5, 2)}, ValueError, ["(batch, heads, queries, key_height)", "(4, 5, 2)"]),
        ({"rel_pos_width": torch.zeros(2, 4, 6, 3)}, ValueError, ["rel_pos_width", "(2, 4, 5, 3)", "(2, 4, 6, 3)"]),
        ({"rel_pos_width": torch.zeros(2, 4, 5, 3).half()}, TypeError, ["rel_pos_width", "float32", "float16"]),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    given = {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 6, 8), "value": torch.zeros(2, 2, 6, 8)}
    given |= {"rel_pos_height": torch.zeros(2, 4, 5, 2), "rel_pos_width": torch.zeros(2, 4, 5, 3)}
    with pytest.raises(error) as raised:
        cross_attention(**(given | changed))
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_attention_has_the_bias_of_the_sums() -> None:
    """Broadcast and of every query, and what it has a gradient of."""
    query, key = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)
    height = torch.randn(2, 1, 5, 2, dtype=torch.float64).requires_grad_()
    width = torch.randn(1, 4, 5, 3, dtype=torch.float64).requires_grad_()
    with velm_kernels.use_backend("reference"):
        out = cross_attention(query, key, key, rel_pos_height=height, rel_pos_width=width)
        same = cross_attention(query, key, key, bias=height.repeat_interleave(3, 3) + width.repeat(1, 1, 1, 2))
    torch.testing.assert_close(out, same)
    of_one, of_other = (torch.autograd.grad(result.sin().sum(), (height, width)) for result in (out, same))
    torch.testing.assert_close(of_one, of_other)


LARGEST = 6 if INTERPRETED else 16
# CUDA has no kernel.
KERNELS = [backend for backend in [*BACKENDS, *TRITON] if backend.name != "reference"]
every_backend_here = pytest.mark.parametrize("backend", [*ONCE, *TRITON], ids=str)


@st.composite
def grids(draw: st.DrawFn) -> Case:
    """Any call of cross-attention whose keys are a grid."""
    height, width = draw(st.integers(1, LARGEST)), draw(st.integers(1, LARGEST))
    if draw(st.integers(0, 4)) == 0:
        # Rows longer than a block of keys.
        width = draw(st.integers(LARGEST, 40 if INTERPRETED else 250))
        height = draw(st.integers(1, 2))
    case = draw(cases(largest=20 if INTERPRETED else 150))
    return replace(case, keys=height * width, key_height=height, rel_pos_float32=draw(st.booleans()))


@pytest.mark.parametrize("backend", KERNELS, ids=str)
@given(case=grids())
@example(case=Case(batch=3, queries=49, keys=49, key_height=7, head_dim=64, value_dim=64))
@example(case=Case(queries=33, keys=96 * 3, key_height=3, dtype=torch.bfloat16, head_dim=16))
@example(case=Case(queries=5, keys=90, key_height=90, softcap=3.0, dropout_p=0.2, bias_shape=(True, True, True, True)))
@example(case=Case(queries=70, keys=120, key_height=1, group=2, masks=frozenset({"key_ranges", "key_mask"})))
@example(case=Case(queries=20, keys=40, key_height=5, bias_shape=(False, True, True, True)))
@example(case=Case(queries=1, keys=12, key_height=4, dtype=torch.float16, rel_pos_float32=True))
def test_numbers(backend: Backend, case: Case) -> None:
    if INTERPRETED:
        case = replace(case, queries=min(case.queries, 20))
    check(case, backend)


@first_and_last_cpu_backend
def test_same_bits_for_any_number_of_threads(backend: Backend) -> None:
    """Of so many keys that the backward pass splits them."""
    case = Case(batch=1, kv_heads=1, group=2, queries=300, keys=32 * 40, key_height=32, head_dim=64, value_dim=64)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(check(case, backend))
    for name, other in itertools.product(results[0], results[1:]):
        assert torch.equal(results[0][name], other[name]), name


@every_backend_here
@pytest.mark.parametrize("wanted", [("rel_pos_height",), ("rel_pos_width",), ("query",), ("rel_pos_width", "key")])
def test_some_gradients(backend: Backend, wanted: tuple[str, ...]) -> None:
    """Those that are not wanted leave the bits of the others."""
    tensors = Case(batch=1, kv_heads=1, queries=20, keys=35, key_height=5).tensors()

    def gradients(names: tuple[str, ...]) -> list[torch.Tensor]:
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}
        with backend.use():
            out = cross_attention(**leaves)
        return list(torch.autograd.grad(out.sin().sum(), [leaves[name] for name in names]))

    everything = dict(zip(tensors, gradients(tuple(tensors)), strict=True))
    for name, grad in zip(wanted, gradients(wanted), strict=True):
        assert torch.equal(grad, everything[name]), name


@every_backend_here
def test_biases_that_are_not_finite_mask_nothing(backend: Backend) -> None:
    """-inf makes weights of 0, with which values that are not finite are multiplied all the same; a row without any
    other score is NaN, as in plain torch."""
    query, key, value = (torch.randn(1, 1, rows, 8) for rows in (4, 6, 6))
    height, width = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 3)
    height[0, 0, 1, 0] = -torch.inf
    height[0, 0, 2] = -torch.inf
    width[0, 0, 3, 1] = torch.inf
    bias = reference.bias_on_grid(height, width)
    for value_of_the_first in (1.0, torch.nan):
        value[0, 0, 0, 0] = value_of_the_first
        expected = torch.softmax(query @ key.transpose(-1, -2) * 8**-0.5 + bias, -1) @ value
        with backend.use():
            out = cross_attention(query, key, value, rel_pos_height=height, rel_pos_width=width)
        torch.testing.assert_close(out, expected, equal_nan=True)


@every_backend_here
def test_broadcast_and_strided_biases(backend: Backend) -> None:
    query, key = torch.randn(2, 2, 17, 8), torch.randn(2, 2, 12, 8)
    height, width = torch.randn(1, 2, 1, 4), torch.randn(2, 3, 17, 2).permute(0, 3, 2, 1)
    with backend.use():
        got = cross_attention(query, key, key, rel_pos_height=height, rel_pos_width=width)
        whole = height.expand(2, 2, 17, 4).contiguous(), width.contiguous()
        same = cross_attention(query, key, key, rel_pos_height=whole[0], rel_pos_width=whole[1])
    assert torch.equal(got, same)


@first_and_last_cpu_backend
def test_key_mass_of_more_keys_than_weights_are_kept_for(backend: Backend) -> None:
    query, key = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 33_000, 4)
    height, width = torch.randn(1, 1, 6, 150), torch.randn(1, 1, 6, 220)
    *_, exact = reference.cross_attention(
        *(x.double() for x in (query, key, key)), rel_pos_height=height.double(), rel_pos_width=width.double()
    )
    with backend.use():
        biases = {"rel_pos_height": height, "rel_pos_width": width}
        _, mass = cross_attention(query, key, key, **biases, return_key_mass=True)
    torch.testing.assert_close(mass.double(), exact, rtol=1e-4, atol=1e-9)


@first_and_last_cpu_backend
def test_rows_whose_logsumexp_has_lost_the_number_of_keys(backend: Backend) -> None:
    query, value = torch.zeros(1, 1, 70, 4), torch.randn(1, 1, 6, 4, requires_grad=True)
    biases = {"rel_pos_height": torch.full((1, 1, 70, 2), -1e7), "rel_pos_width": torch.zeros(1, 1, 70, 3)}
    with backend.use():
        out = cross_attention(query, torch.zeros(1, 1, 6, 4), value, **biases)
        (grad,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(grad, torch.full_like(grad, 70 / 6))
