"""Second derivatives through patched models: gradient penalties and Hessians are those of the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import velm_kernels
from tests.integrations.models import FAMILIES, build, tensors, to_float64

pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. .* runs on plain torch:UserWarning")


@pytest.fixture(autouse=True)
def _torchs_attention_with_second_derivatives() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _loss(output: Any) -> Tensor:
    # Attention weights that nobody asked for are not among the results of a patched model.
    found = tensors({name: value for name, value in output.items() if name != "attentions"})
    found = [value for value in found if value.requires_grad and value.is_floating_point()]
    return torch.stack([value.tanh().mean() for value in found if value.isfinite().all()]).sum()


def _penalty(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of the squared norm of the gradients of all parameters."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(_loss(model(**inputs)), list(parameters.values()), create_graph=True, allow_unused=True)
    penalty = torch.stack([gradient.square().sum() for gradient in found if gradient is not None]).sum()
    second = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, second, strict=True))


def _error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    of_all = sum(float(value.norm()) ** 2 for value in exact.values())
    return (sum(float((got[name] - value).norm()) ** 2 for name, value in exact.items()) / of_all) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_penalties(name: str) -> None:
    model, inputs = build(name)
    plain = _penalty(model, inputs)
    exact = _penalty(model.double(), to_float64(inputs))
    model.float()
    report = velm_kernels.patch(model)
    assert report.replaced
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        velm_kernels.backends._warned.clear()
        patched = _penalty(model, inputs)
    assert any("differentiated again" in str(warning.message) for warning in caught), "no operator was in the way"
    assert _error(patched, exact) <= 2 * _error(plain, exact) + 1e-6


def _of_one_bias(model: nn.Module, inputs: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    name, bias = next((name, value) for name, value in model.named_parameters() if name.endswith("query.bias"))

    def loss(bias: Tensor) -> Tensor:
        return _loss(torch.func.functional_call(model, {name: bias}, (), inputs))

    return loss, bias.detach()


def test_hessians_of_vilt() -> None:
    model, inputs = build("vilt")
    loss, bias = _of_one_bias(model, inputs)

    def by_transforms() -> Tensor:
        # ViLT draws the order of the patches.
        return torch.func.jacfwd(torch.func.jacrev(loss), randomness="same")(bias)

    expected = by_transforms()
    velm_kernels.patch(model)
    largest = float(expected.abs().max())
    for hessian in (
        by_transforms(),
        torch.autograd.functional.hessian(loss, bias),
        torch.autograd.functional.hessian(loss, bias, vectorize=True),
    ):
        assert float((hessian - expected).abs().max()) <= 1e-4 * largest
