"""pixel_shuffle_tokens: order, gradients, layouts, torch features, bad arguments."""

from __future__ import annotations

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
