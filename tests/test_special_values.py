"""NaN and infinity at one position of one argument: they come out where the written meaning in float64 has them, and
what does not read that position has the same bits as without it."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, every_backend_with_cuda
from tests.operators import CALLS, Call, results

pytestmark = pytest.mark.quick

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Products of several factors: whether infinity in one of them becomes NaN depends on which two are multiplied first. Of
# these only finite and not finite are told apart.
SEVERAL_FACTORS = {
    "bilinear",
    "bilinear_attention",
    "bilinear_attention_pool",
    "compact_bilinear",
    "low_rank_fusion",
    "tensor_fusion",
}
# The gradients of these are sums over weights, which are known without them: 1 and 0. The written meaning adds them up.
CONSTANT = {("attention_pool", "key_bias"), ("attention_pool", "value_bias")}
# What is not put where. attention_pool multiplies in another order, and biases are no part of its weights; a gradient
# of exactly 0, here of a capped score, is not multiplied with an infinite weight.
LEFT_OUT = {
    *(("attention_pool", name, special) for name in ("key_bias", "value_bias") for special in SPECIAL),
    *(("attention_pool", name, "inf") for name in ("x", "query", "key_weight", "value_weight")),
    *(("attention_pool", name, "-inf") for name in ("x", "query", "key_weight", "value_weight")),
    *(("cross_attention", f"{side}_norm_weight", special) for side in ("query", "key") for special in ("inf", "-inf")),
}
# What a backend does not keep yet, by operator, or by operator and case.
NOT_YET: dict[str, set[str]] = {
    # gelu(inf) of torch itself is NaN in float32 and less where its vector code computes it, inf in float64.
    # The backward of bilinear_attention by torch is not given the bias.
    "reference": {"linear-gelu", "bilinear_attention"},
    # There is no linear, of which pixel_shuffle_tokens is made, in CUDA.
    "device_on_host": {"linear", "pixel_shuffle_tokens"},
}
INFINITE = ("inf", "-inf")


def gaps(case: str, arguments: str, specials: Iterable[str], results: str) -> set[tuple[str, str, str, str]]:
    """Results, by name, that are not compared where one of the special values is in one of the arguments."""
    return set(itertools.product([case], arguments.split(), specials, results.split()))


# Of the kernels that multiply tiles of queries and keys.
OF_TILES = {
    # Rows of a tile that hide a key that others of them see have 0 as its weight, and 0 times NaN or infinity is NaN.
    *gaps("cross_attention-everything", "query key_norm_weight", SPECIAL, "key"),
    *gaps("cross_attention-everything", "key", SPECIAL, "query"),
    *gaps("cross_attention-everything", "value", SPECIAL, "output_0"),
    *gaps("cross_attention_varlen", "query", SPECIAL, "key"),
    *gaps("cross_attention_varlen", "key", SPECIAL, "query"),
    *gaps("cross_attention_varlen", "value", SPECIAL, "output_0"),
    # Scores of -inf count as hidden: infinity elsewhere in their row does not make their weights NaN, nor does a row of
    # nothing else become NaN.
    *gaps("cross_attention", "query", INFINITE, "key value"),
    *gaps("cross_attention_varlen", "query", INFINITE, "output_0 query value"),
}
# What backends do not keep yet, by case, argument, special value and result.
GAPS: dict[str, set[tuple[str, str, str, str]]] = {
    "device_on_host": {
        *OF_TILES,
        # As in OF_TILES; and the logsumexp of a row with an infinite score is NaN instead of infinity.
        *gaps("cross_attention-everything", "bias", ["inf"], "output_1"),
        *gaps("bidirectional_attention", "query_a", INFINITE, "output_2 output_3 value_b"),
        *gaps("bidirectional_attention", "query_b", INFINITE, "output_2 output_3 value_a"),
        # Backward takes the weights from the logsumexp: 0 instead of NaN where that is infinite.
        *gaps("merge_attention", "3", ["inf"], "1 2 4 5"),
        *gaps("merge_attention", "4", ["inf"], "0 2 3 5"),
        *gaps("merge_attention", "5", ["inf"], "0 1 3 4"),
        # Scores of -inf count as hidden, as in OF_TILES.
        *gaps("bilinear_attention", "h bias", ["-inf"], "output_0 v q h"),
    },
    "triton": {
        *OF_TILES,
        *gaps("cross_attention-everything", "query_norm_weight", SPECIAL, "key"),
        # As in OF_TILES; the sums of rows in backward are made of the results.
        *gaps("cross_attention-everything", "value", SPECIAL, "query key bias"),
        *gaps("cross_attention_varlen", "value", SPECIAL, "query key"),
        # Backward takes the weights from the logsumexp: 0 instead of NaN where that is infinite.
        *gaps("cross_attention", "key", INFINITE, "value"),
        *gaps("cross_attention_varlen", "key", INFINITE, "value"),
        *gaps("cross_attention-everything", "bias", ["inf"], "output_2 value"),
        *gaps("bidirectional_attention", "query_a", INFINITE, "query_b value_a value_b"),
        *gaps("bidirectional_attention", "query_b", INFINITE, "query_a value_a value_b"),
    },
}
NOT_YET["cuda"], GAPS["cuda"] = NOT_YET["device_on_host"], GAPS["device_on_host"]


def names_of(call: Call) -> list[str]:
    """The names of the arguments that have a gradient; numbers where some of them are lists."""
    count = len(call.leaves(call.arguments()))
    return list(call.differentiable) if len(call.differentiable) == count else [str(i) for i in range(count)]


def outputs_and_gradients(call: Call, arguments: dict[str, Any], exact: bool = False) -> list[tuple[str, Tensor]]:
    given = call.requiring_gradients(arguments)
    found = call.exact(given) if exact else results(call.function(**given))
    generator = torch.Generator().manual_seed(1)
    outs, upstream = [], []
    for out in found:
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        if out.requires_grad:
            outs.append(out)
            upstream.append(weights.to(out.dtype))
    leaves = call.leaves(given)
    gradients = torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
    return [(f"output_{i}", out.detach()) for i, out in enumerate(found)] + [
        (name, torch.zeros_like(leaf) if g is None else g)
        for name, leaf, g in zip(names_of(call), leaves, gradients, strict=True)
    ]


def pattern(x: Tensor, only_finite: bool) -> Tensor:
    """0 for a finite number; else 1, or, if they are told apart, 1 for NaN and 2 and 3 for the infinities."""
    if only_finite:
        return (~x.isfinite()).int()
    return torch.where(x.isnan(), 1, torch.where(x == torch.inf, 2, torch.where(x == -torch.inf, 3, 0)))


@pytest.mark.parametrize("call", CALLS, ids=str)
@every_backend_with_cuda
def test_come_out_where_plain_torch_has_them(backend: Backend, call: Call) -> None:
    if {call.operator, str(call)} & NOT_YET.get(backend.name, set()):
        pytest.skip("not yet on this backend")
    with backend.use():
        usual = outputs_and_gradients(call, call.arguments())
    exact_usual = outputs_and_gradients(call, call.arguments(torch.float64), exact=True)
    failures = []
    names = names_of(call)
    for number, leaf in enumerate(call.leaves(call.arguments())):
        for special, value in SPECIAL.items():
            if (call.operator, names[number], special) in LEFT_OUT:
                continue
            found = []
            at = zlib.crc32(f"{call} {number} {special}".encode()) % max(1, leaf.numel())
            for exact in (False, True):
                arguments = call.arguments(torch.float64 if exact else torch.float32)
                changed = [x.contiguous().clone() for x in call.leaves(arguments)]
                changed[number].view(-1)[at] = value
                with backend.use():
                    found.append(outputs_and_gradients(call, call.with_leaves(arguments, changed), exact))
            for (name, got), (_, true), (_, before), (_, true_before) in zip(*found, usual, exact_usual, strict=True):
                gap = str(call), names[number], special, name
                if (call.operator, name) in CONSTANT or gap in GAPS.get(backend.name, ()):
                    continue
                where = f"{special} at {at} of argument {number}, {name}"
                only_finite = call.operator in SEVERAL_FACTORS and special != "nan"
                wrong = pattern(got, only_finite) != pattern(true, only_finite)
                if wrong.any():
                    failures.append(
                        f"{where}: {got[wrong][:5].tolist()} for {true[wrong][:5].tolist()}, {wrong.sum()}x"
                    )
                # The reference forms products term by term where something is not finite, in another order.
                same = torch.isclose(got, before, 1e-4, 1e-5) if backend.name == "reference" else got == before
                moved = (true == true_before) & got.isfinite() & ~same
                if moved.any():
                    failures.append(f"{where}: {moved.sum()} of {got.numel()} changed that do not read it")
    assert not failures, "\n".join(failures)
