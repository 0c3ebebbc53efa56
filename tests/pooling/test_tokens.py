"""pixel_shuffle_tokens: order, gradients, layouts, torch features, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels


def idefics3(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """As published: four views and two permutations."""
    batch, tokens, dim = x.shape
    x = x.view(batch, height, width, dim).view(batch, height, width // factor, dim * factor).permute(0, 2, 1, 3)
    x = x.reshape(batch, width // factor, height // factor, dim * factor**2).permute(0, 2, 1, 3)
    return x.reshape(batch, tokens // factor**2, dim * factor**2)


@pytest.mark.parametrize(("height", "width", "factor"), [(4, 6, 2), (6, 3, 3), (5, 7, 1), (2, 2, 2)])
def test_order_and_gradient(height: int, width: int, factor: int) -> None:
    x = torch.randn(3, height * width, 5, requires_grad=True)
    ours = velm_kernels.pixel_shuffle_tokens(x, height, width, factor)
    theirs = idefics3(x, height, width, factor)
    assert torch.equal(ours, theirs) and ours.is_contiguous()
    upstream = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (ours, theirs)))


@pytest.mark.parametrize("factor", [2, 3])
def test_order_of_the_models(factor: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    x = torch.randn(2, 36, 5)
    ours = velm_kernels.pixel_shuffle_tokens(x, 6, 6, factor)
    assert torch.equal(ours, Idefics3Connector.pixel_shuffle(None, x, factor))
    if factor == 2:
        internvl = InternVLModel.pixel_shuffle(None, x.view(2, 6, 6, 5), 0.5)
        assert torch.equal(ours, internvl.flatten(1, 2))


def test_projection() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 24, 5), (7, 20), (7,)))
    ours = velm_kernels.pixel_shuffle_tokens(x, 4, 6, 2, weight, bias)
    theirs = torch.nn.functional.linear(idefics3(x, 4, 6, 2), weight, bias)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for got, wanted in zip(*(torch.autograd.grad(out, (x, weight, bias), upstream) for out in (ours, theirs))):
        torch.testing.assert_close(got, wanted)


def test_layouts_and_compile() -> None:
    channels_first = torch.randn(2, 5, 4, 6)
    x = channels_first.flatten(2).transpose(1, 2)
    expected = velm_kernels.pixel_shuffle_tokens(x.contiguous(), 4, 6, 2)
    assert torch.equal(velm_kernels.pixel_shuffle_tokens(x, 4, 6, 2), expected)
    assert torch.equal(velm_kernels.pixel_shuffle_tokens(x[:, None], 4, 6, 2)[:, 0], expected)
    assert velm_kernels.pixel_shuffle_tokens(x[:0], 4, 6, 2).shape == (0, 6, 20)
    compiled = torch.compile(velm_kernels.pixel_shuffle_tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 4, 6, 2), expected)


X = torch.randn(2, 24, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 4, 6, 2), TypeError, "x: expected a tensor"),
        ((torch.randn(2, 24, 5), 4, 5, 2), ValueError, r"x: expected .*4 \* 5 = 20.*given \(2, 24, 5\)"),
        ((torch.randn(2, 24, 5), 4, 6, 4), ValueError, "factor: .*width = 6, given 4"),
        ((torch.randn(2, 24, 5), 4, 6, 0), ValueError, "factor: expected at least 1, given 0"),
        ((torch.randn(2, 24, 5), 4.0, 6, 2), TypeError, "height: expected an integer"),
        ((X, 4, 6, 2, torch.randn(7, 5)), ValueError, r"weight: expected \(out, 2\^2 \* 5 = 20\), given \(7, 5\)"),
        ((X, 4, 6, 2, None, torch.randn(7)), ValueError, "bias: expected None without weight"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        velm_kernels.pixel_shuffle_tokens(*arguments)
