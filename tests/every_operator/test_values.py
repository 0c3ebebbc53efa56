"""NaN and infinity at one position of one argument: they come out where the written meaning in float64 has them, and
what does not read that position has the same bits as without it."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.conftest import INTERPRETED, Backend, every_backend_with_cuda
from tests.operators import CALLS, FOR_NUMBERS, Call
from velm_kernels.attention.cross_attention import reference as attention_reference
from velm_kernels.cases import Draw, incoming, results

pytestmark = pytest.mark.quick

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Products of several factors: whether infinity in one of them becomes NaN depends on which two are multiplied first. Of
# these only finite and not finite are told apart.
SEVERAL_FACTORS = {
    "attention_pool",
    "bilinear",
    "bilinear_attention",
    "bilinear_attention_pool",
    "compact_bilinear",
    "low_rank_fusion",
    "multiscale_deformable_attention",
    "mutual_information",
    "sigmoid_loss",
    "tensor_fusion",
}
# The gradients of these are sums over weights, which are known without them: 1 and 0. The written meaning adds them up.
CONSTANT = {("attention_pool", "key_bias"), ("attention_pool", "value_bias")}
# What is not put where: attention_pool says that it does not read its key_bias; a gradient of exactly 0, here of a
# capped score, is not multiplied with an infinite weight. -inf of a token is a score where the query is folded into the
# weight, and NaN where it is multiplied with keys, of which some are inf.
LEFT_OUT = {
    *(("attention_pool", "key_bias", special) for special in SPECIAL),
    ("attention_pool", "x", "-inf"),
    *(("cross_attention", f"{side}_norm_weight", special) for side in ("query", "key") for special in ("inf", "-inf")),
}
# What is put where for results alone: weights are known without the bias, and so are gradients that come from them.
NO_GRADIENTS = {("attention_pool", "value_bias")}
# What a backend does not keep yet, by operator, or by operator and case.
NOT_YET: dict[str, set[str]] = {
    # There is no linear, of which pixel_shuffle_tokens and patch_embed are made, and no loss in CUDA.
    "device_on_host": {
        "linear",
        "pixel_shuffle_tokens",
        "patch_embed",
        "contrastive_loss",
        "linear_cross_entropy",
        "maxsim",
        "maxsim_contrastive_loss",
        "mutual_information",
        "sigmoid_loss",
    },
}


NOT_YET["device_on_host"] |= {
    "interpolated_embedding",
    "merge_patches",
    "pool_grid",
    "topk_similarity",
    # Heads of more than 256 columns.
    "cross_attention-wide heads",
    "cross_attention_varlen-wide heads",
    "cross_attention-rel_pos",
}
NOT_YET["cuda"] = NOT_YET["device_on_host"]


def pattern(x: Tensor, only_finite: bool) -> Tensor:
    """0 for a finite number; else 1, or, if they are told apart, 1 for NaN and 2 and 3 for the infinities."""
    if only_finite:
        return (~x.isfinite()).int()
    return torch.where(x.isnan(), 1, torch.where(x == torch.inf, 2, torch.where(x == -torch.inf, 3, 0)))


def computes_anew(backend: Backend, call: Call) -> bool:
    """Whether something is computed in another order where a number is not finite: products of the reference term by
    term, rows of a tile whose scores are no longer near each other, and what hidden numbers have made NaN in CUDA's
    attention pair by pair."""
    if call.operator == "mutual_information":
        return True
    return backend.name == "reference" or ("cross_attention" in call.operator and backend.name != "cpu")


Sizes = tuple[tuple[str, int], ...]


def with_special(
    call: Call, sizes: Sizes, dtype: torch.dtype, number: int | None, special: str, at: int
) -> dict[str, Any]:
    """The arguments of the case with a special value at one position of one of them, or as they are."""
    arguments = call.arguments(dtype, **dict(sizes))
    changed = [x.contiguous().clone() for x in call.leaves(arguments)]
    if number is not None:
        changed[number].view(-1)[at] = SPECIAL[special]
    return call.with_leaves(arguments, changed)


@functools.cache
def exactly(call: Call, sizes: Sizes, number: int | None, special: str, at: int, device: str) -> dict[str, Tensor]:
    """By the written meaning in float64, for all backends of ``device``, where tensors are made."""
    return call.run(with_special(call, sizes, torch.float64, number, special, at), exact=True)


def failures(backend: Backend, call: Call, sizes: dict[str, int], places: int) -> list[str]:
    """What is wrong with each special value in each argument, at some places of it."""
    by_name, device = tuple(sizes.items()), backend.device
    with backend.use():
        usual = call.run(call.arguments(**sizes))
    exact_usual = exactly(call, by_name, None, "", 0, device)
    found = []
    names = call.leaf_names(call.arguments(**sizes))
    of_all = itertools.product(enumerate(call.leaves(call.arguments(**sizes))), SPECIAL, range(places))
    for (number, leaf), special, place in of_all:
        if (call.operator, names[number], special) in LEFT_OUT or (call.numbers_only and special != "nan"):
            continue
        at = zlib.crc32(f"{call} {number} {special}{place or ''}".encode()) % max(1, leaf.numel())
        arguments = with_special(call, by_name, torch.float32, number, special, at)
        with backend.use():
            computed = call.run(arguments)
        exact = exactly(call, by_name, number, special, at, device)
        for name, got in computed.items():
            true, before, true_before = exact[name], usual[name], exact_usual[name]
            if (call.operator, name) in CONSTANT:
                continue
            if (call.operator, names[number]) in NO_GRADIENTS and not name.startswith("output"):
                continue
            where = f"{special} at {at} of argument {number}, {name}"
            only_finite = call.operator in SEVERAL_FACTORS and special != "nan"
            wrong = pattern(got, only_finite) != pattern(true, only_finite)
            if wrong.any():
                found.append(f"{where}: {got[wrong][:5].tolist()} for {true[wrong][:5].tolist()}, {wrong.sum()}x")
            same = torch.isclose(got, before, 1e-4, 1e-5) if computes_anew(backend, call) else got == before
            moved = (true == true_before) & got.isfinite() & ~same
            if moved.any():
                found.append(f"{where}: {moved.sum()} of {got.numel()} changed that do not read it")
    return found


# Of what is called for its numbers alone not where dropout drops numbers that are not finite, of which it is not said
# whether they are read; "two masks" has tests of its own. The interpreter tries masks that are the same for all rows.
SOME = {"key_lengths", "relu", "outer"}
TRIED = [
    call
    for call in FOR_NUMBERS
    if not call.numbers_only or (call.name in SOME if INTERPRETED else call.name not in {"dropout", "two masks"})
]


@pytest.mark.parametrize("call", TRIED, ids=str)
@every_backend_with_cuda
def test_come_out_where_plain_torch_has_them(backend: Backend, call: Call) -> None:
    if {call.operator, str(call)} & NOT_YET.get(backend.name, set()):
        pytest.skip("not yet on this backend")
    found = failures(backend, call, {}, 1)
    assert not found, "\n".join(found)


def with_upstream(call: Call, arguments: dict[str, Any], changed: dict[int, Tensor], exact: bool) -> dict[str, Tensor]:
    """The gradients of `call.run`, where other numbers come in backward for some of the results."""
    if exact and "cross_attention" in call.operator:
        arguments = arguments | {"not_finite": True}
    given = call.requiring_gradients(arguments)
    outs = call.exact(given) if exact else results(call.function(**given))
    upstream = [
        changed.get(place, weights).to(out.dtype) for place, (out, weights) in enumerate(zip(outs, incoming(outs)))
    ]
    wanted = [place for place, out in enumerate(outs) if out.requires_grad]
    upstream = [upstream[place] for place in wanted]
    found = torch.autograd.grad([outs[place] for place in wanted], call.leaves(given), upstream, materialize_grads=True)
    return dict(zip(call.leaf_names(given), found, strict=True))


@functools.cache
def exact_gradients(call: Call, number: int | None, special: str, at: int, device: str) -> dict[str, Tensor]:
    """Those of the written meaning where a special value comes in for one result, or none does."""
    doubles = call.arguments(torch.float64)
    changed: dict[int, Tensor] = {}
    if number is not None:
        changed[number] = incoming(call.exact(doubles))[number]
        changed[number].view(-1)[at] = SPECIAL[special]
    return with_upstream(call, doubles, changed, exact=True)


@pytest.mark.parametrize("call", TRIED, ids=str)
@every_backend_with_cuda
def test_gradients_that_come_in(backend: Backend, call: Call) -> None:
    """NaN and infinity in one of them reach the gradients that read it, as plain torch has them, and no others."""
    if {call.operator, str(call)} & NOT_YET.get(backend.name, set()):
        pytest.skip("not yet on this backend")
    arguments = call.arguments()
    with backend.use():
        outs = results(call.function(**call.requiring_gradients(arguments)))
        usual = with_upstream(call, arguments, {}, exact=False)
    exact_usual = exact_gradients(call, None, "", 0, backend.device)
    found = []
    for (number, out), (special, value) in itertools.product(enumerate(outs), SPECIAL.items()):
        if not out.requires_grad or out.numel() == 0:
            continue
        at = zlib.crc32(f"{call} {number} {special}".encode()) % out.numel()
        changed = incoming(outs)[number]
        changed.view(-1)[at] = value
        with backend.use():
            gradients = with_upstream(call, arguments, {number: changed}, exact=False)
        exact = exact_gradients(call, number, special, at, backend.device)
        for name, got in gradients.items():
            if (call.operator, name) in CONSTANT:
                continue
            where, true = f"{special} at {at} of what comes in for result {number}, {name}", exact[name]
            # Of an infinity, which of its terms are NaN depends on the order of the products.
            wrong = pattern(got, special != "nan") != pattern(true, special != "nan")
            if wrong.any():
                found.append(f"{where}: {got[wrong][:5].tolist()} for {true[wrong][:5].tolist()}, {wrong.sum()}x")
            moved = (true == exact_usual[name]) & ~torch.isclose(got, usual[name], 1e-4, 1e-5)
            if moved.any():
                found.append(f"{where}: {moved.sum()} of {got.numel()} changed that do not read it")
    assert not found, "\n".join(found)


# More than a tile of rows and of keys.
LARGER = {
    "cross_attention": {"batch": 1, "heads": 1, "queries": 70, "keys": 150},
    "cross_attention-everything": {"batch": 1, "heads": 1, "queries": 70, "keys": 150},
    "cross_attention_varlen": {"sequences": 1, "heads": 1, "queries": 70, "keys": 90},
    "bidirectional_attention": {"batch": 1, "heads": 1, "a": 40, "b": 70},
    "masked_pool-gem": {"tokens": 40, "dim": 33},
}
# The same of the interpreter's tiles of 16.
SMALLER = {
    "cross_attention": {"batch": 1, "heads": 1, "queries": 20, "keys": 35},
    "cross_attention-everything": {"batch": 1, "heads": 1, "queries": 20, "keys": 35},
    "cross_attention_varlen": {"sequences": 1, "heads": 1, "queries": 20, "keys": 35},
    "bidirectional_attention": {"batch": 1, "heads": 1, "a": 20, "b": 35},
    "masked_pool-gem": {"tokens": 40, "dim": 33},
}


@pytest.mark.parametrize("call", [call for call in CALLS if str(call) in LARGER], ids=str)
@every_backend_with_cuda
def test_at_sizes_of_several_tiles(backend: Backend, call: Call) -> None:
    found = failures(backend, call, (SMALLER if INTERPRETED else LARGER)[str(call)], 1)
    assert not found, "\n".join(found)


def _hiding(**masks: Any) -> Call:
    """Attention of float32 in which some rows see what others beside them do not."""
    call = next(call for call in CALLS if str(call) == "cross_attention")

    def arguments(normal: Any, **sizes: int) -> dict[str, Any]:
        return call.make(normal, **sizes) | masks

    return replace(call, name="+".join(masks), make=arguments)


OF_ROW = torch.arange(20)[None].expand(2, 20)
HIDING = [
    _hiding(is_causal=True),
    _hiding(key_ranges=(OF_ROW // 2, OF_ROW // 2 + 9)),
    _hiding(mask=(OF_ROW[0, :, None] + torch.arange(35)) % 3 != 0),
    _hiding(bias=torch.where((OF_ROW[0, :, None] + torch.arange(35)) % 5 == 0, -math.inf, 0.5)[None, None]),
    _hiding(is_causal=True, key_mask=torch.arange(35).expand(2, 35) % 4 != 2, softcap=3.0),
]


@pytest.mark.parametrize("call", HIDING, ids=str)
@every_backend_with_cuda
def test_do_not_reach_rows_that_hide_them(backend: Backend, call: Call) -> None:
    found = failures(backend, call, {"batch": 2, "heads": 1, "queries": 20, "keys": 35}, 1)
    assert not found, "\n".join(found)


def _closed_by_masks(draw: Draw, batch: int, a: int, b: int, **sizes: int) -> dict[str, Any]:
    """Bidirectional attention of entries that have every kind of mask: some rows of each side are closed, all of a, all
    of b, all of both."""
    given = TWO_WAYS.make(draw, batch=batch, a=a, b=b, **sizes)
    of_entry = torch.arange(batch)[:, None]
    return given | {
        "mask_a": (torch.arange(a) % 3 != 1) & (of_entry % 2 == 0),
        "mask_b": (torch.arange(b) % 4 != 2) & (of_entry % 4 < 2),
    }


TWO_WAYS = next(call for call in CALLS if call.operator == "bidirectional_attention")


# Both sides of the head_dim from which CUDA's gradients of float32 are those of two passes, and, for the queries of b,
# of the lengths from which several blocks share the other side.
@pytest.mark.parametrize(("a", "b", "head_dim"), [(5, 9, 16), (20, 35, 16), (5, 9, 150), (530, 5, 16)])
@every_backend_with_cuda
def test_do_not_reach_rows_that_both_masks_hide_them_from(backend: Backend, a: int, b: int, head_dim: int) -> None:
    """A row that the other side may not attend to is a query and no key: a row that is neither its key is not read."""
    if INTERPRETED and (a > 20 or head_dim > 16):
        pytest.skip("the interpreter takes minutes")
    call = replace(TWO_WAYS, make=_closed_by_masks)
    sizes = {"batch": 4, "heads": 1, "a": a, "b": b, "head_dim": head_dim}

    def all_results(arguments: dict[str, Any], exact: bool) -> dict[str, Tensor]:
        found, given = call.run(arguments, exact), call.requiring_gradients(arguments)
        # The gradients of one direction alone are others than its share.
        outs = call.exact(given) if exact else call.function(**given)
        for number in (0, 1):
            grads = torch.autograd.grad(
                outs[number].sum(), call.leaves(given), retain_graph=True, materialize_grads=True
            )
            found |= {f"{name} of {number}": grad for name, grad in zip(call.leaf_names(given), grads, strict=True)}
        return found

    for side, row in (("query_a", 1), ("query_b", 2)):
        for value in (math.nan, math.inf):
            both = []
            for dtype in (torch.float32, torch.float64):
                arguments = call.arguments(dtype, **sizes)
                arguments[side][:, :, row, 3] = value
                with backend.use():
                    both.append(all_results(arguments, exact=dtype == torch.float64))
            for name, got in both[0].items():
                assert torch.equal(got.isfinite(), both[1][name].isfinite()), (side, value, name)
                torch.testing.assert_close(got, both[1][name].to(got.dtype), rtol=1e-3, atol=1e-4, equal_nan=True)


# Both sides of the sizes up to which backward sums the weights of rows (csrc/attention/cuda_backward.h).
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (20, 35), (70, 260)])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e30, -1e9])
@every_backend_with_cuda
def test_rows_that_a_finite_bias_hides_are_the_mean_of_all_values(
    backend: Backend, hidden: float, queries: int, keys: int
) -> None:
    """As softmax has it: what the smallest number is added to are equal scores."""
    if INTERPRETED and queries == 70:
        pytest.skip("the interpreter takes minutes")
    call = next(call for call in CALLS if str(call) == "cross_attention")
    given = call.arguments(batch=2, heads=1, queries=queries, keys=keys)
    bias = torch.zeros(1, 1, queries, keys, requires_grad=True)
    with torch.no_grad():
        bias[..., 1, :], bias[..., 3, 4:], bias[..., -1, :] = hidden, hidden, hidden
    given = call.requiring_gradients(given)
    leaves = [*call.leaves(given), bias]
    with backend.use():
        out, logsumexp, mass = velm_kernels.cross_attention(
            **given, bias=bias, return_logsumexp=True, return_key_mass=True
        )
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(out, leaves, upstream)
    expected, _, expected_mass = attention_reference.cross_attention(**given, bias=bias)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mass, expected_mass)
    torch.testing.assert_close(out[:, :, 1], given["value"].mean(2))
    assert (logsumexp[:, :, 1] < hidden / 4).all()
    for got, true in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)
