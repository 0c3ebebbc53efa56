"""Calls that go past the operators: small ones to torch's form, others past torch's dispatcher where nobody listens.

Both have to mean what the operators mean, and neither may be taken where somebody would notice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

import velm_kernels
from tests.small_calls import CALLS, Small, randn
from velm_kernels import backends, processors
from velm_kernels.backends import cpu, direct, small
from velm_kernels.fusion.bilinear import rule
from velm_kernels.fusion.film import canonical

needs_a_library = pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")


@pytest.fixture(autouse=True)
def _as_shipped(_operators_at_any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not small.enabled
    monkeypatch.setattr(small, "enabled", True)


IN_FLOAT32_ALONE = {"low_rank_fusion", "contrastive_loss", "sigmoid_loss", "mutual_information"}


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def differentiated(call: Small, arguments: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """The results, and the gradients of everything that has one."""
    flat, spec = tree_flatten(arguments)
    # Signs of sketches and scores are not differentiated.
    fixed = {id(leaf) for name in ("sketch_x", "sketch_y", "scores") for leaf in tensors_of(arguments.get(name))}
    leaves = [
        leaf.clone().requires_grad_()
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in fixed
        else leaf
        for leaf in flat
    ]
    results = call.call(tree_unflatten(leaves, spec))
    outs = [out for out in tensors_of(results) if out.requires_grad]
    upstream = [torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype) for out in outs]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return results, list(torch.autograd.grad(outs, wanted, upstream))


def close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert len(got) == len(expected)
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        size = float(other.double().nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=limit, atol=limit * max(size, 1.0), equal_nan=True)


@needs_a_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_both_sides_of_the_rule_mean_the_same(
    name: str, is_small: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS[name]
    if not is_small and (dtype != torch.float32 or not call.many):
        pytest.skip("the operator's own tests")
    arguments = call.arguments(call.few if is_small else call.many, dtype)
    ran: list[str] = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda operator, *rest: ran.append(operator) or run(operator, *rest))
    by_torch = is_small and (dtype == torch.float32 or call.function not in IN_FLOAT32_ALONE)
    with torch.no_grad():
        out = call.call(arguments)
    assert bool(ran) != by_torch
    results, grads = differentiated(call, arguments)
    assert bool(ran) != by_torch
    assert velm_kernels.explain(call.function, **arguments).count("its own function") == by_torch
    with velm_kernels.use_backend("reference"):
        expected, expected_grads = differentiated(call, arguments)
        assert "its own function" not in velm_kernels.explain(call.function, **arguments)
    close(tensors_of(out), tensors_of(expected), dtype)
    close(tensors_of(results), tensors_of(expected), dtype)
    close(grads, expected_grads, dtype)
    if by_torch:
        pairs = zip(tensors_of(out), tensors_of(expected), strict=True)
        assert all(one.is_contiguous() or not other.is_contiguous() for one, other in pairs)


@needs_a_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_comes_out_of_small_calls(name: str, value: float) -> None:
    call = CALLS[name]
    for place in range(len(tensors_of(call.arguments(call.few)))):
        arguments = call.arguments(call.few)
        tensor = tensors_of(arguments)[place]
        if not tensor.is_floating_point() or "sketch" in str(arguments.keys()):
            continue
        tensor.view(-1)[-1] = value
        with torch.no_grad():
            out = tensors_of(call.call(arguments))[0]
        with velm_kernels.use_backend("reference"), torch.no_grad():
            expected = tensors_of(call.call(arguments))[0]
        assert torch.equal(out.isfinite(), expected.isfinite()), (name, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [(0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan), (1.0,), (torch.nan,)])
def test_many_equal_scores_are_taken_in_order(values: tuple[float, ...], dtype: torch.dtype) -> None:
    from velm_kernels.pooling.select_tokens import MANY_SCORES

    drawn = torch.randint(0, len(values), (4, MANY_SCORES // 4), generator=torch.Generator().manual_seed(0))
    scores = torch.tensor(values, dtype=dtype)[drawn]
    scores[1] = randn(MANY_SCORES // 4)
    x = randn(4, MANY_SCORES // 4, 2)
    for k in (1, 300, MANY_SCORES // 4):
        got = velm_kernels.select_tokens(x, scores, k)
        with velm_kernels.use_backend("reference"):
            expected = velm_kernels.select_tokens(x, scores, k)
        assert all(map(torch.equal, got, expected))


@needs_a_library
@pytest.mark.parametrize("by_torch", [True, False])
def test_products_in_bfloat16_by_the_processor(by_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    line = dataclasses.replace(
        processors.TABLE[-1], bfloat16_products=not by_torch, bfloat16_steps=processors.NEVER if by_torch else 0
    )
    monkeypatch.setattr(processors, "rules", lambda: line)
    # The function of the package's name hides it.
    monkeypatch.setattr(sys.modules["velm_kernels.products"], "first_row", lambda *args: processors.NEVER)
    x, y, factors = randn(40, 255), randn(40, 255), [0.05 * randn(4, 256, 256) for _ in range(2)]
    calls: dict[str, dict[str, Any]] = {
        "low_rank_fusion": {"inputs": [x, y], "factors": factors, "weight": randn(4), "bias": randn(256)},
        "linear": {"x": randn(600, 255), "weight": 0.05 * randn(256, 255), "activation": "gelu"},
        "bilinear": {"x": randn(600, 32), "y": randn(600, 32), "weight": 0.05 * randn(40, 32, 32)},
        "outer_product_fusion": {"x": randn(2, 60, 40), "y": randn(2, 60, 30)},
    }
    for name, arguments in calls.items():
        given = tree_map(lambda value: value.bfloat16() if isinstance(value, Tensor) else value, arguments)
        if name != "outer_product_fusion":
            assert velm_kernels.explain(name, **given).count("its own function") == by_torch, name
        got = getattr(velm_kernels, name)(**given)
        with velm_kernels.use_backend("reference"):
            exact = getattr(velm_kernels, name)(**tree_map(lambda v: v.double() if isinstance(v, Tensor) else v, given))
        assert got.dtype == torch.bfloat16
        assert float((got.double() - exact).norm() / exact.norm()) < 0.01


@needs_a_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("masked_pool ", "gated_residual of"))])
def test_small_calls_do_not_read_what_is_masked(name: str, value: float) -> None:
    call = CALLS[name]
    clean = call.arguments(call.few)
    poisoned = clean | {"x": clean["x"].clone()}
    if "lengths" in clean:
        poisoned["x"][torch.arange(clean["x"].shape[1]) >= clean["lengths"][:, None]] = value
    else:
        poisoned["x"][~clean.get("mask", clean.get("row_mask"))] = value
    assert not poisoned["x"].isfinite().all()
    (out, grads), (expected, expected_grads) = (differentiated(call, given) for given in (poisoned, clean))
    assert torch.equal(out, expected) and all(map(torch.equal, grads, expected_grads))
    with torch.no_grad():
        close([call.call(poisoned)], [expected.detach()])


@needs_a_library
@pytest.mark.parametrize("mode", ["mean", "sum", "max", "logsumexp"])
def test_what_is_masked_gets_no_gradient_of_small_calls(mode: str) -> None:
    """Not even of NaN; and the gradients are differentiated again."""
    x, lengths = randn(3, 5, 4).requires_grad_(), torch.tensor([5, 2, 4])
    hidden = torch.arange(5) >= lengths[:, None]
    out = velm_kernels.masked_pool(x, lengths, mode=mode)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, torch.nan), retain_graph=True)
    assert torch.equal(grad[hidden], torch.zeros_like(grad[hidden])) and grad[1, :2].isnan().any(0).all()
    assert torch.equal(x, randn(3, 5, 4))
    double = x.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda y: velm_kernels.masked_pool(y.float(), lengths, mode=mode).double(), double, eps=1e-3, atol=2e-3
    )


def _pair(rows: int, dx: int, dy: int, out: int, regions: int | None = None) -> dict[str, Any]:
    y = randn(rows, dy) if regions is None else randn(rows, regions, dy)
    return {"x": randn(rows, dx), "y": y, "weight": randn(out, dx, dy)}


def _fused(rows: int, *dims: int, out: int = 6, regions: int | None = None) -> dict[str, Any]:
    first, *others = dims
    leading = (rows,) if regions is None else (rows, regions)
    inputs = [randn(rows, first), *(randn(*leading, dim) for dim in others)]
    return {"inputs": inputs, "weight": randn(out, math.prod(1 + dim for dim in dims))}


BY_NO_OPERATOR = "torch (its own function, called in place of an operator)"


@needs_a_library
@pytest.mark.parametrize(
    ("name", "arguments", "told", "ran"),
    [
        ("bilinear", _pair(4, 8, 9, 3), BY_NO_OPERATOR, []),
        ("bilinear", _pair(4, 8, 9, 3, regions=5), BY_NO_OPERATOR, []),
        ("bilinear", _pair(rule.OUTER // 8, 8, 9, rule.FEW_OUTPUTS), "torch", ["bilinear by torch"]),
        ("bilinear", _pair(rule.OUTER // 8, 8, 9, rule.FEW_OUTPUTS + 1), "cpu", ["bilinear by cpu"]),
        ("bilinear", _pair(rule.LARGE_ROWS, 2, rule.LARGE, 6), "torch", ["bilinear by torch"]),
        ("bilinear", _pair(rule.LARGE_ROWS + 1, 2, rule.LARGE, 6), "cpu", ["bilinear by cpu"]),
        ("bilinear", _pair(rule.OUTER // 8, 8, 9, 6, regions=5), "torch", ["folded_bilinear by torch"]),
        ("tensor_fusion", _fused(4, 8, 9), BY_NO_OPERATOR, []),
        ("tensor_fusion", _fused(4, 2, 2, 20, regions=5), BY_NO_OPERATOR, []),
        ("tensor_fusion", _fused(rule.OUTER // 8, 8, 9), "cpu", ["bilinear by cpu"]),
        ("tensor_fusion", _fused(rule.OUTER // 8, 8, 9, regions=5), "torch", ["folded_bilinear by torch"]),
    ],
)
def test_explain_tells_of_a_bilinear_form_what_runs(
    name: str, arguments: dict[str, Any], told: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of every limit of its rule, and without a gradient as with one."""
    seen: list[str] = []

    def noted(operator: str, known: backends.Implementation) -> backends.Implementation:
        def call(*values: Any) -> Any:
            seen.append(f"{operator} by {known.backend}")
            return known.call(*values)

        return dataclasses.replace(known, call=call)

    for operator in ("bilinear", "folded_bilinear"):
        known = backends._implementations[f"{operator}_forward"]
        for backend in known:
            monkeypatch.setitem(known, backend, noted(operator, known[backend]))
    backends.forget_kinds()
    with torch.no_grad():
        getattr(velm_kernels, name)(**arguments)
    assert seen == ran
    weight = arguments["weight"].requires_grad_()
    getattr(velm_kernels, name)(**arguments)
    weight.requires_grad_(False)
    assert seen == 2 * ran
    lines = velm_kernels.explain(name, **arguments).splitlines()
    assert lines[0] == f"{name} -> {told}"
    # Whoever asks for a backend gets it.
    with velm_kernels.use_backend("cpu"):
        assert velm_kernels.explain(name, **arguments).startswith(f"{name} -> cpu (asked for)")


def test_rows_without_tokens_are_zero_and_pass_nothing_back() -> None:
    for lengths in ([0, 0], [0, 3], [3, 0]):
        for mode in ("mean", "sum", "max", "logsumexp"):
            x = randn(2, 3, 4).requires_grad_()
            out = velm_kernels.masked_pool(x, torch.tensor(lengths), mode=mode)
            (grad,) = torch.autograd.grad(out.sum(), x)
            for row, length in enumerate(lengths):
                assert bool(out[row].any()) == bool(grad[row].any()) == (length > 0)
    for factor in (1, 2):
        a, b = torch.zeros(2, 4, requires_grad=True), randn(2, 4).requires_grad_()
        out = velm_kernels.factorized_pool(a, b, factor, power_norm=True, l2_norm=True)
        assert not any(value.any() for value in (out, *torch.autograd.grad(out.sum(), (a, b))))


def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_ones() -> None:
    x = torch.ones(2, 5, 3, requires_grad=True)
    for lengths in (None, torch.tensor([3, 5])):
        (grad,) = torch.autograd.grad(velm_kernels.masked_pool(x, lengths, mode="max").sum(), x)
        assert torch.equal(grad[:, 0], torch.ones(2, 3)) and not grad[:, 1:].any()


JUNK: list[Any] = [
    None, True, "text", 0.5, 3, -1, [1, 2], [], object(), torch.tensor(1), torch.randn(2, 3).double(),
    torch.empty(0), torch.randn(3, device="meta"), torch.tensor([True, False]),
    torch.randn(1, 2, 3, 4, 5), 10**30, float("nan"), {}, [torch.randn(2, 3)], (torch.randn(2, 3), None),
]  # fmt: skip


@needs_a_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_end_as_without_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]

    def ends(arguments: dict[str, Any]) -> Any:
        try:
            return tensors_of(call.call(arguments))
        except Exception as error:
            # Addresses of objects differ.
            return f"{type(error).__name__}: {error}"

    for changed in call.arguments(call.few):
        for junk in JUNK:
            arguments = call.arguments(call.few) | {changed: junk}
            with monkeypatch.context() as patch:
                patch.setattr(small, "enabled", False)
                expected = ends(arguments)
            got = ends(arguments)
            if isinstance(expected, str) or isinstance(got, str):
                assert got == expected, (name, changed, junk)
            else:
                close([one for one in got if not one.is_meta], [one for one in expected if not one.is_meta])


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("cross_attention", "linear")])
def test_small_calls_under_vmap(name: str) -> None:
    call = CALLS[name]
    first = call.arguments(call.few)
    mapped = [leaf for leaf in tensors_of(first) if leaf.is_floating_point()]
    sketches = {id(leaf) for key in ("sketch_x", "sketch_y") for leaf in tensors_of(first.get(key))}
    mapped = [leaf for leaf in mapped if id(leaf) not in sketches]
    flat, spec = tree_flatten(first)

    def of(*leaves: Tensor) -> Any:
        given = iter(leaves)
        mine = {id(leaf) for leaf in mapped}
        return tensors_of(call.call(tree_unflatten([next(given) if id(v) in mine else v for v in flat], spec)))[0]

    batched = [torch.stack([leaf, 0.5 * leaf]) for leaf in mapped]
    expected = torch.stack([of(*mapped), of(*(0.5 * leaf for leaf in mapped))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close([torch.vmap(of)(*batched)], [expected])


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
