"""`attn_implementation="velm"`: parity with eager attention, and refusal where it would not be called."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from velm_kernels.integrations.transformers import SUPPORTED, register  # noqa: E402

from . import models  # noqa: E402

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def _registered():
    register()
    register()


def _decoder(config_class, model_class):
    config = config_class(**_SIZES, **_TOKENS, num_key_value_heads=2, attn_implementation="eager")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return model_class(config), {"input_ids": torch.randint(3, 90, (2, 7)), "attention_mask": mask}


def _mllama():
    text = _SIZES | _TOKENS | {"num_hidden_layers": 3, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    config = transformers.models.mllama.MllamaTextConfig(**text, attn_implementation="eager")
    model = transformers.models.mllama.modeling_mllama.MllamaTextModel(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gate" in parameter_name and parameter.numel() == 1:  # zero at first: images would have no effect
                parameter.fill_(0.7)
    inputs = models._text() | {"cross_attention_states": torch.randn(2, 9, 32)}
    return model, inputs


def _siglip():
    config = transformers.SiglipVisionConfig(image_size=16, patch_size=8, **_SIZES, attn_implementation="eager")
    return transformers.SiglipVisionModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _idefics2():
    vision = _SIZES | {"image_size": 16, "patch_size": 8}
    text = _SIZES | _TOKENS | {"model_type": "mistral", "num_key_value_heads": 2}
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = transformers.Idefics2Config(
        vision_config=vision,
        text_config=text,
        perceiver_config=perceiver | {"num_key_value_heads": 2, "hidden_size": 32},
        image_token_id=98,
        attn_implementation="eager",
    )
    ids = torch.randint(3, 90, (2, 9))
    ids[:, :4] = 98
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 1, 3, 16, 16)}
    return transformers.Idefics2Model(config), inputs


MODELS = {
    "clip": lambda: models.clip("eager"),
    "bridgetower": lambda: models.bridgetower("eager"),
    "llama": lambda: _decoder(transformers.LlamaConfig, transformers.LlamaModel),
    "mistral": lambda: _decoder(transformers.MistralConfig, transformers.MistralModel),
    "mllama": _mllama,
    "siglip": _siglip,
    "idefics2": _idefics2,
}


def test_every_supported_model_is_compared():
    assert set(MODELS) == set(SUPPORTED)


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_eager(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        plain = dict(model(**inputs))
        model.set_attn_implementation("velm")
        assert model.config._attn_implementation == "velm"
        served = dict(model(**inputs))
    compared = 0
    for key, expected in plain.items():
        if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
            continue
        actual = served[key]
        if name in ("llama", "mistral"):  # what stands at padded positions means nothing
            actual, expected = actual[inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared


def test_cross_attention_without_a_mask_is_not_causal():
    torch.manual_seed(0)
    model, inputs = _mllama()
    model.eval().set_attn_implementation("velm")
    states = inputs["cross_attention_states"]
    with torch.no_grad():
        first = model(**inputs).last_hidden_state
        changed = model(**inputs | {"cross_attention_states": torch.cat([states[:, :-1], -states[:, -1:]], 1)})
    assert not torch.allclose(first[:, 0], changed.last_hidden_state[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["visual_bert", "lxmert", "vilt", "flava", "blip_retrieval"])
def test_models_that_would_never_call_it_are_refused(name):
    model, _ = models.build(name)
    with pytest.raises(ValueError, match=r"'velm' is not available for transformers\.models"):
        type(model)._from_config(model.config, attn_implementation="velm")


def test_similar_names_are_not_enough():
    config = transformers.AltCLIPVisionConfig(image_size=16, patch_size=8, **_SIZES)
    with pytest.raises(ValueError, match="AltCLIPVisionModel"):
        transformers.AltCLIPVisionModel._from_config(config, attn_implementation="velm")


def test_attention_outside_of_the_models_is_refused():
    from velm_kernels.integrations.transformers import attention

    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Identity"):
        attention(torch.nn.Identity(), x, x, x, None)
