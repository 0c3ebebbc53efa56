"""velm_kernels.linear inside torch: opcheck, compile, export, autocast, checkpointing, flop counter, modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import velm_kernels
from tests.conftest import Backend
from tests.linear.test_linear import every_route_once, random_inputs, route


@every_route_once
@pytest.mark.parametrize(("activation", "has_residual"), [("gelu", True), ("relu", False), (None, True)])
def test_compile_and_checkpoint_give_the_eager_gradients(
    backend: Backend, product: str, activation: str | None, has_residual: bool
) -> None:
    values, _ = random_inputs((5, 8), 6, 10, torch.float32, residual=has_residual)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return velm_kernels.linear(x, weight, bias, activation, residual).square().sum()

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = [None if value is None else value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), [value for value in leaves if value is not None])

    torch.compiler.reset()
    with route(backend, product):
        eager = gradients(function)
        for other in (
            torch.compile(function, fullgraph=True, backend="aot_eager"),
            torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True),
            lambda *tensors: checkpoint(function, *tensors, use_reentrant=False),
        ):
            for ours, theirs in zip(gradients(other), eager, strict=True):
                assert torch.equal(ours, theirs)


def test_flops() -> None:
    x, layer = torch.randn(40, 8, requires_grad=True), velm_kernels.Linear(8, 12, activation="gelu")
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 8 * 12


@pytest.mark.parametrize("bias", [True, False])
def test_linear_module_is_nn_linear(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Linear(6, 7, bias=bias)
    torch.manual_seed(0)
    ours = velm_kernels.Linear(6, 7, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.Linear)
    assert "activation='silu'" in repr(velm_kernels.Linear(2, 3, activation="silu"))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_mlp_is_two_projections() -> None:
    mlp = velm_kernels.MLP(6, 10, activation="quick_gelu")
    x, residual = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    z = nn.functional.linear(x, mlp.up.weight, mlp.up.bias)
    expected = nn.functional.linear(z * torch.sigmoid(1.702 * z), mlp.down.weight, mlp.down.bias) + residual
    torch.testing.assert_close(mlp(x, residual), expected)
    assert velm_kernels.MLP(6).up.out_features == 24
