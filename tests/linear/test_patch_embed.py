"""patch_embed beside torch's convolutions: layouts, memory, what is left over, gradients; the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velm_kernels
from tests.numbers import assert_accurate
from velm_kernels.backends import small
from velm_kernels.linear.patch_embed import gathered, reference

CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    (nn.Conv1d, (5,), (23,)),
    (nn.Conv2d, (4, 4), (8, 12)),
    (nn.Conv2d, (3, 5), (11, 14)),
    (nn.Conv2d, (1, 1), (3, 2)),
    (nn.Conv2d, (6, 6), (6, 11)),
    (nn.Conv3d, (2, 3, 4), (5, 6, 9)),
]


def convolution(cls: Any, patch: tuple[int, ...], bias: bool = True, embed: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return cls(3, embed, kernel_size=patch, stride=patch, bias=bias)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "turned": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 3 else x,
    "part": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "of one picture": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize(("cls", "patch", "sizes"), CONVOLUTIONS, ids=str)
def test_is_the_convolution(cls: Any, patch: tuple[int, ...], sizes: tuple[int, ...], memory: str) -> None:
    original, pixels = convolution(cls, patch), LAYOUTS[memory](drawn(2, 3, *sizes))
    leaves = pixels, original.weight, original.bias
    ways = {
        "ours": (lambda *given: velm_kernels.patch_embed(*given, layout="channels_first"), torch.float32),
        "theirs": (lambda *given: reference.patch_embed(*given, layout="channels_first"), torch.float32),
        "exact": (lambda *given: reference.patch_embed(*given, layout="channels_first"), torch.float64),
    }
    found = {}
    for name, (function, dtype) in ways.items():
        given = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out = function(*given)
        found[name] = [out.detach(), *torch.autograd.grad(out, given, drawn(*out.shape).to(dtype))]
    for name, ours, theirs, exact in zip(("out", "pixels", "weight", "bias"), *found.values(), strict=True):
        assert_accurate(name, ours, theirs, exact)
    out = found["ours"][0]
    tokens = velm_kernels.patch_embed(*leaves)
    assert tokens.is_contiguous() and torch.equal(tokens, out.flatten(2).transpose(1, 2))
    # What a model does behind its convolution copies nothing.
    assert out.flatten(2).transpose(1, 2).is_contiguous()


def test_what_is_left_over_is_not_read() -> None:
    weight, pixels = drawn(8, 3, 4, 4), drawn(2, 3, 11, 14)
    clean = velm_kernels.patch_embed(pixels[:, :, :8, :12], weight)
    pixels[:, :, 8:], pixels[..., 12:] = torch.nan, torch.inf
    pixels.requires_grad_()
    out = velm_kernels.patch_embed(pixels, weight)
    assert torch.equal(out, clean)
    (grad,) = torch.autograd.grad(out.sum(), pixels)
    assert not grad[:, :, 8:].any() and not grad[..., 12:].any() and grad[:, :, :8, :12].all()


def test_rows_of_patches_are_read_where_they_lie() -> None:
    # As Qwen2-VL has them; a picture of one patch; and one of patches of a pixel, channels last.
    rows = drawn(5, 3 * 2 * 4 * 4)
    last = drawn(2, 6, 5, 3).permute(0, 3, 1, 2)
    for pixels, patch in ((rows.view(5, 3, 2, 4, 4), (2, 4, 4)), (last, (1, 1))):
        assert gathered(pixels, patch)[0].data_ptr() == pixels.data_ptr()
    weight = drawn(7, 3, 2, 4, 4)
    assert torch.equal(
        velm_kernels.patch_embed(rows, weight), velm_kernels.patch_embed(rows.view(5, 3, 2, 4, 4), weight)[:, 0]
    )
    # With as many dimensions as a picture has, rows are none.
    with pytest.raises(ValueError, match=r"^pixels: expected \(batch, 3, \*sizes\)"):
        velm_kernels.patch_embed(drawn(1, 2, 5, 48), drawn(7, 3, 4, 4))
    flat = drawn(2, 5, 96)
    assert torch.equal(velm_kernels.patch_embed(flat, weight), torch.nn.functional.linear(flat, weight.flatten(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    pixels, weight, bias = drawn(2, 3, 8, 8), drawn(7, 3, 4, 4), drawn(7)
    with torch.autocast("cpu", dtype=dtype):
        out = velm_kernels.patch_embed(pixels, weight, bias)
    expected = velm_kernels.patch_embed(pixels.to(dtype), weight.to(dtype), bias.to(dtype))
    assert out.dtype == dtype and torch.equal(out, expected)


@pytest.mark.parametrize(("cls", "patch", "sizes"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_made_as_the_convolution(
    cls: Any, patch: tuple[int, ...], sizes: tuple[int, ...], bias: bool
) -> None:
    original = convolution(cls, patch, bias)
    torch.manual_seed(0)
    ours = velm_kernels.PatchEmbed(3, 7, patch, bias)
    assert all(map(torch.equal, ours.state_dict().values(), original.state_dict().values()))
    assert list(ours.state_dict()) == list(original.state_dict())
    shared = velm_kernels.PatchEmbed.from_module(original.eval())
    assert shared.weight is original.weight and shared.bias is original.bias and not shared.training
    pixels = drawn(2, 3, *sizes)
    torch.testing.assert_close(shared(pixels), original(pixels), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(pixels), shared(pixels).flatten(2).transpose(1, 2))
    assert f"patch_size={patch}" in repr(ours)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"stride": 2}, "stride"),
        ({"padding": 1}, "padding"),
        ({"padding": "same", "stride": 1}, "stride"),
        ({"dilation": 2}, "dilation"),
        ({"groups": 3}, "groups"),
    ],
)
def test_other_convolutions_are_refused(changed: dict[str, Any], named: str) -> None:
    original = nn.Conv2d(3, 6, **{"kernel_size": 4, "stride": 4, **changed})
    with pytest.raises(ValueError, match=f"^convolution: expected a patch embedding, given one where .*{named}"):
        velm_kernels.PatchEmbed.from_module(original)
    with pytest.raises(TypeError, match=r"^convolution: expected a Conv1d"):
        velm_kernels.PatchEmbed.from_module(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"^convolution: expected a Conv1d"):
        velm_kernels.PatchEmbed.from_module(
            torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, kernel_size=4, stride=4))
        )


def test_paddings_that_add_nothing() -> None:
    for padding, patch in (("valid", 4), ("same", 1), (0, 4)):
        original = nn.Conv2d(3, 6, patch, patch, padding=padding)
        pixels = drawn(1, 3, 9, 8)
        torch.testing.assert_close(velm_kernels.PatchEmbed.from_module(original)(pixels), original(pixels))


@pytest.mark.parametrize(
    ("pixels", "weight", "layout", "named"),
    [
        ((2, 3, 3, 8), (7, 3, 4, 4), "tokens", "pixels"),
        ((2, 2, 8, 8), (7, 3, 4, 4), "tokens", "pixels"),
        ((5, 47), (7, 3, 4, 4), "tokens", "pixels"),
        ((5, 48), (7, 3, 4, 4), "channels_first", "layout"),
        ((5, 48), (7,), "tokens", "weight"),
        ((2, 3, 8, 8), (7, 3, 0, 4), "tokens", "weight"),
    ],
)
def test_what_does_not_fit(pixels: Any, weight: Any, layout: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected .*given"):
        velm_kernels.patch_embed(drawn(*pixels), drawn(*weight), layout=layout)


def test_patch_sizes() -> None:
    assert velm_kernels.PatchEmbed(3, 4, 5).patch_size == (5, 5)
    for wrong, error in ((True, TypeError), ("5", TypeError), (0, ValueError), ([], ValueError), ([1] * 4, ValueError)):
        with pytest.raises(error, match=r"^patch_size: expected"):
            velm_kernels.PatchEmbed(3, 4, wrong)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("patch", [1, 3, 5, 8])
def test_the_rule_for_convolutions(
    patch: int, channels: int, recorded: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides the same values; tokens are contiguous."""
    monkeypatch.setattr(small, "enabled", True)
    convolved: list[bool] = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: convolved.append(True) or conv2d(*a, **k))
    weight, bias = drawn(5, channels, patch, patch).requires_grad_(recorded), drawn(5)
    pixels = drawn(2, channels, 2 * patch + 1, 3 * patch)
    if last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    outs = [velm_kernels.patch_embed(pixels, weight, bias, layout) for layout in ("tokens", "channels_first")]
    expected = 1 < patch < (8 if recorded else 100) if last else channels > 4 and 1 < patch < (4 if recorded else 8)
    assert bool(convolved) == expected
    told = velm_kernels.explain("patch_embed", pixels, weight, bias)
    assert told.count("its own function") == expected
    assert outs[0].is_contiguous() and torch.equal(outs[0], outs[1].flatten(2).transpose(1, 2))
    exact = reference.patch_embed(pixels.double(), weight.double(), bias.double())
    torch.testing.assert_close(outs[0].double(), exact, rtol=1e-4, atol=1e-4)
    # Whoever asks for a backend, or has a compiler listen, gets the product.
    convolved.clear()
    with velm_kernels.use_backend("reference"):
        velm_kernels.patch_embed(pixels, weight, bias)
    assert not convolved


@pytest.mark.parametrize("memory", ["contiguous", "channels last", "turned"])
@pytest.mark.parametrize(("cls", "patch", "sizes"), CONVOLUTIONS[1:], ids=str)
def test_weights_in_other_memory(cls: Any, patch: tuple[int, ...], sizes: tuple[int, ...], memory: str) -> None:
    """Of a model that was moved to channels_last, whose weight is a matrix as it lies."""
    original, pixels = convolution(cls, patch), LAYOUTS[memory](drawn(2, 3, *sizes))
    weight = LAYOUTS["channels last"](original.weight.detach())
    assert weight.stride(1) == 1
    found = []
    for given in (weight, original.weight.detach()):
        leaves = [pixels.detach().requires_grad_(), given.requires_grad_()]
        out = velm_kernels.patch_embed(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, drawn(*out.shape))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
