"""What stands in for a projection inside of a module, or listens to one, takes part: adapters, hooks, quantisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import MODULES, ModuleCall, call_module

PROJECTIONS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention)


class Adapter(nn.Module):
    """A layer with a product of its own beside it, which looks like the layer, as those of PEFT do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(0.1 * torch.randn(base.weight.shape))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.base(x, *others) + F.linear(x, self.delta)


def called(module: nn.Module) -> list[str]:
    """Names of the projections inside of a module that are called as modules in torch's own form of it."""
    inside_of_attention = [
        f"{name}.out_proj" for name, child in module.named_modules() if isinstance(child, nn.MultiheadAttention)
    ]
    return [
        name
        for name, child in module.named_modules()
        if name and isinstance(child, PROJECTIONS) and name not in inside_of_attention
    ]


WITH_PROJECTIONS = [call for call in MODULES if called(call.module())]


def tensors(call: ModuleCall, module: nn.Module) -> list[Tensor]:
    found = call_module(module, call.arguments())
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("call", WITH_PROJECTIONS, ids=str)
def test_adapters_take_part_and_are_trained(call: ModuleCall) -> None:
    module = call.module()
    merged = copy.deepcopy(module)
    for name in called(module):
        layer = module.get_submodule(name)
        # Beside an activation inside of the layer there is no weight that both are merged into.
        if isinstance(layer, nn.Linear) and not getattr(layer, "activation", None):
            module.set_submodule(name, adapter := Adapter(layer))
            with torch.no_grad():
                merged.get_submodule(name).weight += adapter.delta
    for got, want in zip(tensors(call, module), tensors(call, merged), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    sum(value.square().sum() for value in tensors(call, module)).backward()
    adapters = {name: child for name, child in module.named_modules() if isinstance(child, Adapter)}
    assert [name for name, child in adapters.items() if child.delta.grad is None] == []


@pytest.mark.parametrize("call", WITH_PROJECTIONS, ids=str)
def test_hooks_are_called(call: ModuleCall) -> None:
    module, usual = call.module(), tensors(call, call.module())
    heard = set()
    for name in called(module):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.add(name))
    for got, want in zip(tensors(call, module), usual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert heard == set(called(module))


@pytest.mark.parametrize("call", WITH_PROJECTIONS, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation(call: ModuleCall) -> None:
    module = call.module()
    usual = tensors(call, module)
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    for got, want in zip(tensors(call, quantised), usual, strict=True):
        assert (got - want).norm() < 0.1 * want.norm() + 0.1
