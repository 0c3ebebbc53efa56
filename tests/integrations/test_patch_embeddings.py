"""Embeddings of flattened patches, patched: Qwen2-VL and what comes from it."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velm_kernels
from velm_kernels.integrations.families import patch_embeddings
from velm_kernels.integrations.patching import _KERNEL, _REPLACEMENTS, _load_families, is_replaced

from .running import Named, assert_same, exact_run, run

_load_families()
CLASSES = sorted(key for key, replacement in _REPLACEMENTS.items() if replacement is patch_embeddings.PatchEmbed)


class Config:
    patch_size, temporal_patch_size, in_channels, num_channels, hidden_size, embed_dim = 4, 2, 3, 3, 16, 16


def made(key: tuple[str, str]) -> nn.Module:
    cls = getattr(importlib.import_module(key[0]), key[1])
    torch.manual_seed(0)
    try:
        module = cls(Config())
    except TypeError:
        module = cls(patch_size=4, temporal_patch_size=2, in_channels=3, embed_dim=16)
    return Named(module.eval())


def patches(*leading: int) -> Tensor:
    return torch.randn(*leading, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", CLASSES, ids=lambda key: key[0].rpartition("_")[0].rpartition(".")[2] + "." + key[1])
def test_the_same_with_and_without(key: tuple[str, str], dtype: torch.dtype) -> None:
    model, inputs = made(key).to(dtype), {"hidden_states": patches(10)}
    if dtype == torch.bfloat16:
        # Processors give float32, which the model casts.
        inputs["hidden_states"] = inputs["hidden_states"].bfloat16().float()
    plain, exact = run(model, inputs), exact_run(model, inputs)
    report = velm_kernels.patch(model)
    assert [entry.detail for entry in report.replaced] == ["patch_embed"] and _KERNEL[key] == "patch_embed"
    assert_same(run(model, inputs), plain, exact, dtype)
    assert not report.fallbacks
    assert velm_kernels.unpatch(model) == 1
    again = run(model, inputs)
    assert all(torch.equal(again.outputs[name], value) for name, value in plain.outputs.items())
    assert type(model.module) is getattr(importlib.import_module(key[0]), key[1])


def patched() -> tuple[Any, Any]:
    model = made(("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionPatchEmbed"))
    return model, velm_kernels.patch(model)


def test_who_listens_to_the_convolution_hears_it() -> None:
    model, report = patched()
    x = patches(5)
    expected = model(hidden_states=x)["out"]
    heard: list[Any] = []
    handle = model.module.proj.register_forward_hook(lambda module, args, out: heard.append(out.shape))
    assert torch.allclose(model(hidden_states=x)["out"], expected, atol=1e-5) and len(heard) == 1
    assert report.fallbacks
    handle.remove()
    model(hidden_states=x)
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda embed: setattr(embed, "proj", nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4), padding=(0, 0, 0), groups=1)), ""),
        (lambda embed: setattr(embed, "proj", nn.Conv3d(3, 16, (2, 4, 4), (1, 4, 4))), "stride"),
        (lambda embed: setattr(embed, "proj", nn.Conv3d(3, 18, (2, 4, 4), (2, 4, 4), groups=3)), "groups"),
        (lambda embed: torch.nn.utils.parametrizations.weight_norm(embed.proj), "proj is a"),
        (lambda embed: setattr(embed, "proj", type("Adapted", (nn.Conv3d,), {})(3, 16, (2, 4, 4), (2, 4, 4))), "Adap"),
    ],
)
def test_other_convolutions_are_left(change: Any, named: str) -> None:
    model = made(("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionPatchEmbed"))
    change(model.module)
    report = velm_kernels.patch(model)
    assert is_replaced(model.module) == (named == "")
    assert named in str(report)


@pytest.mark.parametrize(
    "proj",
    [nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4), groups=1, dilation=1), nn.Sequential(nn.Conv3d(3, 16, 2, 2))],
    ids=str,
)
def test_what_is_put_in_its_place_later_is_called(proj: nn.Module) -> None:
    model, _ = patched()
    called: list[bool] = []
    proj.forward = lambda x: called.append(True) or x.new_zeros(x.shape[0], 16, 1, 1, 1)  # type: ignore[assignment]
    proj.weight = model.module.proj.weight  # type: ignore[assignment]
    model.module.proj = proj
    assert not model(hidden_states=patches(5))["out"].any() and called


def test_layouts_copies_and_compilers() -> None:
    model, report = patched()
    x = patches(2, 5)
    expected = model(hidden_states=x)["out"]
    assert expected.shape == (10, 16)
    assert torch.equal(copy.deepcopy(model)(hidden_states=x)["out"], expected)
    assert torch.equal(model(hidden_states=x.view(10, 3, 2, 4, 4))["out"], expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(hidden_states=x)["out"], expected, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(hidden_states=x)["out"].dtype == torch.bfloat16
    assert not report.fallbacks
