"""How the tests of operators reach a device: what they make is there, with the values of the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.conftest import Backend, MadeOn, compile_without_modes


def test_what_a_test_makes_is_on_the_device() -> None:
    with MadeOn("meta"):
        generator = torch.Generator().manual_seed(0)
        made = [
            torch.randn(2, 3, generator=generator, dtype=torch.float64),
            torch.tensor([1, 2]),
            torch.arange(3),
            torch.full((2,), 1.0),
            torch.ones(2, requires_grad=True),
            torch.nn.Linear(2, 3).weight,
        ]
        assert {tensor.device.type for tensor in made} == {"meta"}
        assert made[4].requires_grad and made[4].is_leaf and made[5].requires_grad
        # Named devices, and what follows another tensor, stay.
        assert torch.ones(2, device="cpu").is_cpu
        assert torch.ones_like(torch.ones(2, device="cpu")).is_cpu
        # Inside, the library has to name its devices.
        with Backend("reference", device="meta").use():
            assert torch.ones(2).is_meta
            assert torch.nn.Linear(2, 3).weight.is_cpu
        assert torch.nn.Linear(2, 3).weight.is_meta


def test_the_values_are_those_of_the_cpu() -> None:
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(1))]
    with MadeOn("cpu"):
        drawn.append(torch.randn(4, generator=torch.Generator().manual_seed(1)))
        assert F.relu(torch.tensor([-1.0])).tolist() == [0.0]
    assert torch.equal(*drawn)


def test_what_is_compiled_is_called_without_the_mode() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + torch.overrides._len_torch_function_stack()

    with MadeOn("cpu"):
        assert torch.overrides._len_torch_function_stack() == 1
        compiled = compile_without_modes(lambda function, **options: function)(function, fullgraph=True)
        assert compiled(torch.zeros(1)).item() == 0
