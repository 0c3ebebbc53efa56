"""masked_pool and segment_pool on every backend: numbers, unread tokens, ties, torch features, bad arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.pooling.pool import canonical_masked, reference
from velm_kernels.pooling.pool.reference import MODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels first", "sliced")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``(..., tokens, dim)`` of the same values in another memory layout."""
    if layout == "channels first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    return x.contiguous()


def run(function: Any, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return {"out": out.detach(), "grad_x": grad}


def check(
    backend: Backend, function: Any, written: Any, x: Tensor, live: Tensor, mode: str, upstream: Tensor, layout: str
) -> None:
    exact, plain = run(written, x.double(), upstream), run(written, x, upstream)
    poisoned = laid_out(torch.where(live[..., None], x, torch.nan), layout)
    with backend.use():
        got = run(function, poisoned, upstream)
    assert got["out"].dtype == x.dtype and got["out"].is_contiguous()
    count = live.sum(-1)
    # What cancels in a sum is as inexact as its terms.
    terms = torch.where(live[..., None], x.double(), 0.0).abs().sum(-2)
    if mode == "mean":
        terms = terms / count.clamp(min=1)[..., None]
    if mode == "logsumexp":
        # A logarithm near 0 of a sum near 1: the sum is what has digits.
        terms = torch.ones_like(terms)
    assert_accurate("out", got["out"], plain["out"], exact["out"], floor=float(terms.norm()))
    # bfloat16 upstream gradients are rounded before any kernel sees them, like those of plain torch.
    ulps = 4.0 if mode != "gem" else 12.0
    assert_accurate("grad_x", got["grad_x"], plain["grad_x"], exact["grad_x"], ulps=ulps)
    assert not got["grad_x"][~live].any()
    assert not got["out"][count == 0].any()


@every_kernel
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    tokens=st.one_of(st.integers(0, 20), st.integers(120, 300)),
    dim=st.one_of(st.integers(1, 20), st.integers(1, 90)),
    lengths=st.booleans(),
    masked=st.booleans(),
    mode=st.sampled_from(MODES),
    power=st.sampled_from([3.0, 1.7]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
@example([3], 130, 40, True, True, "mean", 3.0, torch.float32, 1.0, "contiguous", 0)
@example([3], 130, 40, True, False, "max", 3.0, torch.float32, 1.0, "contiguous", 0)
@example([3], 130, 41, False, True, "logsumexp", 3.0, torch.float32, 10.0, "contiguous", 0)
@example([3], 130, 40, True, True, "gem", 1.7, torch.float32, 1.0, "contiguous", 0)
@example([2], 37, 33, True, True, "max", 3.0, torch.bfloat16, 1.0, "channels first", 0)
@example([2], 37, 33, True, True, "logsumexp", 3.0, torch.float32, 1.0, "channels first", 0)
@example([2, 0], 5, 3, True, True, "max", 3.0, torch.float32, 1.0, "contiguous", 0)
def test_masked_pool(
    backend: Backend,
    leading: list[int],
    tokens: int,
    dim: int,
    lengths: bool,
    masked: bool,
    mode: str,
    power: float,
    dtype: torch.dtype,
    scale: float,
    layout: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(*leading, tokens, dim, generator=generator, dtype=torch.float64)).to(dtype)
    given: dict[str, Any] = {"mode": mode, "p": power}
    live = torch.ones(*leading, tokens, dtype=torch.bool)
    if lengths:
        given["lengths"] = torch.randint(0, tokens + 1, leading, generator=generator)
        live &= torch.arange(tokens) < given["lengths"][..., None]
    if masked:
        given["mask"] = torch.rand(tokens, generator=generator) > 0.4
        live &= given["mask"]
    upstream = torch.randn(*leading, dim, generator=generator, dtype=torch.float64)
    check(
        backend,
        lambda x: velm_kernels.masked_pool(x, **given),
        lambda x: reference.masked_pool(x, **given),
        x,
        live,
        mode,
        upstream.to(dtype).double(),
        layout,
    )


@every_kernel
@given(
    sizes=st.lists(st.one_of(st.integers(0, 9), st.integers(100, 300)), max_size=5),
    dim=st.integers(1, 70),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
@example([3, 0, 0, 140, 1, 0], 40, "logsumexp", torch.float32, "contiguous")
@example([0, 0, 12, 3], 40, "max", torch.float32, "contiguous")
@example([7, 0, 12, 3], 64, "gem", torch.bfloat16, "contiguous")
def test_segment_pool(backend: Backend, sizes: list[int], dim: int, mode: str, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(len(sizes) + dim)
    bounds = torch.tensor([0, *itertools.accumulate(sizes)])
    x = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64).to(dtype)
    upstream = torch.randn(len(sizes), dim, generator=generator, dtype=torch.float64).to(dtype)
    exact = run(lambda x: reference.segment_pool(x, bounds, mode), x.double(), upstream)
    plain = run(lambda x: reference.segment_pool(x, bounds, mode), x, upstream)
    with backend.use():
        got = run(lambda x: velm_kernels.segment_pool(x, bounds, mode), laid_out(x, layout), upstream)
    assert_accurate("out", got["out"], plain["out"], exact["out"], floor=float(len(sizes) ** 0.5))
    assert_accurate("grad_x", got["grad_x"], plain["grad_x"], exact["grad_x"], ulps=12.0 if mode == "gem" else 4.0)


@every_backend_with_cuda
@pytest.mark.parametrize("mode", MODES)
def test_segments_are_masked_rows(backend: Backend, mode: str) -> None:
    """And neither padding nor the order of tokens matters, but for the last digits of sums."""
    lengths = torch.tensor([5, 0, 70, 140])
    x = torch.randn(4, 140, 20, generator=torch.Generator().manual_seed(0))
    live = torch.arange(140) < lengths[:, None]
    order = torch.randperm(140)
    with backend.use():
        rows = velm_kernels.masked_pool(x, lengths, mode=mode)
        packed = velm_kernels.segment_pool(x[live], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), mode)
        shuffled = velm_kernels.masked_pool(x[:, order], mask=live[:, order], mode=mode)
        padded = velm_kernels.masked_pool(torch.cat([x, torch.full((4, 9, 20), torch.nan)], 1), lengths, mode=mode)
    # Half an ulp of each partial sum, of which the largest stay below 64.
    atol = 140 * 64 * 2.0**-25 if mode == "sum" else 2e-6
    for other in (packed, shuffled, padded):
        torch.testing.assert_close(other, rows, rtol=4e-6, atol=atol)


@every_backend_with_cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels first"])
def test_the_first_of_equal_ones_gets_the_gradient(backend: Backend, layout: str) -> None:
    """Also of those that are added up apart: more than are reduced at a time."""
    x = torch.zeros(2, 300, 20)
    x[0, 7:, :] = 2.0
    x[0, 3, 4] = x[0, 9, 4] = 5.0
    x[1, :, :] = -torch.inf
    x[1, 20:22, 3] = torch.nan
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, 3] = mask[1, :6] = False
    expected = torch.zeros(2, 300, 20)
    expected[0, 7] = expected[1, 6] = 1.0
    expected[0, 7, 4], expected[0, 9, 4] = 0.0, 1.0
    expected[1, 6, 3], expected[1, 20, 3] = 0.0, 1.0
    with backend.use():
        got = run(lambda x: velm_kernels.masked_pool(x, mask=mask, mode="max"), laid_out(x, layout), torch.ones(2, 20))
    assert torch.equal(got["grad_x"], expected)
    assert torch.equal(got["out"][0], torch.full((20,), 2.0).index_fill(0, torch.tensor(4), 5.0))
    assert torch.equal(got["out"][1].isnan(), torch.arange(20) == 3)
    assert (got["out"][1].isnan() | (got["out"][1] == -torch.inf)).all()


@every_backend_with_cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels first"])
def test_infinities_and_nan(backend: Backend, layout: str) -> None:
    x = torch.randn(1, 20, 40)
    x[0, 5, 0] = torch.inf
    x[0, :, 1] = -torch.inf
    x[0, 7, 2] = -torch.inf
    x[0, 9, 3] = torch.nan
    x[0, :, 4] += 1e4
    x[0, :, 5] -= 1e4
    # What comes later is larger by any amount.
    for column, slope in ((6, 50.0), (7, -50.0), (8, 0.9), (9, 12.0)):
        x[0, :, column] = slope * torch.arange(20)
    with backend.use():
        out = velm_kernels.masked_pool(laid_out(x, layout), mode="logsumexp")
        torch.testing.assert_close(out, x.logsumexp(1), equal_nan=True)
        got = run(lambda x: velm_kernels.masked_pool(x, mode="logsumexp"), laid_out(x, layout), torch.ones(1, 40))
        assert not got["grad_x"][0, :, 1].any()
        for mode, plain in (("sum", x.sum(1)), ("mean", x.mean(1))):
            out = velm_kernels.masked_pool(laid_out(x, layout), mode=mode)
            torch.testing.assert_close(out, plain, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert velm_kernels.masked_pool(laid_out(x, layout), mode="gem")[0, 3].isnan()


@every_backend_with_cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_what_is_not_finite_changes_no_bit_beside_it(backend: Backend, mode: str, layout: str) -> None:
    torch.manual_seed(0)
    # Far apart, so that the running maximum of logsumexp moves at different tokens in different columns.
    x = 6.0 * torch.randn(2, 37, 70)
    planted = x.clone()
    for place, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        planted[0, 3 + 5 * place, 5 + 9 * place] = number
    untouched = torch.ones(2, 70, dtype=torch.bool)
    untouched[0, 5 : 5 + 27 : 9] = False
    with backend.use():
        found = []
        for values in (x, planted):
            given = values.transpose(1, 2).contiguous() if layout == "pixels" else values
            found.append(velm_kernels.masked_pool(given, mode=mode, channels_first=layout == "pixels"))
    assert torch.equal(found[0][untouched], found[1][untouched])


@every_backend_with_cuda
def test_pixels_are_read_as_they_lie(backend: Backend) -> None:
    x, mask = torch.randn(2, 24, 5, 7), torch.rand(2, 5, 7) > 0.3
    expected = reference.masked_pool(x, None, mask, "gem", 3.0, channels_first=True)
    for pixels in (x, x.to(memory_format=torch.channels_last)):
        rows = canonical_masked(pixels, mask=mask, channels_first=True)["x"]
        assert rows.data_ptr() == pixels.data_ptr()
        with backend.use():
            out = velm_kernels.masked_pool(pixels, mask=mask, mode="gem", channels_first=True)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with backend.use():
        video = velm_kernels.masked_pool(x.unflatten(2, (5, 1)), channels_first=True)
        expanded = velm_kernels.masked_pool(torch.randn(1, 9, 4).expand(3, 9, 4), mode="max")
    torch.testing.assert_close(video, x.mean((2, 3)))
    assert torch.equal(expanded[0], expanded[2])


@every_backend_with_cuda
@pytest.mark.parametrize("power", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels first"])
def test_gem_of_numbers_about_the_least(backend: Backend, power: float, layout: str) -> None:
    """What is below 1e-6 counts as 1e-6, and has no gradient."""
    torch.manual_seed(0)
    x = 1e-6 * (4.0 * torch.rand(2, 40, 20) - 1.0)
    # One column of numbers as others have them, and one below.
    x[..., 1], x[..., 2] = 1e6 * x[..., 1].abs(), -1.0
    lengths, upstream = torch.tensor([40, 7]), torch.randn(2, 20)

    def written(x: Tensor) -> Tensor:
        return reference.masked_pool(x, lengths, None, "gem", power)

    exact, plain = run(written, x.double(), upstream), run(written, x, upstream)
    with backend.use():
        got = run(lambda x: velm_kernels.masked_pool(x, lengths, mode="gem", p=power), laid_out(x, layout), upstream)
    for column in range(3):
        for name in ("out", "grad_x"):
            of_column = (found[name][..., column] for found in (got, plain, exact))
            assert_accurate(f"{name} {column}", *of_column, ulps=12.0)
    assert (got["out"][:, 2] == torch.tensor(1e-6)).all() and not got["grad_x"][..., 2].any()


@every_backend_with_cuda
def test_means_of_more_tokens_than_are_counted_at_a_time(backend: Backend) -> None:
    mask = torch.rand(2, 2100) < 0.5
    with backend.use():
        got = run(lambda x: velm_kernels.masked_pool(x, mask=mask), torch.ones(2, 2100, 3), torch.ones(2, 3))
    assert torch.equal(got["out"], torch.ones(2, 3))
    torch.testing.assert_close(got["grad_x"], (mask / mask.sum(1, keepdim=True))[..., None].expand(-1, -1, 3))


def test_keeps_x_only_where_backward_reads_it() -> None:
    for mode in MODES:
        out = velm_kernels.masked_pool(torch.randn(2, 5, 3, requires_grad=True), mode=mode)
        node = out.grad_fn.next_functions[0][0]  # below the view
        kept = any(tensor is not None and tensor.dim() == 3 for tensor in node.saved_tensors)
        assert kept is (mode in ("logsumexp", "gem"))
