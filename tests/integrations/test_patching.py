"""The framework: all or nothing, selection, reports, copies, adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import velm_kernels
from velm_kernels.integrations import patching
from velm_kernels.integrations.patching import Replacement, is_replaced

from .models import build, tensors

transformers = pytest.importorskip("transformers")


def _types(model):
    return {path: type(module) for path, module in model.named_modules()}


def _outputs(model, inputs):
    with torch.no_grad():
        return [t for t in tensors(model(**inputs)) if t.is_floating_point()]


def _assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_report_names_path_class_and_replacement():
    model, _ = build("lxmert")
    text = str(velm_kernels.patch(model))
    assert "encoder.x_layers.{0-1}.visual_attention.att" in text
    assert "LxmertAttention" in text and "cross_attention" in text


def test_report_of_a_model_without_known_modules():
    report = velm_kernels.patch(nn.Sequential(nn.Linear(2, 2)))
    assert not report.entries
    assert "no module of a known class" in str(report)


def test_patching_twice_reports_what_is_already_there():
    model, _inputs = build("vilt")
    first = velm_kernels.patch(model)
    types = _types(model)
    second = velm_kernels.patch(model)
    assert {entry.status for entry in second.entries} == {"already"}
    assert [entry.path for entry in second.entries] == [entry.path for entry in first.entries]
    assert _types(model) == types
    velm_kernels.unpatch(model)
    assert velm_kernels.unpatch(model) == 0
    assert not any(is_replaced(module) for module in model.modules())


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("encoder.layer.1.*", {"encoder.layer.1."}),
        (["vilt"], {"encoder.layer.0.", "encoder.layer.1."}),
        (["encoder.layer.0.attention.attention"], {"encoder.layer.0.attention.attention"}),
    ],
)
def test_only(only, expected):
    model, _ = build("vilt")
    report = velm_kernels.patch(model, only=only)
    paths = [entry.path for entry in report.replaced]
    assert paths == [path for path, module in model.named_modules() if is_replaced(module)] != []
    assert all(any(path.startswith(prefix) for prefix in expected) for path in paths)


def test_only_that_selects_nothing_is_an_error():
    model, _ = build("vilt")
    with pytest.raises(ValueError, match="given 'lxmert', which selects no module"):
        velm_kernels.patch(model, only=["vilt", "lxmert"])
    with pytest.raises(TypeError, match="only: expected strings, given int 3"):
        velm_kernels.patch(model, only=[3])
    assert not any(is_replaced(module) for module in model.modules())


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, given dict"):
        velm_kernels.patch({})
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, given dict"):
        velm_kernels.unpatch({})


def test_subclasses_and_instances_with_their_own_forward_are_left():
    model, _ = build("vilt")
    first, second = (layer.attention for layer in model.encoder.layer)

    class Custom(type(first.attention)):
        pass

    first.attention.__class__ = Custom
    second.attention.forward = second.attention.forward
    before = _types(model)
    report = velm_kernels.patch(model, only="encoder.layer.1.attention.attention")
    assert [entry.path for entry in report.left] == ["encoder.layer.1.attention.attention"]
    assert "forward was replaced on the instance" in str(report)
    assert _types(model) == before
    with pytest.raises(RuntimeError, match=r"none was:[\s\S]*forward was replaced on the instance"):
        velm_kernels.patch(model, strict=True)
    assert _types(model) == before
    velm_kernels.patch(model)
    assert type(first.attention) is Custom


def test_other_signatures_are_left(monkeypatch):
    model, _ = build("vilt")
    cls = type(model.encoder.layer[0].attention.attention)
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states, head_mask=None: None)
    report = velm_kernels.patch(model)
    left = [entry for entry in report.left if entry.class_name == "ViltSelfAttention"]
    assert len(left) == 2
    assert "takes (hidden_states, head_mask)" in left[0].detail


def test_a_failure_half_way_leaves_the_model_untouched():
    model, _ = build("vilt")
    before = _types(model)

    class Unassignable(nn.Module):
        __slots__ = ("other_layout",)

    target = model.encoder.layer[1].attention.attention
    with pytest.raises(TypeError):
        patching._swap([(model.encoder.layer[0].attention.attention, Replacement), (target, Unassignable)])
    assert _types(model) == before


def test_classes_keep_their_names():
    """Model libraries look classes up by name: which modules must not be split, which outputs to record."""
    model, _ = build("vilt")
    module = model.encoder.layer[0].attention.attention
    original = type(module)
    velm_kernels.patch(model)
    assert type(module) is not original
    assert type(module).__name__ == "ViltSelfAttention"
    assert str(type(module)) == str(original)
    assert "VelmViltSelfAttention" in repr(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["lxmert", "clip_sdpa", "bridgetower"])
def test_copies_stay_patched(name, copied):
    model, inputs = build(name)
    expected = _outputs(model, inputs)
    report = velm_kernels.patch(model)
    twin = copied(model)
    assert _types(twin) == _types(model)
    _assert_same(_outputs(twin, inputs), _outputs(model, inputs))
    assert not report.fallbacks
    velm_kernels.unpatch(twin)
    assert any(is_replaced(module) for module in model.modules())
    plain = _outputs(twin, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))


def test_state_dict_moves_between_patched_and_plain():
    model, inputs = build("flava")
    other, _ = build("flava", seed=1)
    velm_kernels.patch(other)
    other.load_state_dict(model.state_dict(), strict=True)
    _assert_same(_outputs(other, inputs), _outputs(model, inputs))


class LoraLinear(nn.Module):
    """As in PEFT: wraps the projection, and shows the base weight as its own."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapters", "patch"])
@pytest.mark.parametrize("name", ["visual_bert", "lxmert", "blip_captioning", "clip_sdpa"])
def test_adapters_around_projections_take_part(name, first):
    model, inputs = build(name)
    base = _outputs(model, inputs)

    def wrap():
        torch.manual_seed(5)
        for module in list(model.modules()):
            for child, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear) and not isinstance(module, LoraLinear) and linear.in_features < 90:
                    setattr(module, child, LoraLinear(linear))

    if first == "patch":
        velm_kernels.patch(model)
    wrap()
    if first == "adapters":
        velm_kernels.patch(model)
    patched = _outputs(model, inputs)
    assert velm_kernels.unpatch(model)
    _assert_same(patched, _outputs(model, inputs))
    assert max((a - b).abs().max() for a, b in zip(patched, base, strict=True)) > 1e-2


def test_hooks_on_projections_and_feed_forwards_run():
    model, inputs = build("visual_bert")
    seen = []
    for path, module in model.named_modules():
        if path.startswith("encoder."):
            module.register_forward_hook(lambda module, args, output, path=path: seen.append(path))
    _outputs(model, inputs)
    plain, seen = seen, []
    report = velm_kernels.patch(model)
    _outputs(model, inputs)
    assert sorted(seen) == sorted(plain)
    # The dropout of attention weights is part of the kernel, which has no weights to hand to a hook.
    assert {fallback.reason for fallback in report.fallbacks} == {
        "somebody listens to dropout (a hook, or a forward of its own)"
    }


def test_hooks_may_change_what_a_projection_returns():
    model, inputs = build("visual_bert")
    layer = model.encoder.layer[0]
    for linear in (layer.attention.self.query, layer.intermediate.dense, layer.output.dense):
        linear.register_forward_hook(lambda module, args, output: output * 1.5)
    expected = _outputs(model, inputs)
    velm_kernels.patch(model)
    _assert_same(_outputs(model, inputs), expected)


def test_autocast():
    model, inputs = build("visual_bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = _outputs(model, inputs)
        velm_kernels.patch(model)
        actual = _outputs(model, inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


def test_autocast_of_trained_parameters_gives_gradients_in_their_dtype():
    model, inputs = build("visual_bert")
    velm_kernels.patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs).last_hidden_state.float().square().mean().backward()
    weight = model.encoder.layer[0].attention.self.query.weight
    assert weight.grad is not None and weight.grad.dtype is torch.float32 and weight.grad.abs().max() > 0


def test_families_lists_those_of_the_package():
    from velm_kernels.integrations import supported_families

    assert {"blip", "bridgetower", "clip", "flava", "lxmert", "vilt", "visual_bert"} <= set(supported_families())
