"""Weights and inputs that are more than tensors: quantised, distributed, changed behind torch's back."""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import velm_kernels
from velm_kernels.integrations import plain, projections
from velm_kernels.products import use_product

from . import image_text_models, models
from .running import assert_equal, assert_near, run
from .tensor_kinds import Int8, quantise


@pytest.fixture(autouse=True)
def _our_product(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At these sizes the rules take torch, and a kernel that must not see a weight would not."""
    monkeypatch.setattr(projections, "faster_than_torch", lambda *args: True)
    monkeypatch.setattr(projections, "always_torch", lambda: False)
    monkeypatch.setattr(projections, "_FUSED_ELEMENTS", 0)
    with use_product("velm"):
        yield


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    **{name: functools.partial(models.build, name) for name in models.FAMILIES if name not in ("vilt", "flava")},
    "mllama": image_text_models.mllama,
    "idefics": image_text_models.idefics,
    "siglip": image_text_models.siglip,
    "aria": image_text_models.aria,
    "grounding_dino": functools.partial(image_text_models.grounding_dino, "eager"),
}


@pytest.mark.parametrize("first", ["quantise", "patch"])
@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights(name: str, first: str) -> None:
    model, inputs = MODELS[name]()
    twin = copy.deepcopy(model)
    quantise(twin)
    expected = run(twin, inputs, backward=False)
    if first == "patch":
        velm_kernels.patch(model)
    quantise(model)
    if first == "quantise":
        report = velm_kernels.patch(model)
        assert {entry.detail for entry in report.left} == {"its weight is a Int8"}
    assert_near(run(model, inputs, backward=False), expected)
    velm_kernels.unpatch(model)
    assert_equal(run(model, inputs, backward=False), expected)
    assert all(isinstance(m.weight, Int8) for m in model.modules() if type(m) is nn.Linear)


def test_attention_with_quantised_projections_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.build("clip_sdpa")
    quantise(model, ("q_proj", "k_proj", "v_proj"))
    expected = run(model, inputs, backward=False)
    operator, calls = velm_kernels.cross_attention, []
    monkeypatch.setattr(
        velm_kernels, "cross_attention", lambda *args, **kwargs: calls.append(0) or operator(*args, **kwargs)
    )
    report = velm_kernels.patch(model)
    assert_near(run(model, inputs, backward=False), expected)
    assert len(calls) == 4 and not report.fallbacks


def test_a_weight_that_is_quantised_later_is_told_in_the_report() -> None:
    model, inputs = models.build("visual_bert")
    report = velm_kernels.patch(model)
    quantise(model, ("layer.0.attention.self.query",))
    run(model, inputs, backward=False)
    assert [(f.path, f.reason) for f in report.fallbacks] == [
        ("encoder.layer.0.attention.self.query", "input or weight is a Int8")
    ]


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_finds_all_layers_of_a_patched_model() -> None:
    model, inputs = models.build("visual_bert")
    kinds = torch.ao.quantization
    expected = kinds.quantize_dynamic(model, {nn.Linear}, inplace=False)
    velm_kernels.patch(model)
    patched = kinds.quantize_dynamic(model, {nn.Linear}, inplace=False)
    assert (
        [type(m) for m in patched.modules() if "quantized" in type(m).__module__]
        == [type(m) for m in expected.modules() if "quantized" in type(m).__module__]
        != []
    )
    assert_near(run(patched, inputs, backward=False), run(expected, inputs, backward=False), 1e-2)
    velm_kernels.unpatch(patched)
    assert_equal(run(patched, inputs, backward=False), run(expected, inputs, backward=False))


class Named(Tensor):
    """A subclass with storage of its own, as libraries that carry meta data have them."""


def test_functional_operators_take_subclasses() -> None:
    x, weight, bias, residual = torch.randn(3, 5, 8), torch.randn(6, 8), torch.randn(6), torch.randn(3, 5, 6)
    packed = Int8.of(weight)
    for activation in (None, "gelu", "quick_gelu"):
        got = velm_kernels.linear(x, packed, bias, activation, residual)
        expected = velm_kernels.linear(x, packed.dequantised(), bias, activation, residual)
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="activation: expected one of"):
        velm_kernels.linear(x, packed, bias, "swish")
    query, key, value = torch.randn(2, 8), Int8.of(torch.randn(8, 8)), Int8.of(torch.randn(8, 8))
    torch.testing.assert_close(
        velm_kernels.attention_pool(x, query, key, value, heads=2),
        velm_kernels.attention_pool(x, query, key.dequantised(), value.dequantised(), heads=2),
    )
    named = x.as_subclass(Named)
    torch.testing.assert_close(torch.Tensor(velm_kernels.masked_pool(named)), velm_kernels.masked_pool(x))
    nested = torch.nested.nested_tensor([torch.randn(2, 4, 8), torch.randn(2, 3, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query: expected a tensor with one length for every row"):
        velm_kernels.cross_attention(nested, nested, nested)


def test_modules_of_our_own_take_quantised_weights() -> None:
    for module, x in (
        (velm_kernels.MLP(8), torch.randn(3, 8)),
        (velm_kernels.AttentionPool2d(3, 8, 2), torch.randn(2, 8, 3, 3)),
        (velm_kernels.ProbePool(8, 2, 16), torch.randn(2, 5, 8)),
    ):
        twin = copy.deepcopy(module)
        assert quantise(module)
        for m in twin.modules():
            if type(m) is nn.Linear or isinstance(m, velm_kernels.Linear):
                m.weight = nn.Parameter(Int8.of(m.weight.detach()).dequantised())
        torch.testing.assert_close(module(x), twin(x))


def test_masks_are_left_as_they_are_and_followed() -> None:
    layer = models.build("lxmert")[0].encoder.layer[0]
    x, mask = torch.randn(2, 7, 32), torch.zeros(2, 1, 1, 7)
    low = torch.finfo(torch.float32).min

    def change(index: int) -> None:
        if index == 1:
            mask.numpy()[..., 3:] = low
        elif index == 2:
            mask.data[1, ..., :3] = low
        elif index == 3:
            mask.data = torch.zeros(2, 1, 7, 7).masked_fill_(torch.ones(7, 7).triu(1).bool(), low)
        elif index == 4:
            torch.from_dlpack(mask)[1, 0, 2] = 0.5

    with torch.no_grad():
        for index in range(5):
            change(index)
            expected = layer(x, mask)[0]
            velm_kernels.patch(layer)
            for _ in range(2):  # the second time from memory
                torch.testing.assert_close(layer(x, mask)[0], expected, rtol=1e-4, atol=1e-5)
            if index:
                velm_kernels.unpatch(layer)
                continue
            # Changed between two calls of the same patched layer.
            change(1)
            got = layer(x, mask)[0]
            velm_kernels.unpatch(layer)
            torch.testing.assert_close(got, layer(x, mask)[0], rtol=1e-4, atol=1e-5)
    assert not vars(mask)
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["mask"], mask)


def test_what_is_remembered_lives_as_long_as_its_tensor() -> None:
    mask = torch.ones(2, 3)
    counted: list[int] = []

    def count(x: Tensor, factor: int) -> Tensor:
        counted.append(factor)
        return x * factor

    before = len(plain._memory.entries)
    for factor in (2, 2, 3, 2, 3):
        assert torch.equal(plain.remembered(count, mask, factor), mask * factor)
    assert counted == [2, 3]
    mask.data[0, 0] = torch.nan
    for _ in range(2):
        plain.remembered(count, mask, 2)
    assert counted == [2, 3, 2, 2]
    with torch.inference_mode():
        plain.remembered(count, mask, 3)
    assert counted[-1] == 3 and len(counted) == 5
    del mask
    assert len(plain._memory.entries) <= before


def _in_parts(rank: int, size: int, path: str) -> None:
    """Of one process of `size`; whatever differs raises."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{path}")
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)

    def spread(x: Tensor, dim: int | None) -> Tensor:
        placement = Replicate() if dim is None else Shard(dim)
        return distribute_tensor(x.detach(), mesh, [placement]).requires_grad_(x.requires_grad)

    def check(got: Any, expected: Tensor) -> None:
        assert isinstance(got, DTensor)
        # A gradient sums over rows: its rounding is that of the largest terms.
        close = 1e-5 * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-4, atol=close)

    def compare(operator: Any, tensors: list[Tensor], dims: tuple[int | None, ...], exchanged: int | None) -> None:
        """Outputs and gradients; `exchanged`: how many collectives the forward needs."""
        expected = operator(*tensors)
        grad = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, tensors, grad)
        parts = [spread(x, dim) for x, dim in zip(tensors, dims, strict=True)]
        with CommDebugMode() as mode:
            out = operator(*parts)
        assert exchanged is None or mode.get_total_counts() == exchanged, (dims, mode.get_comm_counts())
        check(out, expected)
        out.backward(spread(grad, None))
        for part, gradient in zip(parts, gradients, strict=True):
            check(part.grad, gradient)

    query, key, value = (torch.randn(4, 4, 9, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 4, 9, 9, requires_grad=True)
    attention = lambda *x: velm_kernels.cross_attention(*x[:3], bias=x[3] if len(x) > 3 else None)  # noqa: E731
    for dims, exchanged in (((0, 0, 0, None), 0), ((1, 1, 1, 1), 0), ((2, 2, 2, None), None)):
        compare(attention, [query, key, value, bias], dims, exchanged)
    few = [torch.randn(4, 2, 9, 16, requires_grad=True) for _ in range(2)]
    compare(attention, [query, *few], (1, 1, 1), 0)

    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((6, 40, 64), (128, 64), (128,)))
    with use_product("velm"):
        for activation in (None, "gelu"):
            operator = functools.partial(velm_kernels.linear, activation=activation)
            for dims, exchanged in (((0, None, None), 0), ((None, 0, 0), 0), ((2, 1, None), None)):
                compare(operator, [x, weight, bias], dims, exchanged)
        compare(velm_kernels.linear, [x, weight], (2, 1), 0)
    compare(velm_kernels.masked_pool, [x], (0,), None)

    plan = {
        **dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj", "*.fc1"), ColwiseParallel),
        **dict.fromkeys(("*.out_proj", "*.fc2"), RowwiseParallel),
    }
    for first in ("patch", "parallelise"):
        for attention_implementation in ("sdpa", "eager"):
            model, inputs = models.build(f"clip_{attention_implementation}")
            expected = run(model, inputs)
            if first == "patch":
                velm_kernels.patch(model)
            parallelize_module(model.vision_model.encoder, mesh, {name: style() for name, style in plan.items()})
            if first != "patch":
                velm_kernels.patch(model)
            got = run(model, inputs)
            assert_near(type(got)(got.outputs, {}), type(got)(expected.outputs, {}))
            for name, gradient in got.gradients.items():
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                torch.testing.assert_close(whole, expected.gradients[name], rtol=1e-3, atol=1e-3)
    dist.destroy_process_group()


def test_distributed_tensors_in_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_in_parts, (2, f"{folder}/store"), 2)
