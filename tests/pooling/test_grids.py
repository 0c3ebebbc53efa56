"""What is peculiar to pool_grid, merge_patches and interpolated_embedding: torch's and transformers' own functions
beside them, taps and positions, errors that only values show."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_with_cuda

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def modeling(family: str) -> Any:
    """transformers' module of a family."""
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def beside(got: Any, expected: Any, *tensors: Tensor) -> None:
    """The same result and gradients from two functions."""
    found = []
    for function in (got, expected):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, randn(*out.shape, seed=1).to(out.dtype))])
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def skip_without_kernels(backend: Backend) -> None:
    if backend.name in ("cuda", "device_on_host"):
        pytest.skip("not on this backend")


@every_backend_with_cuda
@pytest.mark.parametrize(("height", "width", "factor"), [(27, 27, 2), (9, 13, 4), (3, 3, 3), (5, 2, 3), (4, 6, 1)])
def test_pool_grid_beside_torch(backend: Backend, height: int, width: int, factor: int) -> None:
    skip_without_kernels(backend)

    def maps(x: Tensor) -> Tensor:
        return x.view(2, height, width, 7).permute(0, 3, 1, 2)

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(maps(x), factor).flatten(2).transpose(1, 2)

    def resized(x: Tensor) -> Tensor:
        size = (-(-height // factor), -(-width // factor))
        return F.interpolate(maps(x), size, mode="bilinear").flatten(2).transpose(1, 2)

    x = randn(2, height * width, 7)
    with backend.use():
        if min(height, width) >= factor:
            beside(lambda x: velm_kernels.pool_grid(x, height, width, factor), average, x)
        beside(lambda x: velm_kernels.pool_grid(x, height, width, factor, "bilinear"), resized, x)


def test_gemma_3_projector() -> None:
    model = modeling("gemma3")
    vision = SimpleNamespace(hidden_size=12, layer_norm_eps=1e-6, image_size=32, patch_size=2)
    projector = model.Gemma3MultiModalProjector(
        SimpleNamespace(vision_config=vision, text_config=SimpleNamespace(hidden_size=8), mm_tokens_per_image=16)
    )
    torch.nn.init.normal_(projector.mm_input_projection_weight)

    def ours(x: Tensor) -> Tensor:
        pooled = velm_kernels.pool_grid(x, 16, 16, projector.kernel_size)
        return projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight

    beside(ours, projector, randn(2, 256, 12))


def test_gemma_4_pooler() -> None:
    model = modeling("gemma4")
    (pooler,) = (value for name, value in vars(model).items() if name.endswith("VisionPooler"))
    heights, widths, tokens, factor = torch.tensor([6, 3, 9]), torch.tensor([6, 12, 3]), 45, 3
    positions = torch.full((3, tokens, 2), -1)
    for entry, height, width in zip(positions, heights.tolist(), widths.tolist(), strict=True):
        entry[: height * width, 0] = torch.arange(width).repeat(height)
        entry[: height * width, 1] = torch.arange(height).repeat_interleave(width)
    padding = positions[..., 0] < 0
    theirs = pooler(SimpleNamespace(hidden_size=16))
    length = tokens // factor**2
    scale = 16**0.5
    x = randn(3, tokens, 16)
    beside(
        lambda x: scale * velm_kernels.pool_grid(x, heights, widths, factor),
        lambda x: theirs(x, positions, padding, length)[0],
        x,
    )


def test_llava_onevision_pooling() -> None:
    model = modeling("llava_onevision")
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=18, patch_size=2))
    theirs = model.LlavaOnevisionModel.apply_pooling
    x = randn(3, 81, 10)
    beside(
        lambda x: velm_kernels.pool_grid(x, 9, 9, 2, "bilinear"),
        lambda x: theirs(SimpleNamespace(config=config), x),
        x,
    )


def test_mistral_3_merger() -> None:
    model = modeling("mistral3")
    vision = SimpleNamespace(hidden_size=10, patch_size=4)
    merger = model.Mistral3PatchMerger(SimpleNamespace(vision_config=vision, spatial_merge_size=2))
    sizes = [(4, 6), (2, 8), (6, 2)]

    def ours(x: Tensor) -> Tensor:
        merged = velm_kernels.merge_patches(x, torch.tensor(sizes), 2, order="channels")
        return merger.merging_layer(merged)

    pixels = torch.tensor(sizes) * 4
    beside(ours, lambda x: merger(x, pixels), randn(sum(h * w for h, w in sizes), 10))


def test_order_of_qwen() -> None:
    """Its processor has squares together; from tokens row by row the same features come."""
    utils = pytest.importorskip("transformers.vision_utils")
    grid = torch.tensor([[2, 4, 6], [1, 2, 2]])
    at = utils.get_vision_position_ids(grid, 2)
    frame = torch.repeat_interleave(torch.arange(3), torch.tensor([24, 24, 4]))
    first = torch.tensor([0, 24, 48])[frame]
    rows = first + at[:, 0] * torch.tensor([6, 6, 2])[frame] + at[:, 1]
    x = randn(52, 5)
    expected = x[rows].view(-1, 20)
    torch.testing.assert_close(velm_kernels.merge_patches(x, grid, 2), expected, rtol=0, atol=0)
    torch.testing.assert_close(velm_kernels.merge_patches(x[rows], grid, 2, blocks=True), expected, rtol=0, atol=0)
    channels = velm_kernels.merge_patches(x, grid, 2, order="channels")
    torch.testing.assert_close(channels, expected.view(-1, 4, 5).transpose(1, 2).flatten(1), rtol=0, atol=0)
    again = velm_kernels.merge_patches(x[rows], grid, 2, order="channels", blocks=True)
    torch.testing.assert_close(again, channels, rtol=0, atol=0)


GRIDS = [(1, 6, 4), (2, 8, 2), (1, 30, 14)]


@every_backend_with_cuda
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("merge", [1, 2])
def test_position_tables_of_transformers(backend: Backend, mode: str, align_corners: bool, merge: int) -> None:
    """Qwen3-VL's, PaddleOCR-VL's, Kimi's and their relatives': the taps that they all call for."""
    skip_without_kernels(backend)
    utils = pytest.importorskip("transformers.vision_utils")
    indices, weights = utils.get_vision_interpolation_indices_and_weights(
        torch.tensor(GRIDS), 7, mode, align_corners, merge
    )
    places = {"align_corners": align_corners, "merge": merge}
    positions = velm_kernels.grid_positions(torch.tensor(GRIDS), 7, **places)
    resized = velm_kernels.resize_taps(GRIDS, (7, 7), mode, **places)

    def theirs(table: Tensor) -> Tensor:
        return (F.embedding(indices, table) * weights[..., None]).sum(1)

    table = randn(49, 12)
    with backend.use():
        for taps in (positions, (indices, weights), resized):
            beside(lambda table, taps=taps: velm_kernels.interpolated_embedding(table, taps, mode), theirs, table)


def test_zeros_around_a_table() -> None:
    """Muse's padding="zeros", and grid_sample's."""
    utils = pytest.importorskip("transformers.vision_utils")
    for mode in ("bilinear", "bicubic"):
        indices, weights = utils.get_vision_interpolation_indices_and_weights(
            torch.tensor(GRIDS), 7, mode, False, padding="zeros"
        )
        positions = velm_kernels.grid_positions(GRIDS, 7)
        table = randn(49, 12)
        got = velm_kernels.interpolated_embedding(table, positions, mode, padding="zeros")
        torch.testing.assert_close(got, (table[indices] * weights[..., None]).sum(1), **CLOSE)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_grid_sample(padding: str) -> None:
    """Also of GLM-4V, which is bicubic beside a border; gradients of the positions too."""
    place = 1.4 * randn(40, 2)

    def theirs(table: Tensor, place: Tensor, mode: str) -> Tensor:
        maps = table.permute(2, 0, 1)[None]
        found = F.grid_sample(maps, place[None, :, None], mode=mode, padding_mode=padding, align_corners=False)
        return found[0, :, :, 0].T

    def ours(table: Tensor, place: Tensor, mode: str) -> Tensor:
        positions = ((place.flip(-1) + 1) * torch.tensor([5.0, 8.0]) - 1) / 2
        return velm_kernels.interpolated_embedding(table, positions, mode, padding=padding)

    for mode in ("bilinear", "bicubic"):
        beside(
            lambda a, b, mode=mode: ours(a, b, mode), lambda a, b, mode=mode: theirs(a, b, mode), randn(5, 8, 6), place
        )


def test_glm_4v_embeddings() -> None:
    model = modeling("glm4v")
    theirs = model.Glm4vVisionEmbeddings(SimpleNamespace(hidden_size=12, image_size=28, patch_size=4))
    sizes = torch.tensor([[1, 4, 6], [1, 10, 8]])
    at = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for _, h, w in sizes.tolist()])
    x = randn(len(at), 12)
    lengths = sizes.prod(1)
    expected = theirs(x, lengths, sizes, at[:, 0], at[:, 1])
    table = theirs.position_embedding.weight
    positions = velm_kernels.grid_positions(sizes, 7)
    torch.testing.assert_close(x + velm_kernels.interpolated_embedding(table, positions, "bicubic"), expected, **CLOSE)


def test_siglip_2_tables() -> None:
    model = modeling("siglip2")
    shapes = torch.tensor([[5, 9], [16, 3], [20, 2], [1, 1]])
    table = randn(8, 8, 12)
    expected = model.Siglip2VisionEmbeddings.resize_positional_embeddings(table, shapes, 48)
    got = velm_kernels.interpolated_embedding(table, velm_kernels.resize_taps(shapes, 8, antialias=True))
    first = 0
    for entry, (height, width) in zip(expected, shapes.tolist(), strict=True):
        torch.testing.assert_close(got[first : first + height * width], entry[: height * width], **CLOSE)
        first += height * width


@pytest.mark.parametrize("size", [(5, 9), (16, 3), (8, 8), (3, 31)])
def test_bicubic_antialias(size: tuple[int, int]) -> None:
    table = randn(8, 11, 6)
    taps = velm_kernels.resize_taps([size], (8, 11), "bicubic", antialias=True)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
    got = velm_kernels.interpolated_embedding(table, taps)
    torch.testing.assert_close(got, expected[0].flatten(1).T, **CLOSE)


@every_backend_with_cuda
def test_gradient_of_the_weights_of_taps(backend: Backend) -> None:
    skip_without_kernels(backend)
    indices = torch.randint(-1, 20, (33, 5), generator=torch.Generator().manual_seed(2))

    def theirs(table: Tensor, weights: Tensor) -> Tensor:
        taken = table[indices.clamp(min=0)].masked_fill((indices < 0)[..., None], 0.0)
        return (taken * weights[..., None]).sum(1)

    with backend.use():
        beside(
            lambda table, weights: velm_kernels.interpolated_embedding(table, (indices, weights)),
            theirs,
            randn(20, 37),
            randn(33, 5, seed=3),
        )


def test_nothing_as_large_as_the_taps_is_kept() -> None:
    table = randn(64, 32).requires_grad_()
    positions = velm_kernels.grid_positions([(40, 50)], 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        velm_kernels.interpolated_embedding(table, positions, "bicubic")
    assert saved
    assert max(x.numel() for x in saved) <= 2000 * 16


def test_errors_that_values_show() -> None:
    x, sizes = randn(24, 4), torch.tensor([2, 4])
    for call, name in (
        (lambda: velm_kernels.pool_grid(x, torch.tensor([4, 2]), torch.tensor([4, 3]), 2), "width: .* divides"),
        (lambda: velm_kernels.pool_grid(x, sizes, torch.tensor([4, 2]), 2), "height: expected maps of 24 tokens"),
        (lambda: velm_kernels.pool_grid(x[None], [5], [6], 2), "height: expected maps of at most 24"),
        (lambda: velm_kernels.pool_grid(x, 4, [6], 2), "height: expected sizes"),
        (lambda: velm_kernels.merge_patches(x, [(4, 6)], 3), r"grid_sizes\[0\]: expected multiples of factor = 3"),
        (lambda: velm_kernels.merge_patches(x, torch.tensor([[2, 3, 4]]), 2), "grid_sizes: expected heights"),
        (lambda: velm_kernels.merge_patches(x[None], (4, 5), 1), "grid_sizes: expected 24 tokens"),
        (lambda: velm_kernels.grid_positions([(3, 4)], 8, merge=2), r"grid_sizes\[0\]: expected multiples of merge"),
        (lambda: velm_kernels.resize_taps([(3, 4)], 8, antialias=True, align_corners=True), "align_corners"),
        (lambda: velm_kernels.interpolated_embedding(randn(6, 4), randn(3, 2)), "weight: expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            call()


def test_a_window_that_does_not_exist_is_zeros() -> None:
    """Where nobody may read sizes, here for a compiler, the kernel touches no memory but that of x."""
    x, sizes = randn(2, 16, 3), torch.tensor([4, 40])
    with velm_kernels.use_backend("cpu"):
        found = torch.compile(velm_kernels.pool_grid, backend="eager")(x, sizes, sizes, 2)
    assert found[1].abs().sum() == 0
    torch.testing.assert_close(found[0], velm_kernels.pool_grid(x[:1], 4, 4, 2)[0])
