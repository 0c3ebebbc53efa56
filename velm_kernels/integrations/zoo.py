"""Randomly initialised models of transformers at the sizes people run, with inputs, for profiling and benchmarks.

A `Model` says how to build one kind of model (`model_type` in its configuration) and what to feed it. The published
sizes of width, heads and tokens are the defaults; `layers` can cut the depth, since layers repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """How to build and feed the models of one `model_type`.

    Attributes:
        class_name: class in transformers.
        published: settings that the defaults of the configuration class lack.
        depth: names of the settings that hold a number of layers, dotted for those of a sub-configuration.
        inputs: makes inputs from (configuration, batch).
        description: the tokens involved, for tables.
        after_cut: makes a configuration whose depth was cut consistent again.
    """

    class_name: str
    config_name: str
    published: dict[str, Any]
    depth: tuple[str, ...]
    inputs: Callable[[Any, int], Inputs]
    description: str
    after_cut: Callable[[Any], None] | None = None


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _text(config: Any, batch: int, length: int, limit: str = "max_position_embeddings") -> Inputs:
    length = min(length, getattr(config, limit, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    # Questions differ in length; padding is part of a realistic batch.
    for row in range(batch):
        mask[row, length - (row * 3) % max(1, length // 2) :] = 0
    mask[0] = 1
    low, high = min(5, config.vocab_size - 1), config.vocab_size
    return {"input_ids": torch.randint(low, high, (batch, length)), "attention_mask": mask}


def _vilt(config: Any, batch: int) -> Inputs:
    size = config.image_size
    return _text(config, batch, 40) | {
        "pixel_values": torch.randn(batch, config.num_channels, size, size),
        "pixel_mask": torch.ones(batch, size, size, dtype=torch.long),
    }


def _lxmert(config: Any, batch: int) -> Inputs:
    return _text(config, batch, 20) | {
        "visual_feats": torch.randn(batch, 36, config.visual_feat_dim),
        "visual_pos": torch.rand(batch, 36, config.visual_pos_dim),
    }


def _visual_bert(config: Any, batch: int) -> Inputs:
    return _text(config, batch, 64) | {
        "visual_embeds": torch.randn(batch, 100, config.visual_embedding_dim),
        "visual_attention_mask": torch.ones(batch, 100, dtype=torch.long),
    }


def _pixels(vision: Any, batch: int) -> Tensor:
    return torch.randn(batch, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)


def _flava(config: Any, batch: int) -> Inputs:
    return _text(config.text_config, batch, 40) | {"pixel_values": _pixels(config.image_config, batch)}


def _two_towers(config: Any, batch: int) -> Inputs:
    return _text(config.text_config, batch, 40) | {"pixel_values": _pixels(config.vision_config, batch)}


def _clip(config: Any, batch: int) -> Inputs:
    inputs = _two_towers(config, batch)
    inputs["input_ids"][:, -1] = config.text_config.eos_token_id or config.text_config.vocab_size - 1
    return inputs


def _qformer(config: Any, batch: int) -> Inputs:
    return {
        "query_embeds": torch.randn(batch, 32, config.hidden_size),
        "encoder_hidden_states": torch.randn(batch, 257, config.encoder_hidden_size),
        "encoder_attention_mask": torch.ones(batch, 257, dtype=torch.long),
    }


def _mllama(config: Any, batch: int) -> Inputs:
    """One picture of one tile, already encoded: what the language model sees of it is of its own width."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    text = _text(config.text_config, batch, 256)
    return text | {
        "cross_attention_states": torch.randn(batch, tokens, config.text_config.hidden_size),
        "cross_attention_mask": torch.ones(batch, text["input_ids"].shape[1], 1, 1, dtype=torch.long),
    }


def _cut_mllama(config: Any) -> None:
    layers = config.text_config.num_hidden_layers
    kept = [layer for layer in config.text_config.cross_attention_layers if layer < layers]
    config.text_config.cross_attention_layers = kept or [layers - 1]


def _idefics(config: Any, batch: int) -> Inputs:
    """Four encoded pictures between stretches of text; each token sees the last picture before it."""
    vision, images = config.vision_config, 4
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    text = _text(config, batch, 256)
    length = text["input_ids"].shape[1]
    last = torch.arange(length) * images // length
    return text | {
        "image_encoder_embeddings": torch.randn(batch, images, tokens, vision.embed_dim),
        "image_attention_mask": torch.nn.functional.one_hot(last, images).expand(batch, -1, -1).contiguous(),
    }


def _cut_idefics(config: Any) -> None:
    config.cross_layer_interval = min(config.cross_layer_interval, config.num_hidden_layers)


def _siglip(config: Any, batch: int) -> Inputs:
    # Its text is padded to one length and has no mask.
    return _two_towers(config, batch) | {"attention_mask": torch.ones(batch, 40, dtype=torch.long)}


def _siglip2(config: Any, batch: int) -> Inputs:
    """Pictures of different shapes, padded to the number of patches of the largest."""
    vision = config.vision_config
    text = _text(config.text_config, batch, 40) | {"attention_mask": torch.ones(batch, 40, dtype=torch.long)}
    shapes = torch.tensor([((16, 16), (12, 20), (20, 10), (14, 14))[row % 4] for row in range(batch)])
    patches = vision.num_patches
    return text | {
        "pixel_values": torch.randn(batch, patches, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": (torch.arange(patches) < shapes.prod(1)[:, None]).long(),
        "spatial_shapes": shapes,
    }


def _behind_picture(config: Any, batch: int, image_tokens: int, size: tuple[int, int]) -> Inputs:
    """A picture for each example, its tokens before 64 of text."""
    text = _text(config.text_config, batch, 64)
    image = torch.full((batch, image_tokens), config.image_token_id)
    return {
        "input_ids": torch.cat([image, text["input_ids"].clamp(max=config.image_token_id - 1)], 1),
        "attention_mask": torch.cat([torch.ones_like(image), text["attention_mask"]], 1),
        "pixel_values": torch.randn(batch, 3, *size),
    }


def _smolvlm(config: Any, batch: int) -> Inputs:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    inputs = _behind_picture(config, batch, tokens, (vision.image_size, vision.image_size))
    return inputs | {"pixel_values": inputs["pixel_values"][:, None]}


def _internvl(config: Any, batch: int) -> Inputs:
    return _behind_picture(config, batch, config.image_seq_length, tuple(config.vision_config.image_size))


def _aria(config: Any, batch: int) -> Inputs:
    vision = config.vision_config
    tokens = config.projector_patch_to_query_dict[(vision.image_size // vision.patch_size) ** 2]
    return _behind_picture(config, batch, tokens, (vision.image_size, vision.image_size))


def _grounding_dino(config: Any, batch: int) -> Inputs:
    # 101 and 102 open and close the prompt, 1012 is the full stop between its phrases
    prompt = torch.tensor([101, *(token for word in range(2000, 2020) for token in (word, word + 50, 1012)), 102])
    ids = prompt.expand(batch, -1).contiguous()
    return {
        "pixel_values": torch.randn(batch, 3, 480, 640),
        "pixel_mask": torch.ones(batch, 480, 640, dtype=torch.long),
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids),
    }


MODELS: dict[str, Model] = {
    "vilt": Model(
        "ViltModel",
        "ViltConfig",
        dict(_NO_DROPOUT),
        ("num_hidden_layers",),
        _vilt,
        "40 text + 145 image tokens, width 768",
    ),
    "lxmert": Model(
        "LxmertModel",
        "LxmertConfig",
        dict(_NO_DROPOUT),
        ("l_layers", "r_layers", "x_layers"),
        _lxmert,
        "20 text tokens, 36 regions, width 768",
    ),
    "visual_bert": Model(
        "VisualBertModel",
        "VisualBertConfig",
        _NO_DROPOUT | {"visual_embedding_dim": 2048},
        ("num_hidden_layers",),
        _visual_bert,
        "64 text tokens, 100 regions, width 768",
    ),
    "flava": Model(
        "FlavaModel",
        "FlavaConfig",
        {},
        (
            "image_config.num_hidden_layers",
            "text_config.num_hidden_layers",
            "multimodal_config.num_hidden_layers",
        ),
        _flava,
        "40 text + 197 image tokens, width 768",
    ),
    "blip": Model(
        "BlipForImageTextRetrieval",
        "BlipConfig",
        {"vision_config": {"image_size": 384}, "text_config": dict(_NO_DROPOUT)},
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _two_towers,
        "40 text + 577 image tokens, width 768",
    ),
    "bridgetower": Model(
        "BridgeTowerModel",
        "BridgeTowerConfig",
        {"text_config": dict(_NO_DROPOUT)},
        ("num_hidden_layers", "vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _two_towers,
        "40 text + 325 image tokens, width 768",
    ),
    "clip": Model(
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": {"patch_size": 16}},
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _clip,
        "40 text + 197 image tokens, width 512 and 768",
    ),
    "blip_2_qformer": Model(
        "Blip2QFormerModel",
        "Blip2QFormerConfig",
        dict(_NO_DROPOUT),
        ("num_hidden_layers",),
        _qformer,
        "32 queries, 257 image tokens, width 768",
    ),
    "mllama": Model(
        "MllamaModel",
        "MllamaConfig",
        {},
        ("text_config.num_hidden_layers", "vision_config.num_hidden_layers", "vision_config.num_global_layers"),
        _mllama,
        "256 text + 1025 image tokens, width 4096",
        _cut_mllama,
    ),
    "idefics": Model(
        "IdeficsModel",
        "IdeficsConfig",
        {},
        ("num_hidden_layers", "vision_config.num_hidden_layers"),
        _idefics,
        "256 text + 4 x 257 image tokens, width 4096",
        _cut_idefics,
    ),
    "siglip": Model(
        "SiglipModel",
        "SiglipConfig",
        {},
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _siglip,
        "40 text + 196 image tokens, width 768",
    ),
    "siglip2": Model(
        "Siglip2Model",
        "Siglip2Config",
        {},
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _siglip2,
        "40 text + 196 to 256 image tokens, width 768",
    ),
    "smolvlm": Model(
        "SmolVLMModel",
        "SmolVLMConfig",
        # SmolVLM-500M
        {
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "vocab_size": 49280,
            },
            "scale_factor": 4,
            "image_token_id": 49190,
        },
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _smolvlm,
        "1024 image tokens made 64, 64 text tokens, width 768 and 960",
    ),
    "internvl": Model(
        "InternVLModel",
        "InternVLConfig",
        # InternVL3-1B
        {
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151674,
            },
        },
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _internvl,
        "1025 image tokens made 256, 64 text tokens, width 1024 and 896",
    ),
    "aria": Model(
        "AriaModel",
        "AriaConfig",
        {
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 490,
                "patch_size": 14,
            },
            "text_config": {
                "model_type": "aria_text",
                "vocab_size": 100352,
                "hidden_size": 2560,
                "intermediate_size": 1664,
                "num_hidden_layers": 28,
                "num_attention_heads": 20,
                "moe_num_experts": 64,
                "moe_topk": 6,
            },
        },
        ("vision_config.num_hidden_layers", "text_config.num_hidden_layers"),
        _aria,
        "1225 image tokens pooled to 128, 64 text tokens, width 1152 and 2560",
    ),
    "grounding-dino": Model(
        "GroundingDinoModel",
        "GroundingDinoConfig",
        {"disable_custom_kernels": True},
        ("encoder_layers", "decoder_layers", "text_config.num_hidden_layers"),
        _grounding_dino,
        "480 x 640 pixels, 62 text tokens, width 256",
    ),
}


def names() -> list[str]:
    """Model types that can be built by name."""
    return sorted(MODELS)


def _set_depth(config: Any, setting: str, layers: int) -> None:
    *path, name = setting.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, name, min(layers, getattr(config, name)))


def configuration(model: str, layers: int | None = None) -> Any:
    """Return the configuration of `model`: a name of `names()` or the path of a config.json (or its directory).

    Raises:
        ValueError: neither a known name nor a path, or a model type that is not known here.
    """
    import transformers

    path = Path(model)
    if model in MODELS:
        entry = MODELS[model]
        if not hasattr(transformers, entry.config_name):
            raise ValueError(f"model: transformers {transformers.__version__} has no {entry.config_name}")
        config = getattr(transformers, entry.config_name)(**entry.published)
    elif path.exists():
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type not in MODELS:
            raise ValueError(f"model: {path} is a {config.model_type!r}; inputs are known for {', '.join(names())}")
        entry = MODELS[config.model_type]
    else:
        raise ValueError(f"model: expected a path or one of {', '.join(names())}, given {model!r}")
    if layers is not None:
        for setting in entry.depth:
            _set_depth(config, setting, layers)
        if entry.after_cut is not None:
            entry.after_cut(config)
    return config


def build(
    model: str, *, batch: int = 1, layers: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Inputs]:
    """Return (model with random weights in eval mode, inputs).

    Args:
        model: a name of `names()` or the path of a config.json.
        batch: examples.
        layers: at most so many layers in each stack, by default as published.
        dtype: of weights and floating-point inputs.
        seed: of weights and inputs.
    """
    import transformers

    config = configuration(model, layers)
    entry = MODELS[config.model_type]
    torch.manual_seed(seed)
    built = getattr(transformers, entry.class_name)(config).eval().to(dtype)
    # Gates start at zero, as no trained model's are, and would hide everything behind them.
    for parameter in built.parameters():
        if parameter.numel() == 1 and not parameter.any():
            torch.nn.init.constant_(parameter, 0.5)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in entry.inputs(config, batch).items()
    }
    return built, inputs


def outputs(result: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order, but for the attention weights: BridgeTower returns
    those unasked, where it forms them."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, dict):
        result = [value for name, value in result.items() if not name.endswith("attentions")]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in outputs(part)]
    return []
