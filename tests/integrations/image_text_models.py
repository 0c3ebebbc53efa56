"""Small randomly initialised models whose vision meets language, and inputs that reach their awkward corners.

Every builder returns a model in eval mode whose parameters are all away from their special values (gates that start
at zero would hide everything behind them), and every input has padding, and rows that see no image where the family
knows such rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

ATTENTION = ("eager", "sdpa")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, so that gates, layer scales and norms are not at the values that hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 0.7 / parameter.shape[-1] ** 0.5 if "embed" not in name else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith(("weight", "_param")) or "gate" in name or "alpha" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _config(config, attention: str):
    config._attn_implementation = attention
    return config


def _rand(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, low: int = 5, high: int = 50, seed: int = 2) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _padding(lengths: list[int], total: int, left: bool = False) -> torch.Tensor:
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, total - length if left else 0 : total if left else length] = 1
    return mask


QFORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 40,
    "cross_attention_frequency": 2,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def blip2_qformer(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = _config(transformers.Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True), attention)
    model = randomise(transformers.Blip2QFormerModel(config))
    inputs = {
        "query_embeds": _rand(2, 6, 48),
        "attention_mask": _padding([5, 6], 6),
        "encoder_hidden_states": _rand(2, 13, 40, seed=3),
        "encoder_attention_mask": _padding([13, 8], 13),
    }
    return model, inputs


def _instructblip(attention: str, video: bool) -> tuple[nn.Module, dict]:
    prefix = "InstructBlipVideo" if video else "InstructBlip"
    config = _config(getattr(transformers, f"{prefix}QFormerConfig")(**QFORMER), attention)
    model = randomise(getattr(transformers, f"{prefix}QFormerModel")(config))
    inputs = {
        "input_ids": _ids(2, 5),
        "query_embeds": _rand(2, 6, 48),
        "attention_mask": torch.cat([torch.ones(2, 6, dtype=torch.long), _padding([3, 5], 5)], dim=1),
        "encoder_hidden_states": _rand(2, 13, 40, seed=3),
        "encoder_attention_mask": _padding([13, 8], 13),
    }
    return model, inputs


def instructblip_qformer(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    return _instructblip(attention, video=False)


def instructblipvideo_qformer(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    return _instructblip(attention, video=True)


def blip2(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={**QFORMER, "use_qformer_text_input": False},
        text_config={
            "model_type": "opt",
            "vocab_size": 60,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        },
        num_query_tokens=4,
        image_token_index=59,
    )
    model = randomise(transformers.Blip2ForConditionalGeneration(_config(config, attention)))
    ids = _ids(2, 9)
    ids[:, :4] = 59
    inputs = {"pixel_values": _rand(2, 3, 28, 28), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs


MLLAMA_TILES = 4
MLLAMA_PATCHES = 5


def mllama(attention: str = "sdpa", vision: str = "eager") -> tuple[nn.Module, dict]:
    """Two pictures a sample; the second sample has one only, and sees it with three of its four tiles."""
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": MLLAMA_TILES,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3]],
        },
        text_config={
            "vocab_size": 60,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=59,
    )
    model = randomise(transformers.MllamaForConditionalGeneration(_config(config, attention)))
    # The second sample's second picture is padding only. Through rows in which an additive mask hides every key, the
    # backward of torch's sdpa is wrong (its logsumexp forgets the number of keys), so the vision tower is eager.
    model.model.vision_model.config._attn_implementation = vision
    length = 12
    cross = torch.zeros(2, length, 2, MLLAMA_TILES, dtype=torch.long)
    cross[0, 2:7, 0, :] = 1
    cross[0, 7:, 1, :1] = 1
    cross[1, 5:, 0, :3] = 1
    aspect_ratio_mask = torch.zeros(2, 2, MLLAMA_TILES, dtype=torch.long)
    aspect_ratio_mask[0, 0] = 1
    aspect_ratio_mask[0, 1, :1] = 1
    aspect_ratio_mask[1, 0, :3] = 1
    inputs = {
        "input_ids": _ids(2, length),
        "attention_mask": _padding([12, 9], length, left=True),
        "pixel_values": _rand(2, 2, MLLAMA_TILES, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[4, 1], [5, 0]]),
        "aspect_ratio_mask": aspect_ratio_mask,
        "cross_attention_mask": cross,
    }
    return model, inputs


def idefics(attention: str = "sdpa", resampler: bool = True, qk_norms: bool = True) -> tuple[nn.Module, dict]:
    config = transformers.IdeficsConfig(
        vocab_size=50,
        additional_vocab_size=4,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=qk_norms,
        alpha_type="vector",
        alpha_initializer="ones",
        use_resampler=resampler,
        dropout=0.0,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": 40,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": resampler,
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "qk_layer_norms_perceiver": True,
        },
    )
    model = randomise(transformers.IdeficsForVisionText2Text(_config(config, attention)))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    length, images = 10, 3
    see = torch.zeros(2, length, images, dtype=torch.long)
    see[0, 1:4, 0] = 1
    see[0, 4:, 1] = 1
    see[1, 3:6, 0] = 1
    see[1, 6:, 0] = 1
    see[1, 6:, 2] = 1
    inputs = {
        "input_ids": _ids(2, length),
        "attention_mask": _padding([10, 8], length, left=True),
        "pixel_values": _rand(2, images, 3, 28, 28),
        "image_attention_mask": see,
    }
    return model, inputs


PICTURES_OF_IDEFICS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT_OF_IDEFICS = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _idefics_inputs() -> dict:
    """Two pictures a sample with borders that are padding; the second sample has one only."""
    ids = _ids(2, 14)
    ids[:, 1:5] = 59
    ids[0, 6:10] = 59
    pixels = torch.zeros(2, 2, 28, 28, dtype=torch.long)
    pixels[0, 0] = 1
    pixels[0, 1, :21, :14] = 1
    pixels[1, 0, :14] = 1
    pixel_values = _rand(2, 2, 3, 28, 28)
    pixel_values[1, 1] = 0.0  # the model drops pictures that are all zero
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixel_values,
        "pixel_attention_mask": pixels,
    }


def idefics2(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = transformers.Idefics2Config(
        vision_config=PICTURES_OF_IDEFICS,
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
        text_config={"model_type": "mistral", **TEXT_OF_IDEFICS},
        image_token_id=59,
    )
    model = randomise(transformers.Idefics2ForConditionalGeneration(_config(config, attention)))
    return model, _idefics_inputs()


def idefics3(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = transformers.Idefics3Config(
        vision_config=PICTURES_OF_IDEFICS,
        text_config={"model_type": "llama", **TEXT_OF_IDEFICS},
        scale_factor=2,
        image_token_id=59,
    )
    model = randomise(transformers.Idefics3ForConditionalGeneration(_config(config, attention)))
    return model, _idefics_inputs()


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def _siglip_text() -> dict:
    return {**TOWER, "vocab_size": 60, "max_position_embeddings": 8, "projection_size": 32}


def siglip(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    vision = {**TOWER, "image_size": 28, "patch_size": 7}
    config = transformers.SiglipConfig(text_config=_siglip_text(), vision_config=vision)
    model = randomise(transformers.SiglipModel(_config(config, attention)))
    inputs = {"input_ids": _ids(2, 7), "attention_mask": _padding([7, 4], 7), "pixel_values": _rand(2, 3, 28, 28)}
    return model, inputs


def siglip2(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    """Pictures of 3 x 4, 2 x 2 and 1 x 1 patches, padded to 13."""
    config = transformers.Siglip2Config(
        text_config=_siglip_text(), vision_config={**TOWER, "patch_size": 4, "num_patches": 16}
    )
    model = randomise(transformers.Siglip2Model(_config(config, attention)))
    inputs = {
        "input_ids": _ids(3, 7),
        "attention_mask": _padding([7, 4, 5], 7),
        "pixel_values": _rand(3, 13, 48),
        "pixel_attention_mask": _padding([12, 4, 1], 13),
        "spatial_shapes": torch.tensor([[3, 4], [2, 2], [1, 1]]),
    }
    return model, inputs


def smolvlm(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = transformers.SmolVLMConfig(
        vision_config={**PICTURES_OF_IDEFICS, "num_hidden_layers": 1},
        text_config={"model_type": "llama", **TEXT_OF_IDEFICS, "num_hidden_layers": 1},
        scale_factor=2,
        image_token_id=59,
    )
    model = randomise(transformers.SmolVLMForConditionalGeneration(_config(config, attention)))
    return model, _idefics_inputs()


def internvl(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    config = transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", **TEXT_OF_IDEFICS, "num_hidden_layers": 1},
        image_token_id=59,
    )
    model = randomise(transformers.InternVLForConditionalGeneration(_config(config, attention)))
    ids = _ids(2, 9)
    ids[:, 1:5] = 59
    return model, {"input_ids": ids, "attention_mask": _padding([9, 7], 9), "pixel_values": _rand(2, 3, 28, 28)}


def aria(attention: str = "sdpa") -> tuple[nn.Module, dict]:
    """Two pictures of 16 patches, of which the second shows 8 only, pooled by 3 queries each."""
    config = transformers.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **PICTURES_OF_IDEFICS, "num_hidden_layers": 1},
        text_config={
            **TEXT_OF_IDEFICS,
            "model_type": "aria_text",
            "num_hidden_layers": 1,
            "moe_num_experts": 2,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        projector_patch_to_query_dict={16: 3},
        image_token_index=59,
    )
    # The grouped product of the experts does not take float64.
    config._experts_implementation = "eager"
    model = randomise(transformers.AriaForConditionalGeneration(_config(config, attention)))
    ids = _ids(2, 9)
    ids[:, 1:4] = 59
    pixels = torch.ones(2, 28, 28, dtype=torch.bool)
    pixels[1, 14:] = False
    inputs = {
        "input_ids": ids,
        "attention_mask": _padding([9, 7], 9),
        "pixel_values": _rand(2, 3, 28, 28),
        "pixel_mask": pixels,
    }
    return model, inputs


def _grounding_dino(attention: str, prefix: str) -> tuple[nn.Module, dict]:
    backbone = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=12,
        depths=[1, 1, 1],
        num_heads=[2, 2, 2],
        window_size=2,
        out_indices=[2, 3],
    )
    text = {
        "model_type": "bert",
        "vocab_size": 1100,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=9,
        num_feature_levels=3,
        max_text_len=16,
        dropout=0.0,
        fusion_dropout=0.0,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
    )
    model = randomise(getattr(transformers, f"{prefix}ForObjectDetection")(_config(config, attention)))
    # Token 1012 is the full stop that separates the phrases; 101 and 102 open and close.
    ids = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102, 0], [101, 20, 1012, 102, 0, 0, 0, 0]])
    pixel_mask = torch.ones(2, 64, 64, dtype=torch.long)
    pixel_mask[1, :, 40:] = 0
    inputs = {
        "pixel_values": _rand(2, 3, 64, 64),
        "pixel_mask": pixel_mask,
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    return model, inputs


def grounding_dino(attention: str = "eager") -> tuple[nn.Module, dict]:
    return _grounding_dino(attention, "GroundingDino")


def mm_grounding_dino(attention: str = "eager") -> tuple[nn.Module, dict]:
    return _grounding_dino(attention, "MMGroundingDino")


BUILDERS: dict[str, Callable[..., tuple[nn.Module, dict]]] = {
    "blip2_qformer": blip2_qformer,
    "instructblip_qformer": instructblip_qformer,
    "instructblipvideo_qformer": instructblipvideo_qformer,
    "blip2": blip2,
    "mllama": mllama,
    "idefics": idefics,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "siglip": siglip,
    "siglip2": siglip2,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "aria": aria,
    "grounding_dino": grounding_dino,
    "mm_grounding_dino": mm_grounding_dino,
}
