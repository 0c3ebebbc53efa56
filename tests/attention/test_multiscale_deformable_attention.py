"""What is peculiar to multiscale_deformable_attention: modules of transformers beside it, edges, threads, errors."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_with_cuda
from velm_kernels.attention.multiscale_deformable_attention import reference

SHAPES = [(8, 16), (5, 7), (1, 3)]
TOKENS = sum(height * width for height, width in SHAPES)
BATCH, QUERIES, HEADS, D, POINTS = 2, 21, 3, 20, 4


def drawn(dtype: torch.dtype = torch.float32, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    value = draw(BATCH, TOKENS, HEADS, d)
    locations = 0.5 * draw(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2) + 0.5
    weights = draw(BATCH, QUERIES, HEADS, len(SHAPES), POINTS).flatten(-2).softmax(-1)
    return value.to(dtype), locations.to(dtype), weights.view(locations.shape[:-1]).to(dtype)


def with_gradients(function: Any, *tensors: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return velm_kernels.multiscale_deformable_attention(value, torch.tensor(SHAPES), locations, weights)


def meaning(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return reference.multiscale_deformable_attention(value, torch.tensor(SHAPES), locations, weights)


def of_transformers(name: str) -> Any:
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name == "mask2former":
        return lambda value, locations, weights: module.multi_scale_deformable_attention(
            value, SHAPES, locations, weights
        )
    peer = module.MultiScaleDeformableAttention()
    return lambda value, locations, weights: peer(value, None, SHAPES, None, locations, weights, 64)


@pytest.mark.parametrize("name", ["deformable_detr", "grounding_dino", "omdet_turbo", "mask2former"])
def test_modules_of_transformers(name: str) -> None:
    for got, wanted in zip(with_gradients(ours, *drawn()), with_gradients(of_transformers(name), *drawn())):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# Edges of the levels and of their tokens, and what lies around them.
PLACES = [0.0, 1.0, 0.25, 0.4375, 0.5, 1.5 / 16, -0.5 / 16, 1.03125, -0.0625, 1.0625, -3.0, 1e6, -1e30, 0.3]


def at_places() -> tuple[Tensor, Tensor, Tensor]:
    """Of the first level, whose sides are powers of 2, every pair of places."""
    pairs = torch.cartesian_prod(torch.tensor(PLACES), torch.tensor(PLACES))
    value, _, _ = drawn()
    locations = pairs.view(1, -1, 1, 1, 1, 2).expand(BATCH, -1, HEADS, 1, 1, 2).contiguous()
    return value[:, :128], locations, torch.rand(locations.shape[:-1], generator=torch.Generator().manual_seed(2))


@every_backend_with_cuda
def test_edges_are_those_of_grid_sample(backend: Backend) -> None:
    """Exactly on a token's middle, on a level's border, half outside and far away."""

    def by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        maps = value.permute(0, 2, 3, 1).reshape(BATCH * HEADS, D, 8, 16)
        grid = 2 * locations[:, :, :, 0].transpose(1, 2).flatten(0, 1) - 1
        sampled = torch.nn.functional.grid_sample(maps, grid, align_corners=False).view(BATCH, HEADS, D, -1)
        return (sampled * weights[..., 0, 0].transpose(1, 2)[:, :, None]).permute(0, 3, 1, 2).flatten(2)

    def here(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return velm_kernels.multiscale_deformable_attention(value, [(8, 16)], locations, weights)

    with backend.use():
        found = with_gradients(here, *at_places())
    for got, wanted in zip(found, with_gradients(by_grid_sample, *(x.double() for x in at_places()))):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@every_backend_with_cuda
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_location_that_is_no_number(backend: Backend, special: float) -> None:
    """makes its row NaN, as plain torch has it, and no other; nothing of the value is read for it."""
    value, locations, weights = drawn()
    locations[1, 5, 2, 1, 3, 0] = special
    with backend.use():
        out, of_value, of_locations, of_weights = with_gradients(ours, value, locations, weights)
    exact = with_gradients(meaning, *(x.double() for x in (value, locations, weights)))
    assert out.view(BATCH, QUERIES, HEADS, D)[1, 5, 2].isnan().all() and out.isnan().sum() == D
    assert of_value.isfinite().all()
    for got, wanted in zip((out, of_value, of_locations, of_weights), exact):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    theirs = of_transformers("deformable_detr")(value, locations, weights)
    assert torch.equal(theirs.isnan(), out.isnan())


@every_backend_with_cuda
def test_what_no_location_touches_is_not_read(backend: Backend) -> None:
    """Corners outside are skipped and not multiplied with 0: NaN in the first and last token of a level stays there."""
    value, locations, weights = drawn()
    value[:, [0, 127, 128, 162, 163, 165]] = math.nan
    far = torch.where(locations < 0.5, -0.3, 1.3)
    with backend.use():
        found = with_gradients(ours, value, far, weights)
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("d", [1, 8, 16, 32, 41, 64, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_backend_with_cuda
def test_any_number_of_columns(backend: Backend, dtype: torch.dtype, d: int) -> None:
    """Whole vectors, several of them and a part of one; a value that lies in a wider projection."""
    value, locations, weights = drawn(dtype, d)
    packed = torch.cat([value, torch.full_like(value, math.nan)], -1)[..., :d]
    with backend.use():
        found = with_gradients(ours, value, locations, weights)
        strided = ours(packed, locations, weights)
    assert torch.equal(strided, found[0])
    exact = with_gradients(meaning, *(x.double() for x in (value, locations, weights)))
    for got, wanted in zip(found, exact):
        error = torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_samples_of_a_large_value(dtype: torch.dtype) -> None:
    """Of which the CPU reads a copy, head by head; few samples read the heads where they lie."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 128 * 64, 8, 32, generator=generator).to(dtype)[:, :, 1:5]
    locations = torch.rand(1, 4096, 4, 1, 4, 2, generator=generator)
    weights = torch.rand(1, 4096, 4, 1, 4, generator=generator)

    def here(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return velm_kernels.multiscale_deformable_attention(value, [(128, 64)], locations, weights)

    def exactly(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return reference.multiscale_deformable_attention(value, torch.tensor([[128, 64]]), locations, weights)

    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    many = here(*leaves)
    upstream = torch.randn(many.shape, generator=generator).to(dtype)
    found = (many, *torch.autograd.grad(many, leaves, upstream))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = exactly(*doubles)
    for got, wanted in zip(found, (exact, *torch.autograd.grad(exact, doubles, upstream.double()))):
        error = torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 16 * torch.finfo(dtype).eps
    few = slice(1000, 1100)
    alone = here(value, locations[:, few], weights[:, few])
    assert torch.equal(alone, many[:, few])
    of_locations, of_weights = torch.autograd.grad(alone, leaves[1:], upstream[:, few])
    assert torch.equal(of_locations[:, few], found[2][:, few]) and torch.equal(of_weights[:, few], found[3][:, few])


@every_backend_with_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_samples(backend: Backend, dtype: torch.dtype) -> None:
    """So many of each level that work is divided, in levels of more tokens than a block has threads, and of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([(37, 41), (1, 1)])
    value = torch.randn(1, 37 * 41 + 1, 2, 8, generator=generator).to(dtype)
    locations = (0.4 * torch.randn(1, 423, 2, 2, 4, 2, generator=generator) + 0.5).to(dtype)
    weights = torch.rand(1, 423, 2, 2, 4, generator=generator).to(dtype)

    def here(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return velm_kernels.multiscale_deformable_attention(value, shapes, locations, weights)

    def exactly(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return reference.multiscale_deformable_attention(value, shapes, locations, weights)

    with backend.use():
        found, again = (with_gradients(here, value, locations, weights) for _ in range(2))
    wanted = with_gradients(exactly, *(x.double() for x in (value, locations, weights)))
    for got, once_more, true in zip(found, again, wanted):
        assert torch.equal(got, once_more)
        error = torch.linalg.vector_norm(got.double() - true) / torch.linalg.vector_norm(true)
        assert error < 16 * torch.finfo(dtype).eps


def test_same_bits_for_any_number_of_threads() -> None:
    before, bits = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            bits.append(with_gradients(ours, *drawn()))
    finally:
        torch.set_num_threads(before)
    for others in bits[1:]:
        assert all(torch.equal(x, y) for x, y in zip(bits[0], others))


@every_backend_with_cuda
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_that_are_asked_for(backend: Backend, wanted: tuple[int, ...]) -> None:
    every = with_gradients(ours, *drawn())[1:]
    given = list(drawn())
    for place in wanted:
        given[place].requires_grad_()
    with backend.use():
        out = ours(*given)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(out, [given[place] for place in wanted], upstream)
    for got, place in zip(found, wanted):
        torch.testing.assert_close(got, every[place], rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit() -> None:
    value, locations, weights = drawn()
    for shapes in (torch.tensor([(8, 16), (5, 7), (1, 2)]), [(8, 16), (5, 7), (1, 2)]):
        with pytest.raises(ValueError, match=r"spatial_shapes: .* 166 tokens .* given 8 \* 16 \+ 5 \* 7 \+ 1 \* 2"):
            velm_kernels.multiscale_deformable_attention(value, shapes, locations, weights)
    with pytest.raises(ValueError, match="spatial_shapes"):
        shapes = torch.tensor([(8, 16), (5, 7), (-1, -3)])
        velm_kernels.multiscale_deformable_attention(value, shapes, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations: expected .*\(2, 21, 3, 2, 4, 2\), given"):
        velm_kernels.multiscale_deformable_attention(value, [(8, 16), (38, 1)], locations, weights)


def test_levels_without_tokens_read_zeros() -> None:
    value, locations, weights = drawn()
    shapes = torch.tensor([(8, 16), (0, 7), (38, 1)])
    weights[:, :, :, 1] = 7.0
    found = velm_kernels.multiscale_deformable_attention(value, shapes, locations, weights)
    weights[:, :, :, 1] = 0.0
    torch.testing.assert_close(found, velm_kernels.multiscale_deformable_attention(value, shapes, locations, weights))
