"""Pooling heads and image tokens made fewer: SigLIP, SigLIP 2, Idefics2, Aria, SmolVLM, InternVL."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.siglip2 import modeling_siglip2

import velm_kernels
from velm_kernels.integrations import masks
from velm_kernels.integrations.families import siglip

from . import image_text_models as models
from .running import Named, Run, assert_near, exact_run, run


def _vision(**other: Any) -> dict[str, Any]:
    return {**models.TOWER, "num_hidden_layers": 1, "attn_implementation": "sdpa", **other}


def _siglip2_head(attention: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    config = modeling_siglip2.Siglip2VisionConfig(**_vision(attn_implementation=attention))
    head = models.randomise(modeling_siglip2.Siglip2MultiheadAttentionPoolingHead(config))
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    return Named(head), {"hidden_state": x, "attention_mask": mask.long()}


def _idefics2_head() -> tuple[nn.Module, dict[str, Any]]:
    config = modeling_idefics2.Idefics2VisionConfig(**_vision())
    head = models.randomise(modeling_idefics2.Idefics2MultiheadAttentionPoolingHead(config))
    return Named(head), {"hidden_state": torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))}


def _aria_projector(pictures: int) -> tuple[nn.Module, dict[str, Any]]:
    model, _ = models.aria()
    x = torch.randn(pictures, 16, 32, generator=torch.Generator().manual_seed(1))
    hidden = torch.arange(16) >= torch.arange(7, 7 + pictures)[:, None]
    return Named(model.model.multi_modal_projector), {"key_value_states": x, "attn_mask": hidden}


HEADS = {
    "siglip2 head": _siglip2_head,
    "idefics2 head": _idefics2_head,
    # The projections of its tokens are multiplied into one where there are more tokens than features.
    "aria, 2 x 16 tokens": lambda: _aria_projector(2),
    "aria, 3 x 16 tokens": lambda: _aria_projector(3),
}


@pytest.mark.parametrize("name", ["siglip", "siglip2", "smolvlm", "internvl", "aria"])
def test_models_in_float64(name: str) -> None:
    model, inputs = models.BUILDERS[name]("sdpa")
    plain = exact_run(model, inputs)
    report = velm_kernels.patch(model)
    assert_near(exact_run(model, inputs), plain, 1e-12)
    assert not report.fallbacks


@pytest.mark.parametrize("name", HEADS)
def test_heads_in_both_precisions(name: str) -> None:
    module, inputs = HEADS[name]()
    plain, exact = run(module, inputs), exact_run(module, inputs)
    report = velm_kernels.patch(module, strict=True)
    assert_near(run(module, inputs), plain)
    assert_near(exact_run(module, inputs), exact, 1e-12)
    assert report.replaced and not report.fallbacks


@pytest.mark.parametrize("attention", models.ATTENTION)
@pytest.mark.parametrize("looked", [True, False])
def test_a_picture_of_padding_only(attention: str, looked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP 2 counts all its tokens evenly; where a mask cannot be looked at, no gradient reaches their scores."""
    module, inputs = _siglip2_head(attention)
    inputs["attention_mask"][1] = 0
    for place in (masks, siglip):
        monkeypatch.setattr(place, "may_read", lambda mask: looked)
    plain, gradients = run(module, inputs, backward=False), run(module, inputs)
    report = velm_kernels.patch(module)
    assert_near(run(module, inputs, backward=False), plain)
    assert not report.fallbacks
    again = run(module, inputs)
    if looked:
        assert_near(again, gradients)
        assert {entry.reason for entry in report.fallbacks} == {"gradient through a row in which every key is masked"}
    else:
        assert not report.fallbacks
        assert_near(Run(again.outputs, {}), Run(gradients.outputs, {}))
        for index, differs in enumerate((False, True, False)):
            got, expected = (result.gradients["hidden_state"][index] for result in (again, gradients))
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5) is not differs


def test_padding_of_a_picture_is_not_read() -> None:
    module, inputs = _siglip2_head()
    velm_kernels.patch(module)
    plain = run(module, inputs)
    hidden = inputs["attention_mask"] == 0
    inputs["hidden_state"][hidden] = torch.nan
    again = run(module, inputs)
    assert torch.equal(again.outputs["out"], plain.outputs["out"])
    assert not again.gradients["hidden_state"][hidden].any()
    for name in plain.gradients:
        assert torch.equal(again.gradients[name], plain.gradients[name]), name


def _replaced_by_an_adapter(head: Any) -> None:
    class Adapter(nn.MultiheadAttention):
        pass

    head.attention.__class__ = Adapter


def _heard(head: Any) -> None:
    head.attention.register_forward_hook(lambda module, args, output: (output[0] * 2.0, output[1]))


def _dropping(head: Any) -> None:
    head.attention.dropout = 0.3
    head.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replaced_by_an_adapter, "its attention is a Adapter, not a MultiheadAttention"),
        (_heard, "hooks on the attention"),
        (_dropping, "dropout of attention weights"),
    ],
)
def test_the_original_serves_what_the_operator_cannot(change: Any, reason: str) -> None:
    module, inputs = _siglip2_head()
    report = velm_kernels.patch(module)
    change(module.module)
    torch.manual_seed(0)
    got = run(module, inputs)
    assert {entry.reason for entry in report.fallbacks} == {reason}
    velm_kernels.unpatch(module)
    torch.manual_seed(0)
    expected = run(module, inputs)
    assert torch.equal(got.outputs["out"], expected.outputs["out"])
    if change is _replaced_by_an_adapter:
        assert [entry.detail for entry in velm_kernels.patch(module).left] == [reason]


def test_dropout_of_a_head_that_does_not_train_is_none() -> None:
    module, inputs = _siglip2_head()
    plain = run(module, inputs)
    report = velm_kernels.patch(module)
    module.module.attention.dropout = 0.3
    assert_near(run(module, inputs), plain)
    assert not report.fallbacks


def test_a_head_compiles_without_graph_breaks() -> None:
    module, inputs = _siglip2_head()
    velm_kernels.patch(module)
    plain = run(module, inputs, backward=False)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_near(run(compiled, inputs, backward=False), plain)


class _Count(TorchDispatchMode):
    """Counts elements that are copied, and operations of products with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.copied += out.numel()
        packet = func._overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.velm.linear_forward):
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def test_projections_of_aria_are_multiplied_where_that_is_less_work() -> None:
    saved = {}
    for pictures in (2, 40):
        module, inputs = _aria_projector(pictures)
        with _Count() as plain, torch.no_grad():
            module(**inputs)
        velm_kernels.patch(module)
        with _Count() as patched, torch.no_grad():
            module(**inputs)
        saved[pictures] = plain.operations - patched.operations
    width, tokens = 32, 40 * 16
    # For keys and for values: one product with the tokens less, one of two weights more.
    assert saved == {2: 0, 40: 2 * 2 * (tokens - width) * width**2}


def _shuffles(factor: int) -> list[tuple[Any, nn.Module, Tensor, Any]]:
    """(owner of the method, model, argument, factor as the model gives it)."""
    smolvlm, internvl = models.smolvlm()[0], models.internvl()[0]
    x = torch.randn(2, 144, 8)
    return [
        (smolvlm.model.connector, smolvlm, x, factor),
        (internvl.model, internvl, x.view(2, 12, 12, 8), 1 / factor),
        (internvl.model, internvl, torch.randn(2, 8, 12, 8), 1 / factor),
    ]


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_the_same_in_one_copy(factor: int) -> None:
    for owner, model, x, given in _shuffles(factor):
        results = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            with _Count() as forward:
                out = owner.pixel_shuffle(leaf, given)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            with _Count() as backward:
                (gradient,) = torch.autograd.grad(out, leaf, weights)
            results.append((out, gradient, forward.copied / x.numel(), backward.copied / x.numel()))
            report = velm_kernels.patch(model)
        (plain, plain_gradient, *before), (out, gradient, *after) = results
        assert torch.equal(out, plain) and torch.equal(gradient, plain_gradient) and out.shape == plain.shape
        assert before == [2.0, 2.0] and after == [1.0, 1.0]
        assert not report.fallbacks
        velm_kernels.unpatch(model)


def test_pixel_shuffle_that_does_not_fit_is_left_to_the_model() -> None:
    for owner, model, x, given in _shuffles(3):
        wrong = x[:, 1:]
        errors: list[str] = []
        report = None
        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                owner.pixel_shuffle(wrong, given)
            errors.append(str(caught.value))
            report = velm_kernels.patch(model) if len(errors) == 1 else report
        assert errors[0] == errors[1]
        assert [(entry.reason.endswith("that it divides"), entry.calls) for entry in report.fallbacks] == [(True, 1)]
        velm_kernels.unpatch(model)


def test_a_model_with_a_replaced_method_is_saved_and_copied_as_what_it_is(tmp_path: Any) -> None:
    model, inputs = models.internvl()
    inner = model.model
    velm_kernels.patch(model)
    # Before it runs: then transformers puts hooks on it that cannot be pickled.
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    expected = run(model, inputs, backward=False)
    for twin in twins:
        assert type(twin.model) is type(inner)
        assert torch.equal(run(twin, inputs, backward=False).outputs["logits"], expected.outputs["logits"])
    inner.save_pretrained(tmp_path)
    loaded = type(inner).velm_original_class.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["InternVLModel"]
    assert loaded.state_dict().keys() == inner.state_dict().keys()
    velm_kernels.unpatch(model)
    assert type(inner) is type(loaded)


def test_methods_of_other_signatures_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.smolvlm()
    connector = model.model.connector
    connector.pixel_shuffle = connector.pixel_shuffle
    (left,) = velm_kernels.patch(model).left
    assert left.detail.startswith("its pixel_shuffle was replaced on the instance")
    del connector.pixel_shuffle
    velm_kernels.unpatch(model)
    monkeypatch.setattr(type(connector), "pixel_shuffle", lambda self, x: x)
    (left,) = velm_kernels.patch(model).left
    assert left.detail == "its pixel_shuffle takes (x), the replacement is written for (x, scale_factor)"
    monkeypatch.delattr(type(connector), "pixel_shuffle")
    (left,) = velm_kernels.patch(model).left
    assert left.detail == "it has no method pixel_shuffle"
