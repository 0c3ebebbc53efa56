"""The Triton kernels against the reference, executed by the interpreter: run by test_interpreted.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import velm_kernels
from tests.numbers import assert_accurate, relative_rms
from velm_kernels import cases
from velm_kernels.backends import triton as triton_backend

pytestmark = pytest.mark.skipif(not triton_backend.is_interpreted(), reason="needs TRITON_INTERPRET=1")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def compare(function: Callable[..., Any], inputs: list[torch.Tensor], factor: float = 2.0) -> list[torch.Tensor]:
    """Outputs and all gradients of `function` on Triton against the reference in float64; returns the first."""
    results = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
        with velm_kernels.use_backend(backend):
            outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for output in outputs:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (torch.where(output.isfinite(), output, 0.0).double() * weight).sum()
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for i, (got, plain, exact) in enumerate(zip(*results, strict=True)):
        assert_accurate(f"result {i}", got.detach(), plain.detach(), exact.detach(), inputs[0].dtype, factor=factor)
    return results[0]


@pytest.mark.parametrize("shards", [1, 3, 11])
def test_merge_attention(shards: int) -> None:
    torch.manual_seed(0)
    outs = [randn(2, 2, 5, 20) for _ in range(shards)]
    logsumexps = [3 * randn(2, 2, 5) for _ in range(shards)]
    for logsumexp in logsumexps:
        logsumexp[0, 0, 0] = -torch.inf
    logsumexps[0][1] = -torch.inf

    def function(*tensors: torch.Tensor) -> Any:
        return velm_kernels.merge_attention(list(tensors[:shards]), list(tensors[shards:]))

    compare(function, [*outs, *logsumexps])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gated_residual", {"rows": 40}),
        ("gated_residual-scalar", {"rows": 40}),
        ("linear-gelu", {"rows": 100}),
        ("cross_attention-norms", {"queries": 40}),
    ],
)
def test_programs_that_take_several_steps(name: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of large tensors do, of which there are more than a device runs at a time."""
    case = next(case for case in cases.every() if str(case) == name)
    expected = cases.expected(case, case.arguments(**sizes), torch.float32)
    with velm_kernels.use_backend("triton"):
        # Its launches are imported by the first call.
        case.run(expected.arguments)
        for module in list(sys.modules.values()):
            if hasattr(module, "FEW_PROGRAMS"):
                monkeypatch.setattr(module, "FEW_PROGRAMS", 1)
        got = case.run(expected.arguments)
    for result, (error, limit) in expected.errors(got).items():
        assert error <= limit, (result, error, limit)


@pytest.mark.parametrize("shape", [(1, 1, 1, 20), (2, 1, 20, 1), (1, 4, 1, 1)])
def test_gradient_of_a_bias_that_is_summed_in_several_steps(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one program for each of its tiles, over entries, heads, queries and keys. What is summed over all keys of a
    row is the gradient of its logsumexp."""
    torch.manual_seed(0)
    triton = importlib.import_module("velm_kernels.attention.cross_attention.triton")
    monkeypatch.setattr(triton, "BIAS_PROGRAMS", 1)
    inputs = [randn(2, 4, 20, 16), randn(2, 2, 20, 16), randn(2, 2, 20, 16), randn(*shape)]
    options: dict[str, Any] = {"dropout_p": 0.2, "seed": 3, "return_logsumexp": True}
    compare(lambda q, k, v, bias: velm_kernels.cross_attention(q, k, v, bias=bias, **options), inputs)


@pytest.mark.parametrize("dims", [(136, 72), (72, 136)])
def test_rows_in_pieces_and_shared_by_programs(dims: tuple[int, int]) -> None:
    """Wider rows than one piece are read piece by piece, and wider sums than a program holds are those of several; the
    last piece and the last program have columns too many."""
    torch.manual_seed(0)
    inputs = [randn(1, 2, 20, dims[0]), randn(1, 1, 18, dims[0]), randn(1, 1, 18, dims[1]), randn(1, 2, 20, 18)]
    compare(
        lambda q, k, v, bias: velm_kernels.cross_attention(q, k, v, bias=bias, return_logsumexp=True, is_causal=True),
        inputs,
    )
    sides = [randn(1, 1, 18, dims[0]), randn(1, 1, 20, dims[0]), randn(1, 1, 18, dims[1]), randn(1, 1, 20, 24)]
    compare(velm_kernels.bidirectional_attention, sides)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_linear(activation: str | None, has_residual: bool) -> None:
    torch.manual_seed(0)
    inputs = [randn(3, 7, 40), randn(19, 40) / 4, randn(19)] + [randn(3, 7, 19)] * has_residual
    compare(lambda x, weight, bias, residual=None: velm_kernels.linear(x, weight, bias, activation, residual), inputs)


def test_slope_of_tanh_in_16_bits() -> None:
    """From the argument, as of a value that was rounded to 1 nothing is left."""
    torch.manual_seed(0)
    inputs = [randn(21, 40).half(), (randn(19, 40) / 4).half(), randn(19).half()]
    compare(lambda x, weight, bias: velm_kernels.linear(x, weight, bias, "tanh"), inputs)


def test_few_queries_split_their_keys() -> None:
    """One query of each of six heads that share a key head: packed into one block, and split over the keys."""
    torch.manual_seed(0)
    bias = randn(1, 6, 2, 300)
    query, key, value = randn(1, 6, 2, 16), randn(1, 1, 300, 16), randn(1, 1, 300, 16)
    compare(
        lambda q, k, v, b: velm_kernels.cross_attention(q, k, v, bias=b, dropout_p=0.2, seed=3, is_causal=True),
        [query, key, value, bias],
    )
    compare(lambda q, k, v: velm_kernels.cross_attention(q, k, v, return_logsumexp=True), [query, key, value])


@pytest.mark.parametrize("hidden_by", ["mask", "bias", "ranges"])
def test_keys_that_nobody_sees_may_be_nan(hidden_by: str) -> None:
    """Between keys that are seen, so that their tile is read: the second launch keeps them out of the products."""
    torch.manual_seed(0)
    query, key, value = randn(1, 2, 20, 16), randn(1, 2, 40, 16), randn(1, 2, 40, 16)
    hidden = torch.arange(40) % 40 == 25
    given: dict[str, Any] = {}
    if hidden_by == "mask":
        given["mask"] = ~hidden[None, None, None, :].expand(1, 1, 20, 40)
    elif hidden_by == "bias":
        given["bias"] = torch.where(hidden, -torch.inf, randn(1, 2, 20, 40))
    else:
        before = torch.arange(20)[None, :] < 10
        given["key_ranges"] = torch.where(before, 0, 26), torch.where(before, 25, 40)

    def run(fill: float) -> list[torch.Tensor]:
        leaves = [x.clone() for x in (query, key, value)]
        for x in leaves[1:]:
            x[:, :, hidden] = fill
        leaves = [x.requires_grad_() for x in leaves]
        with velm_kernels.use_backend("triton"):
            out = velm_kernels.cross_attention(*leaves, **given)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for with_nan, with_zero in zip(run(torch.nan), run(0.0), strict=True):
        assert with_zero.isfinite().all() and torch.equal(with_nan, with_zero)


def test_ranges_that_begin_and_end_inside_of_tiles() -> None:
    """Of all queries of a block: what each key receives, and every gradient. The first block sees one key of its last
    tile, the second one of its first."""
    torch.manual_seed(0)
    starts = (torch.arange(40) // 16 * 10 + 5)[None]
    ranges = starts, starts + 12
    compare(
        lambda q, k, v, bias: velm_kernels.cross_attention(q, k, v, bias=bias, key_ranges=ranges, return_key_mass=True),
        [randn(1, 2, 40, 16), randn(1, 1, 40, 16), randn(1, 1, 40, 16), randn(1, 1, 40, 40)],
    )


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2, "seed": 3}, {"key_ranges": True}])
def test_packed_sequences(options: dict[str, Any]) -> None:
    """With other numbers of keys than of queries in front of them: of more than one tile, and of none."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 3, 3, 23, 25]), torch.tensor([0, 20, 24, 42, 42])
    if "key_ranges" in options:
        start = torch.arange(25) % 5
        options = {"key_ranges": (start, start + 9)}
    extras = {"return_logsumexp": True, "return_key_mass": True}
    compare(
        lambda q, k, v: velm_kernels.cross_attention_varlen(q, k, v, *bounds, **options, **extras),
        [randn(25, 4, 16), randn(42, 2, 16), randn(42, 2, 12)],
    )


def test_dropout_drops_the_same_elements_as_the_reference() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(2, 3, 9, 16), torch.zeros(2, 3, 37, 16)
    # With equal scores and the identity as values, the output shows which weights were kept.
    value = torch.eye(37).expand(2, 3, 37, 37).contiguous()
    outs = []
    for backend in ("triton", "reference"):
        with velm_kernels.use_backend(backend):
            outs.append(velm_kernels.cross_attention(query, key, value, dropout_p=0.5, seed=-(2**40) + 5))
    assert torch.equal(outs[0] == 0, outs[1] == 0)
    assert 0.4 < (outs[0] == 0).float().mean() < 0.6


def test_same_bits_every_time() -> None:
    torch.manual_seed(0)
    inputs = [randn(2, 2, 20, 16), randn(2, 2, 30, 16), randn(2, 2, 30, 16), randn(1, 2, 1, 30)]
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with velm_kernels.use_backend("triton"):
            out = velm_kernels.cross_attention(*leaves[:3], bias=leaves[3])
        runs.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_large_scores() -> None:
    """What is rounded is the difference of scores from the largest, and from logsumexp, not the scores in base 2."""
    torch.manual_seed(0)
    inputs = [3 * randn(1, 2, 18, 64), 3 * randn(1, 2, 40, 64), randn(1, 2, 40, 16)]
    assert (inputs[0] @ inputs[1].transpose(-1, -2)).abs().max() / 8 > 30
    compare(lambda q, k, v: velm_kernels.cross_attention(q, k, v, return_logsumexp=True), inputs)
    compare(lambda q, k, v: velm_kernels.cross_attention(q, k, v, is_causal=True, softcap=50.0), inputs)
    sides = [3 * randn(1, 1, 18, 64), 3 * randn(1, 1, 20, 64), randn(1, 1, 18, 16), randn(1, 1, 20, 16)]
    compare(velm_kernels.bidirectional_attention, sides)

    # Of scores between 1000 and 1040, rounded to base 2 each, weights would be off by 4e-5.
    bias = 1000 + 10 * torch.arange(40).remainder(5) + randn(1, 1, 18, 40)
    zeros, value = torch.zeros(1, 1, 18, 64), randn(1, 1, 40, 16)
    with velm_kernels.use_backend("triton"):
        out, logsumexp = velm_kernels.cross_attention(
            zeros, torch.zeros(1, 1, 40, 64), value, bias=bias, return_logsumexp=True
        )
    exact = torch.softmax(bias.double(), -1) @ value.double()
    assert_accurate("out", out, torch.softmax(bias, -1) @ value, exact)
    assert torch.equal(logsumexp, torch.logsumexp(bias.double(), -1).float())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("queries", [1, 9])
def test_rows_that_are_nearly_one_key(queries: int, dropout_p: float) -> None:
    """In 16 bits, where of dp - delta of the one key the rounding of the result would be all that is left."""
    torch.manual_seed(2)
    inputs = [3 * randn(1, 2, queries, 64), 3 * randn(1, 2, 50, 64), 3 * randn(1, 2, 50, 16)]
    lengths, results = torch.tensor([47]), []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [x.half().to(dtype).requires_grad_() for x in inputs]
        with velm_kernels.use_backend(backend):
            out = velm_kernels.cross_attention(*leaves, key_lengths=lengths, dropout_p=dropout_p, seed=4)
            # Two directions at once, of which both have few rows.
            both = velm_kernels.bidirectional_attention(
                leaves[0], leaves[1][:, :, :queries], *[leaves[2][:, :, :queries]] * 2
            )
        results.append(
            [
                *torch.autograd.grad(out.square().sum(), leaves),
                *torch.autograd.grad(sum(x.square().sum() for x in both), leaves),
            ]
        )
    for got, exact in zip(*results, strict=True):
        assert relative_rms(got, exact) < 4 * torch.finfo(torch.float16).eps


def test_many_rows_in_16_bits() -> None:
    """More than those that have the sum of grad * out from the products."""
    torch.manual_seed(0)
    inputs = [randn(1, 1, 70, 16), randn(1, 1, 20, 16), randn(1, 1, 20, 16)]
    compare(lambda q, k, v: velm_kernels.cross_attention(q, k, v, return_logsumexp=True), [x.half() for x in inputs])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(value: float) -> None:
    """One entry of a bias reaches exactly the row that reads it, and of the keys those that the row sees."""
    torch.manual_seed(0)
    query, key, values, bias = randn(1, 1, 20, 16), randn(1, 1, 20, 16), randn(1, 1, 20, 16), randn(1, 1, 20, 20)
    row, seen = 5, torch.arange(20) <= 5
    runs = []
    for entry in (0.0, value):
        bias = bias.clone()
        bias[0, 0, row, 2] = entry
        leaves = [x.clone().requires_grad_() for x in (query, key, values, bias)]
        with velm_kernels.use_backend("triton"):
            out, logsumexp, mass = velm_kernels.cross_attention(
                *leaves[:3], bias=leaves[3], is_causal=True, return_logsumexp=True, return_key_mass=True
            )
        runs.append([x[0, 0] for x in (out, logsumexp, mass, *torch.autograd.grad(out.sum(), leaves))])
    (out, lse, mass, dq, dk, dv, dbias) = runs[1]
    others = torch.arange(20) != row
    for clean, got, untouched in zip(
        runs[0], runs[1], (others, others, ~seen, others, ~seen, ~seen, others), strict=True
    ):
        assert clean.isfinite().all() or clean is runs[0][1]
        assert torch.equal(clean[untouched], got[untouched])
    assert out[row].isnan().all() and dq[row].isnan().all() and dk[seen].isnan().all()
    assert lse[row].isnan() if value != value else lse[row] == torch.inf
    assert torch.equal(dbias[row].isnan(), seen) and (dbias[row, ~seen] == 0).all()
    assert torch.equal(mass.isnan(), seen) and torch.equal(dv.isnan().all(1), seen)


def test_every_token_finds_its_segment() -> None:
    """By halving, of numbers of segments that are no powers of two either; the sixth is empty."""
    torch.manual_seed(0)
    for segments in range(1, 8):
        counts = (3 + 5 * torch.arange(segments)) % 7
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        inputs = [randn(int(counts.sum()), 12)]
        compare(lambda x, bounds=bounds: velm_kernels.segment_pool(x, bounds, "sum"), inputs)


@pytest.mark.parametrize("values", [(torch.nan,), (torch.inf,), (torch.nan, torch.inf), (-torch.inf,)])
def test_nan_and_infinity_in_reductions(values: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    x = randn(2, 40, 20)
    for i, value in enumerate(values):
        x[0, 3 + 20 * i] = value
    lengths = torch.tensor([38, 7])
    live = torch.arange(40)[:, None] < 38
    for mode in ("mean", "sum", "max", "logsumexp"):
        with velm_kernels.use_backend("triton"):
            got = velm_kernels.masked_pool(x, lengths, mode=mode)
        with velm_kernels.use_backend("reference"):
            torch.testing.assert_close(got, velm_kernels.masked_pool(x, lengths, mode=mode), equal_nan=True)
    for p in (1.0, 3.0, 2.5):
        with velm_kernels.use_backend("triton"):
            got = velm_kernels.masked_pool(x, lengths, mode="gem", p=p)
        clamped = torch.where(live, x[0].double().clamp(min=1e-6) ** p, 0.0)
        torch.testing.assert_close(got[0], ((clamped.sum(0) / 38) ** (1 / p)).float(), equal_nan=True)
        assert got[1].isfinite().all()

    outs, lses = [randn(1, 1, 4, 20) for _ in range(3)], [randn(1, 1, 4) for _ in range(3)]
    for i, value in enumerate(values):
        lses[i][0, 0, 2] = value
    results = []
    for backend in ("triton", "reference"):
        leaves = [lse.clone().requires_grad_() for lse in lses]
        with velm_kernels.use_backend(backend):
            out, lse = velm_kernels.merge_attention(outs, leaves)
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)

    v, q, h = randn(2, 30, 40), randn(2, 5, 40), randn(3, 40)
    v[0, 4, 7] = values[0]
    with velm_kernels.use_backend("triton"):
        maps = velm_kernels.bilinear_attention(v, q, h, q_lengths=torch.tensor([3, 5]))
    with velm_kernels.use_backend("reference"):
        expected = velm_kernels.bilinear_attention(v, q, h, q_lengths=torch.tensor([3, 5]))
    assert not maps[0].isfinite().all() and (maps[0, :, :, 3:] == 0).all()
    torch.testing.assert_close(maps, expected, equal_nan=True)


def test_gem_of_large_values_and_large_powers() -> None:
    for value, p in ((100.0, 20.0), (1e4, 10.0), (1e20, 3.0), (3e38, 999.0), (1e-5, 900.0)):
        x = torch.full((1, 4, 8), value, requires_grad=True)
        with velm_kernels.use_backend("triton"):
            out = velm_kernels.masked_pool(x, mode="gem", p=p)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert (out == value).all() and (grad == 0.25).all()
    torch.manual_seed(0)
    x = 0.9 + 0.2 * torch.rand(1, 33, 20)
    for p in (300.0, 0.5):
        with velm_kernels.use_backend("triton"):
            got = velm_kernels.masked_pool(x, mode="gem", p=p)
        torch.testing.assert_close(got, ((x.double() ** p).mean(1) ** (1 / p)).float(), rtol=1e-6, atol=0)
