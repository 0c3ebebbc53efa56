"""Decomposed relative positions of a grid of keys: the tables of a model, and attention with the biases from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import velm_kernels
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
        ({"rel_pos_width": None}, ValueError, ["rel_pos_width", "beside rel_pos_height", "None"]),
        ({"rel_pos_height": None}, ValueError, ["rel_pos_height", "beside rel_pos_width", "None"]),
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
