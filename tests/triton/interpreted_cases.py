"""The Triton kernels against the reference, executed by the interpreter: run by test_interpreted.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import velm_kernels
from tests.numbers import assert_accurate
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_size", [1, 300])
def test_gated_residual(dtype: torch.dtype, gate_size: int) -> None:
    torch.manual_seed(0)
    row_mask = torch.rand(3, 7) > 0.4
    x = randn(3, 7, 300, dtype=dtype)
    # wide open, where the slope of tanh is small
    inputs = [randn(3, 7, 300, dtype=dtype), x, 3 + randn(gate_size, dtype=dtype)]
    compare(lambda residual, x, gate: velm_kernels.gated_residual(residual, x, gate, row_mask), inputs)
    compare(velm_kernels.gated_residual, inputs)


def test_gated_residual_does_not_read_masked_rows() -> None:
    torch.manual_seed(0)
    row_mask = torch.rand(9) > 0.4
    residual, x, gate = randn(9, 20), randn(9, 20), randn(20).requires_grad_()
    x[~row_mask] = torch.nan
    x.requires_grad_()
    with velm_kernels.use_backend("triton"):
        out = velm_kernels.gated_residual(residual, x, gate, row_mask)
    assert torch.equal(out[~row_mask], residual[~row_mask])
    grad_x, grad_gate = torch.autograd.grad(out.sum(), (x, gate))
    assert grad_gate.isfinite().all() and (grad_x[~row_mask] == 0).all()


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


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_bidirectional_attention(masked: bool, dropout_p: float) -> None:
    torch.manual_seed(0)
    mask_a = torch.rand(2, 19) > 0.3 if masked else None
    mask_b = torch.rand(2, 23) > 0.3 if masked else None
    if mask_b is not None:
        mask_b[1] = False

    def function(*tensors: torch.Tensor) -> Any:
        return velm_kernels.bidirectional_attention(
            *tensors, mask_a=mask_a, mask_b=mask_b, dropout_p=dropout_p, seed=9, return_logsumexp=True
        )

    compare(function, [randn(2, 2, 19, 16), randn(2, 2, 23, 16), randn(2, 2, 19, 24), randn(2, 2, 23, 8)])


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_linear(activation: str | None, has_residual: bool) -> None:
    torch.manual_seed(0)
    inputs = [randn(3, 7, 40), randn(19, 40) / 4, randn(19)] + [randn(3, 7, 19)] * has_residual
    compare(lambda x, weight, bias, residual=None: velm_kernels.linear(x, weight, bias, activation, residual), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [randn(21, 40, dtype=dtype), (randn(19, 40) / 4).to(dtype), randn(19, dtype=dtype)]
    compare(lambda x, weight, bias: velm_kernels.linear(x, weight, bias, "gelu"), inputs)


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
