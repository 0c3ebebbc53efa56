"""A class that somebody puts on a module stays there, whoever came first."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import velm_kernels
from velm_kernels.integrations.patching import Replacement, is_replaced

from . import image_text_models, models
from .running import Run, assert_equal, assert_near, run


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return 2.0 * x


def _weight_norm(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            parametrizations.weight_norm(module)


def _spectral_norm(model: nn.Module) -> None:
    for module in list(model.modules()):
        if type(module) is nn.Linear or (is_replaced(module) and isinstance(module, nn.Linear)):
            parametrizations.spectral_norm(module)


def _gates(model: nn.Module) -> None:
    """Parameters of replaced modules themselves."""
    for module in list(model.modules()):
        for name in ("alpha_cross_attn", "cross_attn_attn_gate", "gate_attn", "probe"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                parametrize.register_parametrization(module, name, _Halved())


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _fully_shard(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    # From the inside out, and the root last.
    for module in reversed(list(model.modules())):
        sharded = isinstance(module, nn.Linear) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        )
        if sharded or "Attention" in type(module).__name__ or type(module).__name__.endswith("Layer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _classes(model: nn.Module) -> list[list[tuple[str, str]]]:
    return [[(cls.__module__, cls.__qualname__) for cls in type(module).__mro__] for module in model.modules()]


_STACKS: dict[str, Callable[[nn.Module], None]] = {
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "gates": _gates,
}
_MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "visual_bert": functools.partial(models.build, "visual_bert"),
    "idefics": image_text_models.idefics,
    "mllama": image_text_models.mllama,
    "siglip": image_text_models.siglip,
}
_CASES = [
    ("visual_bert", "weight_norm"),
    ("visual_bert", "spectral_norm"),
    ("visual_bert", "fully_shard"),
    ("idefics", "gates"),
    ("idefics", "fully_shard"),
    ("mllama", "gates"),
    ("mllama", "weight_norm"),
    ("siglip", "gates"),
    ("siglip", "fully_shard"),
]


@pytest.mark.parametrize("order", ["patch, stack, unpatch", "stack, patch, unpatch", "patch, stack, patch, unpatch"])
@pytest.mark.parametrize(("name", "kind"), _CASES)
def test_any_order(name: str, kind: str, order: str, mesh: Any) -> None:
    stack = functools.partial(_fully_shard, mesh=mesh) if kind == "fully_shard" else _STACKS[kind]
    torch.manual_seed(3)
    plain, inputs = _MODELS[name]()
    twin = copy.deepcopy(plain)
    known = len(velm_kernels.patch(copy.deepcopy(plain)).replaced)
    torch.manual_seed(3)
    stack(plain)
    expected = run(plain, inputs)
    keys = list(plain.state_dict())
    report = None
    torch.manual_seed(3)
    for step in order.split(", "):
        if step == "patch":
            report = velm_kernels.patch(twin)
        elif step == "stack":
            stack(twin)
        else:
            assert list(twin.state_dict()) == keys
            assert sum(map(is_replaced, twin.modules())) == len(report.replaced) == known - len(report.left)
            # The head of SigLIP does not call its attention, which alone would gather the weights.
            assert {entry.detail for entry in report.left} <= {
                "its attention is a FSDPMultiheadAttention, not a MultiheadAttention"
            }
            if kind in ("weight_norm", "gates"):
                assert_near(run(twin, inputs), expected, 1e-4)
            else:  # spectral norm goes on with every forward in training, sharded gradients are distributed
                assert_near(run(twin, inputs, backward=False), run(plain, inputs, backward=False), 1e-4)
            assert velm_kernels.unpatch(twin) == len(report.replaced)
    assert not any(isinstance(module, Replacement) for module in twin.modules())
    assert not [name for module in twin.modules() for name in vars(module) if "velm" in name]
    assert _classes(twin) == _classes(plain)
    assert list(twin.state_dict()) == keys
    for a, b in zip(
        run(plain, inputs, backward=False).outputs.values(),
        run(twin, inputs, backward=False).outputs.values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_parametrization_is_removed_from_a_replaced_module() -> None:
    model, inputs = image_text_models.idefics()
    before = _classes(model)
    expected = run(model, inputs)
    velm_kernels.patch(model)
    patched = _classes(model)
    _weight_norm(model)
    _gates(model)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name)
    assert _classes(model) == patched
    assert_near(Run(run(model, inputs).outputs, {}), Run(expected.outputs, {}))
    velm_kernels.unpatch(model)
    assert _classes(model) == before


def test_a_second_parametrization_after_patch_outlives_unpatch() -> None:
    model, inputs = image_text_models.mllama()
    layers = [module for module in model.modules() if hasattr(module, "cross_attn_attn_gate")]
    for layer in layers:
        parametrize.register_parametrization(layer, "cross_attn_attn_gate", _Halved())
    velm_kernels.patch(model)
    for layer in layers:
        parametrize.register_parametrization(layer, "cross_attn_mlp_gate", nn.Tanh(), unsafe=True)
    patched = run(model, inputs)
    velm_kernels.unpatch(model)
    assert_near(run(model, inputs), patched)
    assert all(set(layer.parametrizations) == {"cross_attn_attn_gate", "cross_attn_mlp_gate"} for layer in layers)


def test_a_subclass_written_on_the_replaced_class_stays() -> None:
    model, inputs = models.build("lxmert")
    attention = model.encoder.layer[0].attention.self
    query = model.encoder.layer[0].attention.self.query
    expected = run(model, inputs, backward=False)
    velm_kernels.patch(model)

    class Mine(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return (2.0 * out[0], *out[1:])

    class MyLinear(type(query)):  # type: ignore[misc]
        pass

    attention.__class__, query.__class__ = Mine, MyLinear
    doubled = run(model, inputs, backward=False)
    with pytest.warns(UserWarning, match=r"encoder.layer.0.attention.self keeps its class Mine"):
        velm_kernels.unpatch(model)
    assert type(attention) is Mine and type(query) is MyLinear and not is_replaced(attention)
    assert_near(run(model, inputs, backward=False), doubled)
    report = velm_kernels.patch(model)
    assert is_replaced(attention) and not report.fallbacks
    assert [entry.detail for entry in report.left] == ["its class MyLinear is a subclass of Linear"]
    attention.__class__ = Mine.__mro__[1]
    velm_kernels.unpatch(model)
    assert_near(run(model, inputs, backward=False), expected)


def test_subclasses_are_left_with_a_reason() -> None:
    model, _ = models.build("lxmert")
    attention = model.encoder.layer[0].attention.self
    attention.__class__ = type("Spot", (type(attention),), {"forward": lambda self, *args: None})
    model.encoder.layer[0].attention.self.query.__class__ = type("Quantised", (nn.Linear,), {"forward": lambda s, x: x})
    report = velm_kernels.patch(model)
    assert {entry.path: entry.detail for entry in report.left} == {
        "encoder.layer.0.attention.self": "its class Spot has a forward of its own",
        "encoder.layer.0.attention.self.query": "its class Quantised has a forward of its own",
    }
    with pytest.raises(RuntimeError, match="Spot has a forward of its own"):
        velm_kernels.unpatch(model)
        velm_kernels.patch(model, strict=True)


def _offload(model: nn.Module) -> None:
    """As accelerate does it: a forward on the instance brings the weights and calls the forward that was there."""

    def hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, value in module.weights.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        try:
            return module._old_forward(*args, **kwargs)
        finally:
            for name, value in module.weights.items():
                module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    for module in model.modules():
        if module._parameters:
            module._old_forward = module.forward
            module.forward = functools.partial(hooked, module)
            module.weights = {name: value.detach() for name, value in module._parameters.items() if value is not None}
            for name, value in module.weights.items():
                module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)


def _bring_back(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_old_forward"):
            module.forward = module._old_forward
            module.__dict__.pop("_old_forward")
            for name, value in module.__dict__.pop("weights").items():
                module._parameters[name] = nn.Parameter(value)


@pytest.mark.parametrize("first", ["patch", "offload"])
@pytest.mark.parametrize("name", ["visual_bert", "idefics"])
def test_offloaded_weights(name: str, first: str) -> None:
    model, inputs = _MODELS[name]()
    expected = run(model, inputs, backward=False)
    if first == "patch":
        velm_kernels.patch(model)
    _offload(model)
    if first != "patch":
        velm_kernels.patch(model)
    assert_near(run(model, inputs, backward=False), expected)
    velm_kernels.unpatch(model)
    assert_equal(run(model, inputs, backward=False), expected)
    _bring_back(model)
    assert_equal(run(model, inputs, backward=False), expected)


def test_nothing_of_ours_is_pickled_with_an_unpatched_model() -> None:
    model, inputs = models.build("lxmert")
    before = pickle.dumps(model)
    velm_kernels.patch(model)
    run(model, inputs)
    assert b"velm" in pickle.dumps(model)
    velm_kernels.unpatch(model)
    model.zero_grad()
    assert pickle.dumps(model) == before
    assert not [name for value in inputs.values() for name in vars(value)]


def test_replicas_of_data_parallel_compute_with_their_own_weights() -> None:
    model, _ = models.build("visual_bert")
    velm_kernels.patch(model)
    query = model.encoder.layer[0].attention.self.query
    replica = query._replicate_for_data_parallel()
    replica.weight, replica.bias = 2.0 * query.weight.detach(), 2.0 * query.bias.detach()
    x = torch.randn(64, 32)
    with torch.no_grad():
        torch.testing.assert_close(replica(x), 2.0 * query(x))
