"""Running a model before and after `patch`, and comparing what came out by the numbers rule."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from tests.numbers import assert_accurate, relative_rms


class Run(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Named(nn.Module):
    """A module whose arguments have names, as `run` gives them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"out": self.module(**inputs)}


def run(model: nn.Module, inputs: dict[str, Any], backward: bool = True) -> Run:
    """The floating-point outputs of `model`, and the gradients of a random sum of them."""
    inputs = {
        name: value.clone().requires_grad_() if backward and value.is_floating_point() else value
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    } | {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    with torch.set_grad_enabled(backward):
        outputs = {
            name: value
            for name, value in model(**inputs).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
    gradients: dict[str, Tensor] = {}
    if backward:
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for value in outputs.values():
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.requires_grad:
                loss = loss + (value.masked_fill(torch.isinf(value), 0.0).double() * weights).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {name: v.grad for name, v in inputs.items() if isinstance(v, Tensor) and v.grad is not None}
    return Run({name: value.detach() for name, value in outputs.items()}, gradients)


def exact_run(model: nn.Module, inputs: dict[str, Any], backward: bool = True) -> Run:
    """The same in float64, on a copy whose norms and softmax do not go through float32."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    softmax = nn.functional.softmax
    with mock.patch.object(nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim)):
        return run(exact, inputs, backward)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def assert_same(patched: Run, plain: Run, exact: Run, dtype: torch.dtype = torch.float32, ulps: float = 16.0) -> None:
    """The error of everything in `patched` is at most twice that of `plain`, plus a few units in the last place.

    A gradient whose terms cancel is compared with the size of the largest gradients: a key bias, for one, moves all
    scores of a row alike and has none but rounding.
    """
    assert patched.outputs.keys() == plain.outputs.keys() == exact.outputs.keys() != set()
    for name, value in patched.outputs.items():
        assert value.dtype is plain.outputs[name].dtype
        assert_accurate(name, value, plain.outputs[name], exact.outputs[name], dtype, ulps=ulps)
    assert patched.gradients.keys() == plain.gradients.keys() == exact.gradients.keys()
    sizes = [float(gradient.square().mean().sqrt()) for gradient in exact.gradients.values()]
    for name, value in patched.gradients.items():
        floor = 0.03 * max(sizes) * value.numel() ** 0.5
        # A gate is one number: nearly all of the sum that is its gradient cancels, and plain torch's error is luck.
        slack = 4.0 * ulps if value.numel() == 1 else ulps
        assert_accurate(
            name, value, plain.gradients[name], exact.gradients[name], dtype, ulps=slack, factor=3.0, floor=floor
        )


def assert_near(patched: Run, plain: Run, tolerance: float = 1e-5) -> None:
    """Equal up to rounding in float32, for models whose float64 run is compared elsewhere."""
    assert patched.outputs.keys() == plain.outputs.keys() != set()
    for name, value in patched.outputs.items():
        infinite = torch.isinf(plain.outputs[name])
        assert torch.equal(torch.isinf(value), infinite), name
        got, expected = (x.masked_fill(infinite, 0.0) for x in (value, plain.outputs[name]))
        assert relative_rms(got, expected) <= tolerance, name
    assert patched.gradients.keys() == plain.gradients.keys()
    largest = max((float(gradient.square().mean().sqrt()) for gradient in plain.gradients.values()), default=0.0)
    for name, value in patched.gradients.items():
        floor = 0.03 * largest * value.numel() ** 0.5
        assert relative_rms(value, plain.gradients[name], floor) <= 3 * tolerance, name


def assert_equal(first: Run, second: Run) -> None:
    """Equal to the last bit."""
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
