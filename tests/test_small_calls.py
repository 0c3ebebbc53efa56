"""Calls that go past the operators: small ones to torch's form, others past torch's dispatcher where nobody listens.

Both have to mean what the operators mean, and neither may be taken where somebody would notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import velm_kernels
from velm_kernels import backends
from velm_kernels.backends import cpu, direct, small
from velm_kernels.fusion.film import canonical

needs_a_library = pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")


@pytest.fixture(autouse=True)
def _as_shipped(_operators_at_any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not small.enabled
    monkeypatch.setattr(small, "enabled", True)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# name -> (arguments for a size, a size on the small side of the rule, one on the other)
CALLS: dict[str, tuple[Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]], int, int]] = {
    "film": (lambda n: ((randn(2, n, 8), randn(2, 8), randn(2, 8)), {"gamma_offset": 1.0}), 3, 5000),
    "weighted_sum": (lambda n: (([randn(2, n, 8), randn(2, n, 8)], randn(2, 2)), {}), 3, 5000),
    "gated_residual": (lambda n: ((randn(n, 8), randn(n, 8), randn(1)), {}), 3, 5000),
    "masked_pool": (lambda n: ((randn(2, n, 8),), {}), 3, 5000),
    "cross_attention": (
        lambda n: ((randn(1, 4, 3, 8), randn(1, 4, n, 8), randn(1, 4, n, 8)), {"scale": 0.5}),
        5,
        50000,
    ),
    "linear": (lambda n: ((randn(n, 8), randn(16, 8), randn(16), "gelu"), {"residual": randn(n, 16)}), 3, 5000),
}


def differentiated(call: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(one) for one in value]
        if isinstance(value, Tensor):
            leaves.append(value.clone().requires_grad_())
            return leaves[-1]
        return value

    out = call(*[leaf(value) for value in args], **{name: leaf(value) for name, value in kwargs.items()})
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel()).view(out.shape)))]


@needs_a_library
@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_both_sides_of_the_rule_mean_the_same(name: str, is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, few, many = CALLS[name]
    args, kwargs = make(few if is_small else many)
    ran: list[str] = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda operator, *rest: ran.append(operator) or run(operator, *rest))
    call = getattr(velm_kernels, name)
    with torch.no_grad():
        out = call(*args, **kwargs)
    assert bool(ran) != is_small
    got = differentiated(call, args, kwargs)
    assert bool(ran) != is_small
    assert velm_kernels.explain(name, *args, **kwargs).startswith(f"{name} -> torch (its own function") == is_small
    with velm_kernels.use_backend("reference"):
        expected = differentiated(call, args, kwargs)
        assert "its own function" not in velm_kernels.explain(name, *args, **kwargs)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("keys", [1, 5, 16, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_comes_out_of_small_attention(keys: int, value: float, place: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = [randn(1, 2, 3, 16).to(dtype), randn(1, 2, keys, 16).to(dtype), randn(1, 2, keys, 16).to(dtype)]
        args[place][0, 0, 0, 3] = value
        if (dtype == torch.bfloat16 and value != value) or dtype == torch.float32:
            query, key, values = (tensor.double() for tensor in args)
            exact = torch.softmax(0.25 * query @ key.transpose(-1, -2), -1) @ values
            for needs in (False, True):
                out = velm_kernels.cross_attention(*(tensor.clone().requires_grad_(needs) for tensor in args))
                assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    args = [randn(1, 2, keys, 16) for _ in range(3)]
    args[1 + (place > 1)][0, 0, -1, 3] = value
    out = velm_kernels.cross_attention(*args, is_causal=True)
    assert out[0, 0, :-1].isfinite().all() and out[0, 1].isfinite().all()


def test_small_attention_has_every_derivative() -> None:
    for keys in (5, 20):
        args = [randn(1, 2, 3, 4), randn(1, 2, keys, 4), randn(1, 2, keys, 4)]
        twice = [tensor.clone().requires_grad_() for tensor in args]
        (grad,) = torch.autograd.grad(velm_kernels.cross_attention(*twice).square().sum(), twice[0], create_graph=True)
        grad.square().sum().backward()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in twice)
        of_query = functools.partial(velm_kernels.cross_attention, key=args[1], value=args[2])
        _, tangent = torch.func.jvp(of_query, (args[0],), (args[0],))
        assert tangent.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "args", "named"),
    [
        ("film", (randn(2, 3, 8), randn(2, 7), randn(2, 8)), "gamma"),
        ("weighted_sum", ([randn(2, 8)], randn(3)), "weights"),
        ("gated_residual", (randn(3, 8), randn(2, 8), randn(1)), "x"),
        ("masked_pool", (randn(8),), "x"),
        ("cross_attention", (randn(1, 2, 3, 8), randn(1, 2, 3, 4), randn(1, 2, 3, 8)), "key"),
        ("linear", (randn(2, 3), randn(4, 2)), "x"),
        ("linear", (randn(2, 3), randn(4, 3), randn(1)), "bias"),
    ],
)
def test_small_calls_that_do_not_fit_together_raise(name: str, args: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        getattr(velm_kernels, name)(*args)


class Listening(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard = function
        return function(*args, **(kwargs or {}))


@needs_a_library
def test_nobody_who_listens_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gamma, beta = randn(2, 3, 8), randn(2, 8), randn(2, 8)
    taken: list[str] = []
    run = direct.run
    monkeypatch.setattr(direct, "run", lambda name, *rest: taken.append(name) or run(name, *rest))
    arguments = canonical(x, gamma, beta)

    def passes(**changed: Any) -> bool:
        monkeypatch.setattr(torch.ops.velm, "film_forward", lambda *args: None)
        before = len(taken)
        try:
            direct.call("film_forward", arguments | changed)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(direct, "run", lambda name, *rest: taken.append(name) or run(name, *rest))
        return len(taken) > before

    assert passes()
    assert passes(x=torch.nn.Parameter(x, requires_grad=False))
    assert passes(x=x.clone().requires_grad_())
    with torch.no_grad():
        assert passes(x=x.clone().requires_grad_())
    assert not passes(x=x.to("meta"))
    assert not passes(x=x.as_subclass(type("Other", (Tensor,), {})))
    with FlopCounterMode(display=False):
        assert not passes()
    with Listening():
        assert not passes()
    with torch.autograd.forward_ad.dual_level():
        assert not passes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not passes()
    torch.func.vmap(lambda entry: pytest.fail("passed vmap by") if passes() else entry)(randn(2))
