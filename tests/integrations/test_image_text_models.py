"""Q-Formers, Llama 3.2 Vision, IDEFICS, Idefics2 and 3, Grounding DINO: patched models compute what they computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velm_kernels
from velm_kernels.integrations.patching import is_replaced

from . import image_text_models as models
from .running import Named, assert_equal, assert_near, assert_same, exact_run, run

_CASES = [
    pytest.param(name, attention, id=f"{name}-{attention}")
    for name in models.BUILDERS
    for attention in models.ATTENTION
    if not ("dino" in name and attention == "sdpa")
    and not (name == "instructblipvideo_qformer" and attention == "sdpa")
]
_DEFAULT = [pytest.param(name, "eager" if "dino" in name else "sdpa", id=name) for name in models.BUILDERS]


def _calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """Records the keyword arguments of every call of a public operator from now on."""
    operator, calls = getattr(velm_kernels, name), []

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append({"query": args[0], "key": args[1], **kwargs})
        return operator(*args, **kwargs)

    monkeypatch.setattr(velm_kernels, name, recording)
    return calls


@pytest.mark.parametrize(("name", "attention"), _CASES)
def test_same_outputs_and_gradients_and_unpatch_restores(name: str, attention: str) -> None:
    model, inputs = models.BUILDERS[name](attention)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    plain = run(model, inputs)
    exact = exact_run(model, inputs)
    report = velm_kernels.patch(model, strict=True)
    patched = run(model, inputs)
    assert_same(patched, plain, exact)
    assert len(report.replaced) == sum(is_replaced(module) for module in model.modules()) > 0
    assert not report.fallbacks, report
    assert list(model.state_dict()) == keys
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    velm_kernels.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("velm")]
    assert_equal(run(model, inputs), plain)


@pytest.mark.parametrize(("name", "attention"), _DEFAULT)
def test_bfloat16(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Grounding DINO takes the proposals with the best scores, Aria such experts, and rounding would choose others.
    monkeypatch.setattr(torch, "topk", lambda x, k, dim: (x.narrow(dim, 0, k), torch.arange(k).expand(x.shape[0], k)))
    model, inputs = models.BUILDERS[name](attention)
    exact = exact_run(model, inputs, backward=False)
    model = model.bfloat16()
    inputs = {
        key: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    plain = run(model, inputs, backward=False)
    report = velm_kernels.patch(model)
    patched = run(model, inputs, backward=False)
    assert not report.fallbacks, report
    assert_same(patched, plain, exact, torch.bfloat16, ulps=2.0)


@pytest.mark.parametrize("name", ["instructblip_qformer", "mllama", "idefics", "grounding_dino"])
def test_output_attentions_come_from_the_original(name: str) -> None:
    model, inputs = models.BUILDERS[name]("eager")
    with torch.no_grad():
        before = model(**inputs, output_attentions=True)
        report = velm_kernels.patch(model)
        quiet = model(**inputs)
        assert not report.fallbacks
        after = model(**inputs, output_attentions=True)
        reasons = {fallback.reason for fallback in report.fallbacks}
        assert reasons and reasons <= {"output_attentions=True", "the attention weights are returned"}
        again = model(**inputs)
    weights = [key for key in before if "attentions" in key and before[key] is not None]
    assert weights
    for key in weights:
        expected, got = _flat(before[key]), _flat(after[key])
        assert len(expected) == len(got) > 0
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for key, value in quiet.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again[key]), key


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value or () for tensor in _flat(part)]


@pytest.mark.parametrize("name", ["mllama", "idefics", "blip2"])
def test_generation_with_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.BUILDERS[name]("sdpa")
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
    }
    before = model.generate(**inputs, **settings)
    report = velm_kernels.patch(model)
    calls = _calls(monkeypatch, "cross_attention")
    after = model.generate(**inputs, **settings)
    assert not report.fallbacks, report
    assert torch.equal(before.sequences, after.sequences)
    for a, b in zip(before.logits, after.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if name != "blip2":
        assert any(call["query"].shape[2] == 1 < call["key"].shape[2] for call in calls)


@pytest.mark.parametrize(
    ("name", "attention", "reentrant"),
    [
        ("instructblip_qformer", "sdpa", False),
        ("instructblip_qformer", "sdpa", True),
        ("idefics", "sdpa", False),
        ("idefics", "sdpa", True),
        ("idefics2", "eager", False),
        ("mllama", "sdpa", False),  # with reentrant checkpoints the unpatched model fails too
    ],
)
def test_gradient_checkpointing(name: str, attention: str, reentrant: bool) -> None:
    model, inputs = models.BUILDERS[name](attention)
    if "input_ids" in inputs:
        inputs["use_cache"] = False
    model.train()
    velm_kernels.patch(model)
    plain = run(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_near(run(model, inputs), plain)


class Lora(nn.Module):
    """A low-rank adapter as PEFT writes it: `weight` is that of the layer it adapts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize(("name", "attention"), _DEFAULT)
def test_adapters_are_called(name: str, attention: str) -> None:
    model, inputs = models.BUILDERS[name](attention)
    with torch.no_grad():
        bare = model(**inputs)
    torch.manual_seed(0)
    for module in list(model.modules()):
        if "Attention" not in type(module).__name__ or "Deformable" in type(module).__name__:
            continue
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear:
                setattr(module, child, Lora(linear))
    plain = run(model, inputs)
    exact = exact_run(model, inputs)
    report = velm_kernels.patch(model)
    patched = run(model, inputs)
    assert not report.fallbacks and report.replaced
    assert_same(patched, plain, exact)
    changed = [key for key, value in plain.outputs.items() if not torch.allclose(value, bare[key], atol=1e-2)]
    assert changed


def _recorded(monkeypatch: pytest.MonkeyPatch, name: str, attention: str, **changes: Any) -> list[dict[str, Any]]:
    model, inputs = models.BUILDERS[name](attention)
    inputs.update(changes)
    velm_kernels.patch(model)
    calls = _calls(monkeypatch, "cross_attention")
    with torch.no_grad():
        model(**inputs)
    return calls


@pytest.mark.parametrize("attention", models.ATTENTION)
def test_llama_vision_masks_become_ranges_and_norms_are_fused(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = models.mllama(attention)
    calls = _recorded(monkeypatch, "mllama", attention, use_cache=False)
    keys = 2 * models.MLLAMA_TILES * models.MLLAMA_PATCHES
    crossing = [call for call in calls if call["key"].shape[2] == keys]
    assert len(crossing) == 2
    for call in crossing:
        assert call["is_causal"] is False
        assert call["query_norm_weight"] is not None and call["key_norm_weight"] is not None
        assert "mask" not in call and "bias" not in call
        start, stop = call["key_ranges"]
        seen = inputs["cross_attention_mask"].flatten(2).repeat_interleave(models.MLLAMA_PATCHES, -1).bool()
        seen = seen | ~seen.any(-1, keepdim=True)  # rows without a picture see everything
        position = torch.arange(keys)
        assert torch.equal((position >= start[..., None]) & (position < stop[..., None]), seen)


def test_llama_vision_reads_tiles_with_holes_through_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cross = torch.zeros(2, 12, 2, models.MLLAMA_TILES, dtype=torch.long)
    cross[:, 3:, 0, :2] = 1
    cross[:, 6:, 1, :3] = 1
    calls = _recorded(monkeypatch, "mllama", "sdpa", cross_attention_mask=cross)
    crossing = [
        call for call in calls if call["query_norm_weight" if "query_norm_weight" in call else "key"] is not None
    ]
    holes = [call for call in crossing if "key_ranges" in call and call.get("query_norm_weight") is not None]
    assert len(holes) == 2 and all("mask" in call for call in holes)
    model, inputs = models.mllama("sdpa")
    inputs["cross_attention_mask"] = cross
    plain = run(model, inputs, backward=False)
    monkeypatch.undo()
    velm_kernels.patch(model)
    assert_near(run(model, inputs, backward=False), plain)


def test_llama_vision_padding_pictures_pass_the_gradient_of_eager_attention() -> None:
    model, inputs = models.mllama("sdpa", vision="eager")
    eager = run(model, inputs)
    model.model.vision_model.config._attn_implementation = "sdpa"
    velm_kernels.patch(model)
    assert_near(run(model, inputs), eager)


def test_llama_vision_without_a_cross_attention_mask_sees_every_tile() -> None:
    """As eager attention has it; transformers' sdpa path takes the missing mask for a causal one."""
    results = {}
    for attention in models.ATTENTION:
        model, inputs = models.mllama(attention)
        del inputs["cross_attention_mask"]
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        with torch.no_grad():
            results[attention] = model(**inputs).logits
            velm_kernels.patch(model)
            results[f"patched {attention}"] = model(**inputs).logits
    torch.testing.assert_close(results["patched eager"], results["eager"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results["patched sdpa"], results["eager"], rtol=1e-4, atol=1e-5)
    assert (results["sdpa"] - results["eager"]).abs().max() > 1e-2


def test_llama_vision_calls_norms_that_are_more_than_norms() -> None:
    model, inputs = models.mllama("sdpa")
    attention = next(m for m in model.modules() if type(m).__name__ == "MllamaTextCrossAttention")
    seen = []
    attention.q_norm.register_forward_hook(lambda module, args, output: seen.append(output.shape) or 2.0 * output)
    plain = run(model, inputs, backward=False)
    velm_kernels.patch(model)
    count = len(seen)
    assert_near(run(model, inputs, backward=False), plain)
    assert len(seen) == 2 * count > 0


@pytest.mark.parametrize("attention", models.ATTENTION)
def test_idefics_masks_become_ranges(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = models.idefics(attention)
    calls = _recorded(monkeypatch, "idefics", attention)
    crossing = [call for call in calls if call.get("query_norm_weight") is not None]
    assert len(crossing) == 2
    for call in crossing:
        assert call["is_causal"] is False and "bias" not in call
        start, stop = call["key_ranges"]
        see = inputs["image_attention_mask"]
        assert torch.equal(stop - start > 0, see.any(-1))
        # One row sees the first and the third picture.
        assert "mask" in call


@pytest.mark.parametrize("attention", models.ATTENTION)
def test_padding_becomes_lengths(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _recorded(monkeypatch, "instructblip_qformer", attention)
    assert len(calls) == 5
    for call in calls:
        if call["key"].shape[2] == 13:
            assert call["key_lengths"].tolist() == [13, 8]
        else:
            assert call["key_lengths"].tolist() == [9, 11]


def test_one_learned_query_serves_a_batch_of_pictures() -> None:
    model, inputs = models.blip2_qformer("eager")
    inputs = {"query_embeds": inputs["query_embeds"][:1], "encoder_hidden_states": inputs["encoder_hidden_states"]}
    plain = run(model, inputs)
    velm_kernels.patch(model)
    assert_near(run(model, inputs), plain)


def test_grounding_dino_layers_called_alone_return_their_weights() -> None:
    model, _ = models.grounding_dino("eager")
    velm_kernels.patch(model)
    layer = model.model.encoder.layers[0]
    (_, vision), (_, text) = layer.fusion_layer(torch.randn(1, 5, 32), torch.randn(1, 3, 32))
    assert vision.shape[-2:] == (5, 3) and text.shape[-2:] == (3, 5)


@pytest.mark.parametrize("name", ["instructblip_qformer", "mllama_text", "idefics2_perceiver"])
def test_compiles_without_graph_breaks(name: str) -> None:
    if name == "instructblip_qformer":
        model, inputs = models.instructblip_qformer("sdpa")
    elif name == "mllama_text":
        full, inputs = models.mllama("sdpa")
        model = full.model.language_model
        inputs = {"input_ids": inputs["input_ids"], "use_cache": False}
    else:
        full, _ = models.idefics2("sdpa")
        model = full.model.connector
        inputs = {"image_hidden_states": torch.randn(2, 16, 32), "attention_mask": torch.ones(2, 16, dtype=torch.bool)}
    velm_kernels.patch(model)
    wrapped = model if name != "idefics2_perceiver" else Named(model)
    plain = run(wrapped, inputs)
    torch.compiler.reset()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    again = run(compiled, inputs)
    assert_near(type(again)(again.outputs, _stripped(again.gradients)), plain)


def _stripped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}


def test_a_copy_of_a_patched_model_is_patched() -> None:
    model, inputs = models.mllama("sdpa")
    velm_kernels.patch(model)
    plain = run(model, inputs)
    twin = copy.deepcopy(model)
    assert_equal(run(twin, inputs), plain)
    assert velm_kernels.unpatch(twin) > 0 and any(is_replaced(module) for module in model.modules())
