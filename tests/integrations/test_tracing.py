"""What is traced, compiled, exported, transformed, or has no values at all is what the unpatched model gives."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import velm_kernels
from tests.conftest import EXPLORES

from . import models
from .models import tensors
from .test_listeners import ALL


class _Positional(nn.Module):
    """A model that takes its tensors in order and returns its outputs as a tuple, as tracing wants it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        returned = dict(self.model(**dict(zip(self.names, values, strict=True))))
        returned.pop("attentions", None)
        return tuple(t for t in tensors(returned) if t.is_floating_point())


def _built(name: str) -> tuple[_Positional, dict[str, Tensor]]:
    model, inputs = ALL[name]()
    inputs = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    return _Positional(model, list(inputs)), inputs


def _error(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    assert len(a) == len(b) > 0
    finite = [(x[torch.isfinite(y)], y[torch.isfinite(y)]) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp_min(1e-6)) for x, y in finite)


def _traced(wrapped: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return torch.jit.trace(wrapped, tuple(inputs.values()), check_trace=False)


# ViLT draws patches at random. What a patched model traces is the same whichever attention it would have computed
# itself: one of the two, unless more is asked for.
TRACED = sorted(
    name
    for name in ALL.keys() - {"vilt"}
    if EXPLORES or not (name.endswith("eager") and name.removesuffix("eager") + "sdpa" in ALL)
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRACED)
def test_a_trace_serves_other_values(name: str) -> None:
    """The example has no sample of padding only, the call has one (for which Grounding DINO gives NaN)."""
    wrapped, inputs = _built(name)
    others = {key: value.clone() for key, value in inputs.items()}
    for key, value in others.items():
        if key in ("attention_mask", "encoder_attention_mask", "visual_attention_mask") and "dino" not in name:
            value[0] = 0
    plain = _traced(wrapped, inputs)
    velm_kernels.patch(wrapped)
    patched = _traced(wrapped, inputs)
    with torch.no_grad():
        for values in (inputs, others):
            assert _error(patched(*values.values()), plain(*values.values())) < 2e-5
    assert velm_kernels.unpatch(wrapped)


META = ["visual_bert", "lxmert", "blip_captioning", "clip_eager", "mllama-eager"]


@pytest.mark.parametrize("name", META)
def test_meta_and_fake_tensors(name: str) -> None:
    wrapped, inputs = _built(name)

    def shapes(fake: bool) -> list[torch.Size]:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext() as mode, torch.no_grad():
            values = [mode.from_tensor(x) if mode else x.to("meta") for x in inputs.values()]
            return [x.shape for x in wrapped(*values)]

    for fake in (True, False):
        if not fake:
            wrapped = wrapped.to("meta")
        expected = shapes(fake)
        velm_kernels.patch(wrapped)
        assert shapes(fake) == expected != []
        velm_kernels.unpatch(wrapped)


def test_training_on_the_meta_device() -> None:
    wrapped, inputs = _built("lxmert")
    report = velm_kernels.patch(wrapped.to("meta"))
    loss = torch.stack([x.square().mean() for x in wrapped(*(x.to("meta") for x in inputs.values()))]).sum()
    loss.backward()
    assert wrapped.model.encoder.layer[0].attention.self.query.weight.grad.is_meta
    assert "meta tensors" in {fallback.reason for fallback in report.fallbacks}


@pytest.mark.parametrize("name", ["visual_bert", "lxmert", "mllama-eager"])
def test_vmap_and_functional_gradients(name: str) -> None:
    wrapped, inputs = _built(name)
    batched = [torch.stack([value, value.flip(0)]) for value in inputs.values()]
    parameters = {key: value.detach() for key, value in wrapped.named_parameters()}

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return torch.func.vmap(wrapped)(*batched)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(wrapped, parameters, tuple(inputs.values()))
        return torch.stack([x.square().mean() for x in out if x.isfinite().all()]).sum()

    expected, gradients = run(), torch.func.grad(loss)(parameters)
    velm_kernels.patch(wrapped)
    assert _error(run(), expected) < 2e-5
    patched = torch.func.grad(loss)(parameters)
    largest = max(float(value.norm()) for value in gradients.values())
    assert all(float((patched[key] - value).norm()) < 1e-4 * largest for key, value in gradients.items())


def _operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if str(node.target).startswith("velm.")}


@pytest.mark.parametrize("name", ["clip_eager", "lxmert"])
def test_exported_programs_hold_the_operators_unless_they_are_for_onnx(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped, inputs = _built(name)
    velm_kernels.patch(wrapped)
    with torch.no_grad():
        program = torch.export.export(wrapped, tuple(inputs.values()), strict=False)
        assert "velm.attention_forward.default" in _operators(program.graph)
        assert _error(program.module()(*inputs.values()), wrapped(*inputs.values())) < 2e-5
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert not _operators(torch.export.export(wrapped, tuple(inputs.values()), strict=False).graph)


def test_symbolic_tracing_records_what_the_original_does() -> None:
    model, _ = models.build("clip_sdpa")
    mlp = model.vision_model.encoder.layers[0].mlp
    attention = model.vision_model.encoder.layers[0].self_attn

    def steps(traced: torch.fx.GraphModule) -> list[tuple[str, str, str]]:
        return [(node.op, str(node.target), str(node.args)) for node in traced.graph.nodes]

    expected = steps(torch.fx.symbolic_trace(mlp))
    velm_kernels.patch(model)
    traced = torch.fx.symbolic_trace(mlp)
    assert steps(traced) == expected
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), mlp(x), rtol=1e-4, atol=1e-5)
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: attention(x)[0])(x)
        torch.testing.assert_close(graph(2 * x), attention(2 * x)[0], rtol=1e-4, atol=1e-5)
