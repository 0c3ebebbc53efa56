"""Small, randomly initialised models of every family, with inputs that are padded where the model knows padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

Inputs = dict[str, Any]
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _text(batch: int = 2, length: int = 7, low: int = 3, high: int = 90) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(low, high, (batch, length)), "attention_mask": mask}


def visual_bert(dropout: float = 0.0) -> tuple[torch.nn.Module, Inputs]:
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.VisualBertConfig(vocab_size=99, visual_embedding_dim=20, **_SIZES, **drop)
    inputs = _text() | {"visual_embeds": torch.randn(2, 5, 20), "visual_attention_mask": torch.ones(2, 5).long()}
    inputs["visual_attention_mask"][1, 3:] = 0
    return transformers.VisualBertModel(config), inputs


def lxmert() -> tuple[torch.nn.Module, Inputs]:
    config = transformers.LxmertConfig(
        vocab_size=99, l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=20, **_SIZES, **_NO_DROPOUT
    )
    visual = {"visual_feats": torch.randn(2, 5, 20), "visual_pos": torch.rand(2, 5, 4)}
    return transformers.LxmertModel(config), _text() | visual | {
        "visual_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    }


def vilt() -> tuple[torch.nn.Module, Inputs]:
    config = transformers.ViltConfig(
        vocab_size=99, image_size=16, patch_size=8, max_image_length=-1, **_SIZES, **_NO_DROPOUT
    )
    pixel_mask = torch.ones(2, 16, 16, dtype=torch.long)
    # The number of valid rows decides which patches are drawn at random, so only whole images are compared.
    return transformers.ViltModel(config), _text() | {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "pixel_mask": pixel_mask,
    }


def flava() -> tuple[torch.nn.Module, Inputs]:
    sizes = _SIZES | _NO_DROPOUT
    config = transformers.FlavaConfig(
        image_config=dict(image_size=16, patch_size=8, **sizes),
        text_config=dict(vocab_size=99, **sizes),
        multimodal_config=sizes,
        image_codebook_config={},
        hidden_size=32,
        projection_dim=16,
    )
    return transformers.FlavaModel(config), _text() | {"pixel_values": torch.randn(2, 3, 16, 16)}


def _blip_config() -> Any:
    return transformers.BlipConfig(
        text_config=dict(
            vocab_size=99,
            encoder_hidden_size=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **_SIZES,
            **_NO_DROPOUT,
        ),
        vision_config=dict(image_size=16, patch_size=8, **_SIZES),
        projection_dim=16,
    )


def blip_retrieval() -> tuple[torch.nn.Module, Inputs]:
    model = transformers.BlipForImageTextRetrieval(_blip_config())
    return model, _text() | {"pixel_values": torch.randn(2, 3, 16, 16)}


def blip_captioning() -> tuple[torch.nn.Module, Inputs]:
    model = transformers.BlipForConditionalGeneration(_blip_config())
    return model, _text() | {"pixel_values": torch.randn(2, 3, 16, 16)}


def bridgetower(implementation: str = "eager") -> tuple[torch.nn.Module, Inputs]:
    # One head of the vision tower is 64 wide whatever the configuration says.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "layer_norm_eps": 1e-5}
    text = {"intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0}
    config = transformers.BridgeTowerConfig(
        text_config=sizes | text | _NO_DROPOUT,
        vision_config=dict(image_size=16, patch_size=8, **sizes),
        num_attention_heads=4,
        intermediate_size=48,
        **sizes,
    )
    model = transformers.BridgeTowerModel(config)
    model.set_attn_implementation(implementation)
    return model, _text() | {"pixel_values": torch.randn(2, 3, 16, 16)}


def clip(implementation: str = "sdpa") -> tuple[torch.nn.Module, Inputs]:
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=99, eos_token_id=98, **_SIZES),
        vision_config=dict(image_size=16, patch_size=8, **_SIZES),
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    model.set_attn_implementation(implementation)
    inputs = _text() | {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["input_ids"][:, 4] = 98
    return model, inputs


FAMILIES: dict[str, Callable[[], tuple[torch.nn.Module, Inputs]]] = {
    "visual_bert": visual_bert,
    "lxmert": lxmert,
    "vilt": vilt,
    "flava": flava,
    "blip_retrieval": blip_retrieval,
    "blip_captioning": blip_captioning,
    "bridgetower": bridgetower,
    "clip_sdpa": clip,
    "clip_eager": lambda: clip("eager"),
}


def build(name: str, seed: int = 0) -> tuple[torch.nn.Module, Inputs]:
    """Return (model in eval mode, inputs), weights so large that attention is far from uniform."""
    torch.manual_seed(seed)
    model, inputs = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval(), inputs


def tensors(output: Any) -> list[torch.Tensor]:
    """Return every tensor in a model output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


def to_float64(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square difference, relative to the root mean square of `expected`."""
    expected = expected.double()
    scale = expected.square().mean().sqrt().item()
    return ((actual.double() - expected).square().mean().sqrt().item()) / max(scale, 1e-30)
