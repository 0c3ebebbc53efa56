"""Bad calls of cross-attention: every error names the argument, what was expected and what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import velm_kernels
from velm_kernels import cross_attention, cross_attention_varlen


def inputs(**changed: torch.Tensor) -> dict[str, Any]:
    return {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 2, 7, 8),
        "value": torch.randn(2, 2, 7, 6),
    } | changed


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"query": torch.zeros(4, 5, 8)}, ValueError, ["query", "(batch, heads, queries, head_dim)", "(4, 5, 8)"]),
        ({"key": torch.zeros(3, 2, 7, 8)}, ValueError, ["key", "(2, 2, 7, 8)", "(3, 2, 7, 8)"]),
        ({"key": torch.zeros(2, 2, 7, 9)}, ValueError, ["key", "(2, 2, 7, 8)", "(2, 2, 7, 9)"]),
        ({"value": torch.zeros(2, 2, 6, 6)}, ValueError, ["value", "(2, 2, 7, 6)", "(2, 2, 6, 6)"]),
        ({"value": torch.zeros(2, 2, 7, 6).bfloat16()}, TypeError, ["value", "float32", "bfloat16"]),
        ({"query": torch.zeros(2, 3, 5, 8)}, ValueError, ["key", "3 heads", "2"]),
        (
            {"query": torch.zeros(2, 4, 5, 513), "key": torch.zeros(2, 2, 7, 513)},
            ValueError,
            ["query", "1 to 512", "513"],
        ),
        ({"key_lengths": torch.tensor([1])}, ValueError, ["key_lengths", "(2,)", "(1,)"]),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, ["key_lengths", "int32", "float32"]),
        ({"key_lengths": torch.tensor([-1, 2])}, ValueError, ["key_lengths", "0 to 7", "-1 to 2"]),
        ({"key_lengths": torch.tensor([8, 2])}, ValueError, ["key_lengths", "0 to 7", "2 to 8"]),
        ({"key_lengths": torch.tensor([2**32 + 1, 2])}, ValueError, ["key_lengths", "0 to 7"]),
        ({"key_ranges": torch.zeros(2, 5)}, TypeError, ["key_ranges", "(start, stop)"]),
        (
            {"key_ranges": (torch.zeros(2, 5).long(), torch.full((2, 5), 8))},
            ValueError,
            ["key_ranges[1]", "0 to 7", "8 to 8"],
        ),
        (
            {"key_ranges": (torch.zeros(2, 4).long(), torch.zeros(2, 5).long())},
            ValueError,
            ["key_ranges[0]", "(2, 5)", "(2, 4)"],
        ),
        ({"key_mask": torch.ones(2, 7)}, TypeError, ["key_mask", "torch.bool", "float32"]),
        ({"key_mask": torch.ones(2, 6).bool()}, ValueError, ["key_mask", "(2, 7)", "(2, 6)"]),
        ({"mask": torch.ones(3, 1, 5, 7).bool()}, ValueError, ["mask", "(2, 4, 5, 7)", "(3, 1, 5, 7)"]),
        ({"bias": torch.ones(4, 5, 6)}, ValueError, ["bias", "(2, 4, 5, 7)", "(4, 5, 6)"]),
        ({"bias": torch.ones(7).bfloat16()}, TypeError, ["bias", "float32", "bfloat16"]),
        ({"bias": torch.ones(1, 1, 1, 1, 7)}, ValueError, ["bias", "(1, 1, 1, 1, 7)"]),
        ({"query_norm_weight": torch.ones(7)}, ValueError, ["query_norm_weight", "(8,)", "(7,)"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p", "[0, 1)", "1.0"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "[0, 1)", "-0.1"]),
        ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "[0, 1)", "nan"]),
        ({"scale": float("inf")}, ValueError, ["scale", "finite", "inf"]),
        ({"softcap": 0.0}, ValueError, ["softcap", "greater than 0", "0.0"]),
        ({"norm_eps": 0.0}, ValueError, ["norm_eps", "greater than 0", "0.0"]),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        cross_attention(**inputs(**changed))
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "more", "words"),
    [
        ([0, 2, 6], [0, 3, 7], {}, ["cu_seqlens_q", "5", "[0, 2, 6]"]),
        ([0, 2, 5], [0, 8, 7], {}, ["cu_seqlens_k", "7", "[0, 8, 7]"]),
        ([1, 2, 5], [0, 3, 7], {}, ["cu_seqlens_q", "[1, 2, 5]"]),
        ([0, 2, 5], [0, 7], {}, ["cu_seqlens_k", "(3,)", "(2,)"]),
        ([0, 2, 5], [0, 3, 7], {"max_seqlen_q": 2}, ["max_seqlen_q", "3", "2"]),
        ([0, 2, 5], [0, 3, 7], {"max_seqlen_k": -1}, ["max_seqlen_k", "0", "-1"]),
    ],
)
def test_bad_packing(cu_q: list[int], cu_k: list[int], more: dict[str, Any], words: list[str]) -> None:
    query, key = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
    with pytest.raises(ValueError) as raised:
        cross_attention_varlen(query, key, key, torch.tensor(cu_q), torch.tensor(cu_k), **more)
    for word in words:
        assert word in str(raised.value)


def test_many_bad_offsets_are_not_listed() -> None:
    query, offsets = torch.randn(5, 4, 8), torch.arange(30_000)
    with pytest.raises(ValueError, match=r"cu_seqlens_[qk]: .* 5 packed tokens, given 30000 from 0 to 29999$"):
        cross_attention_varlen(query, query, query, offsets, offsets)
    offsets[7] = 3
    with pytest.raises(ValueError, match=r"given 30000 from 0 to 29999, falling from 6 to 3$"):
        cross_attention_varlen(query, query, query, offsets, offsets)


def test_unknown_backend_and_forced_backend() -> None:
    expected = "use_backend: expected one of cuda, triton, cpu, torch, reference, given 'gpu'"
    with pytest.raises(ValueError, match=expected), velm_kernels.use_backend("gpu"):
        pass
    double = {name: tensor.double() for name, tensor in inputs().items()}
    with velm_kernels.use_backend("cpu"), pytest.raises(velm_kernels.backends.NoBackendError, match="float64"):
        cross_attention(**double)


def test_explain_lists_every_backend_with_its_reason() -> None:
    double = {name: tensor.double() for name, tensor in inputs().items()}
    text = velm_kernels.explain("cross_attention", **double)
    assert text.startswith("cross_attention -> reference")
    for backend in velm_kernels.backends.ORDER:
        assert f"\n  {backend}" in text
    with velm_kernels.use_backend("cpu"):
        assert "cpu (asked for)" in velm_kernels.explain("cross_attention", **inputs())
    with pytest.raises(ValueError, match="explain"):
        velm_kernels.explain("attention")
