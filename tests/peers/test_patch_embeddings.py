"""The patch embeddings of transformers beside patch_embed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.numbers import assert_accurate

transformers = pytest.importorskip("transformers")


def qwen2_vl(rows: Tensor) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    module = PatchEmbed(patch_size=4, temporal_patch_size=2, in_channels=3, embed_dim=24)
    return module, module.proj, lambda given: module(given)


def qwen3_vl(rows: Tensor) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

    config = SimpleNamespace(patch_size=4, temporal_patch_size=2, in_channels=3, hidden_size=24)
    module = Qwen3VLVisionPatchEmbed(config)
    return module, module.proj, lambda given: module(given)


def clip(pixels: Tensor) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    config = transformers.CLIPVisionConfig(hidden_size=24, image_size=24, patch_size=8)
    module = CLIPVisionEmbeddings(config)

    def tokens(given: Tensor) -> Tensor:
        # Without the class token and positions.
        return module(given)[:, 1:] - module.position_embedding.weight[1:]

    return module, module.patch_embedding, tokens


def siglip(pixels: Tensor) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

    config = transformers.SiglipVisionConfig(hidden_size=24, image_size=24, patch_size=8)
    module = SiglipVisionEmbeddings(config)
    return module, module.patch_embedding, lambda given: module(given) - module.position_embedding.weight


def siglip2(rows: Tensor) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    config = transformers.Siglip2VisionConfig(hidden_size=24, num_patches=16, patch_size=8)
    module = Siglip2VisionEmbeddings(config)
    # What its forward does before positions are added.
    return module, module.patch_embedding, lambda given: module.patch_embedding(given.to(module.patch_embedding.weight))


MODELS = {
    qwen2_vl: (10, 3 * 2 * 4 * 4),
    qwen3_vl: (10, 3 * 2 * 4 * 4),
    clip: (2, 3, 24, 24),
    siglip: (2, 3, 24, 24),
    siglip2: (2, 16, 3 * 8 * 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_values_and_gradients(model: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(MODELS[model]).to(dtype)
    module, projection, forward = model(pixels)
    module.to(dtype)
    names = ["weight", *(["bias"] if projection.bias is not None else [])]
    leaves = [getattr(projection, name) for name in names]

    def run(function: Any, given: list[Tensor]) -> list[Tensor]:
        out = function(*given)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator).to(dtype).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, given[1:], upstream)]

    given = [pixels, *leaves]
    ours = run(velm_kernels.patch_embed, given)
    theirs = run(lambda x, *_: forward(x), given)
    exact = run(velm_kernels.patch_embed, [x.detach().double().requires_grad_() for x in given])
    # The positions that are added and taken off again round too.
    for name, one, other, true in zip(("out", *names), ours, theirs, exact, strict=True):
        assert_accurate(name, one, other, true)
        assert_accurate(f"{name} of the model", other, one, true, dtype, ulps=16.0)
