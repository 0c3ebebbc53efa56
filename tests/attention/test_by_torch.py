"""Attention left to torch: what runs on either side of the rule, and that both mean the same."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from velm_kernels import backends, processors
from velm_kernels.attention.cross_attention import small as by_torch
from velm_kernels.attention.cross_attention import torch_attention
from velm_kernels.backends import cpu, small

pytestmark = pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")

AMX = next(line for line in processors.TABLE if line.name == "with AMX")


@pytest.fixture(autouse=True)
def _as_shipped(_operators_at_any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "enabled", True)
    monkeypatch.setattr(processors, "rules", lambda: AMX)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run = backends.run

    def noted(operator: str, *rest: Any) -> Any:
        if backends.forced() != "reference":
            names.append(operator)
        return run(operator, *rest)

    monkeypatch.setattr(backends, "run", noted)
    return names


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def drawn(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"query": queries, "key": keys, "value": keys}
    return {name: randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2) for name, length in shapes.items()}


def exact(arguments: dict[str, Any], wanted: tuple[str, ...], again: bool = False) -> list[Tensor]:
    double = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    with velm_kernels.use_backend("reference"):
        return computed(double, wanted, again)


def computed(arguments: dict[str, Any], wanted: tuple[str, ...], again: bool = False) -> list[Tensor]:
    """The result, the gradients, and with ``again`` those of their squares."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in wanted}
    out = velm_kernels.cross_attention(**(arguments | leaves))
    if not wanted:
        return [out]
    upstream = torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, create_graph=again)
    found = [out.detach(), *(grad.detach() for grad in grads)]
    if again:
        found += torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(leaves.values()))
    return found


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        limit = 2e-5 if one.dtype == torch.float32 else 2e-2
        assert one.isfinite().all() and float((one.double() - other).norm()) <= limit * float(other.norm())


QUERY_KEY_VALUE = ("query", "key", "value")
BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "dtype", "node"),
    [
        ((2, 3, 5, 20, 16), torch.float32, by_torch._KERNEL_NODE),
        ((1, 2, 64, 64, 64), torch.float32, by_torch._KERNEL_NODE),
        ((1, 2, 96, 96, 64), torch.float32, "UnsafeViewBackward"),
        ((1, 2, 300, 300, 64), torch.float32, "velm"),
        ((2, 3, 5, 9, 16), torch.float32, "UnsafeViewBackward"),
        ((2, 32, 96, 96, 32), torch.float32, "velm"),
        ((1, 2, 2, 20, 16), BFLOAT16, by_torch._KERNEL_NODE),
        ((1, 2, 1, 512, 128), BFLOAT16, by_torch._KERNEL_NODE),
        ((1, 2, 16, 64, 64), BFLOAT16, "ToCopyBackward"),
        ((1, 2, 160, 130, 128), BFLOAT16, "UnsafeViewBackward"),
        ((1, 1, 300, 300, 16), BFLOAT16, "velm"),
        ((1, 8, 96, 96, 64), BFLOAT16, "UnsafeViewBackward"),
        ((1, 8, 97, 97, 64), BFLOAT16, "velm"),
    ],
)
def test_gradients_on_every_side_of_the_rule(sizes: Any, dtype: torch.dtype, node: str, ran: list[str]) -> None:
    arguments = drawn(*sizes, dtype=dtype)
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    out = velm_kernels.cross_attention(**leaves)
    assert bool(ran) == (node == "velm")
    assert node == "velm" or out.grad_fn.name().startswith(node)
    assert velm_kernels.explain("cross_attention", **leaves).count("its own function") == (node != "velm")
    close(computed(arguments, QUERY_KEY_VALUE), exact(arguments, QUERY_KEY_VALUE))
    ran.clear()
    with velm_kernels.use_backend("cpu"):
        velm_kernels.cross_attention(**leaves)
    assert ran == ["attention_forward"]


@pytest.mark.parametrize(
    ("dim", "queries", "options", "forward", "backward"),
    [
        (264, 200, {}, "torch", "torch"),
        (264, 200, {"is_causal": True}, "cpu", "torch"),
        (264, 200, {"key_lengths": torch.tensor([100])}, "cpu", "cpu"),
        (256, 200, {}, "cpu", "cpu"),
        (264, 4, {}, "cpu", "cpu"),
    ],
)
def test_wide_heads_on_every_side_of_the_rule(
    dim: int, queries: int, options: dict[str, Any], forward: str, backward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four heads over two of keys."""
    chosen: list[str] = []
    select = backends._select_by_kind

    def noted(operator: str, values: Any, wanted: str, *rest: Any) -> Any:
        implementation = select(operator, values, wanted, *rest)
        if not wanted:
            chosen.append(implementation.backend)
        return implementation

    monkeypatch.setattr(backends, "_select_by_kind", noted)
    monkeypatch.setattr(small, "enabled", False)
    arguments = drawn(1, 4, queries, 190, dim) | options
    arguments |= {name: arguments[name][:, ::2] for name in ("key", "value")}
    got = computed(arguments, QUERY_KEY_VALUE)
    assert chosen == [forward, backward]
    close(got, exact(arguments, QUERY_KEY_VALUE))
    # Older versions of torch.
    monkeypatch.setattr(torch_attention, "_knows_groups", lambda: False)
    close(computed(arguments, QUERY_KEY_VALUE), exact(arguments, QUERY_KEY_VALUE))


@pytest.mark.parametrize("wanted", [QUERY_KEY_VALUE, ("query",), ("key", "value")])
def test_second_derivatives_past_torchs_kernel(wanted: tuple[str, ...]) -> None:
    arguments: dict[str, Any] = drawn(2, 3, 5, 20, 16) | {"scale": 0.3}
    close(computed(arguments, wanted, again=True), exact(arguments, wanted, again=True))


def test_second_derivatives_of_one_gradient_of_three() -> None:
    leaves = [value.requires_grad_() for value in drawn(1, 2, 3, 20, 16).values()]
    for i, leaf in enumerate(leaves):
        (grad,) = torch.autograd.grad(velm_kernels.cross_attention(*leaves).square().sum(), leaf, create_graph=True)
        found = torch.autograd.grad(grad.square().sum(), leaves)
        with velm_kernels.use_backend("reference"):
            double = [other.detach().double().requires_grad_() for other in leaves]
            out = velm_kernels.cross_attention(*double)
            (grad,) = torch.autograd.grad(out.square().sum(), double[i], create_graph=True)
            close(list(found), list(torch.autograd.grad(grad.square().sum(), double)))


def test_the_same_tensor_as_query_key_and_value_counts_once_each() -> None:
    def penalty(x: Tensor) -> Tensor:
        y = 2 * x
        (grad,) = torch.autograd.grad(velm_kernels.cross_attention(y, y, y).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = randn(1, 2, 20, 16)
    with velm_kernels.use_backend("reference"):
        expected = penalty(x.double().requires_grad_())
    close([penalty(x.requires_grad_())], [expected])


def test_a_batch_of_gradients_and_what_saves_tensors_elsewhere(ran: list[str]) -> None:
    leaves = [value.requires_grad_() for value in drawn(1, 2, 3, 20, 16).values()]
    out = velm_kernels.cross_attention(*leaves)
    several = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        expected = torch.autograd.grad(out, leaves, one, retain_graph=True)
        for got, other in zip(batched, expected, strict=True):
            torch.testing.assert_close(got[i], other)
    assert not ran
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        assert by_torch._KERNEL_NODE not in velm_kernels.cross_attention(*leaves).grad_fn.name()
    assert kept


def test_nothing_keeps_the_graph_alive() -> None:
    x = randn(1, 2, 20, 16).requires_grad_()
    y = 2 * x
    watched = weakref.ref(y)
    enabled = gc.isenabled()
    gc.disable()
    try:
        out = velm_kernels.cross_attention(y, y, y)
        out.sum().backward()
        del out, y
        assert watched() is None
    finally:
        if enabled:
            gc.enable()


def _hidden(kind: str, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    start = torch.arange(queries).expand(batch, queries) % 5
    seen = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[:, :, 0] = False
    bias = torch.where(seen, randn(batch, 1, queries, keys), -torch.inf).to(dtype)
    return {
        "ranges": {"key_ranges": (start, start + 7 * (start > 0))},
        "lengths": {"key_lengths": torch.arange(batch, dtype=torch.int32) * 3},
        "key_mask": {"key_mask": seen[:, 0, 1]},
        "mask": {"mask": seen},
        "bias": {"bias": bias},
        "finite bias": {"bias": randn(heads, queries, keys, dtype=dtype)},
        "lowest bias": {"bias": bias.clamp_min(torch.finfo(dtype).min)},
        "all": {"bias": bias, "mask": seen, "key_lengths": torch.full((batch,), keys - 2), "key_mask": seen[:, 0, 1]},
    }[kind]


KINDS = ("ranges", "lengths", "key_mask", "mask", "bias", "finite bias", "lowest bias", "all")


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_by_torchs_kernel(kind: str, dtype: torch.dtype, ran: list[str]) -> None:
    """Rows without a key too; and NaN in what nobody sees goes to the operator, and changes nothing."""
    batch, heads, queries, keys = 2, 2, 6, 20
    arguments: dict[str, Any] = drawn(batch, heads, queries, keys, 16, dtype)
    arguments |= _hidden(kind, batch, heads, queries, keys, dtype)
    expected = exact(arguments, ())
    with torch.no_grad():
        close(computed(arguments, ()), expected)
        assert not ran
        assert "its own function" in velm_kernels.explain("cross_attention", **arguments)
        if kind not in ("finite bias", "lowest bias"):
            shown = arguments.get(
                "mask", arguments.get("bias", torch.zeros(batch, 1, queries, keys)) > -torch.inf
            ).clone()
            if "key_mask" in arguments:
                shown &= arguments["key_mask"][:, None, None]
            if "key_lengths" in arguments:
                shown &= torch.arange(keys) < arguments["key_lengths"][:, None, None, None]
            if "key_ranges" in arguments:
                start, stop = arguments["key_ranges"]
                places = torch.arange(keys)
                shown &= (places >= start[:, None, :, None]) & (places < stop[:, None, :, None])
            unseen = ~shown.any(2).expand(batch, heads, keys)
            for name, where in (("key", unseen), ("value", unseen), ("query", ~shown.any(3).expand(batch, heads, -1))):
                if where.any():
                    poisoned = arguments | {name: arguments[name].clone()}
                    poisoned[name][where] = torch.nan
                    close(computed(poisoned, ()), expected)
    arguments["query"].requires_grad_()
    ran.clear()
    computed(arguments, ())
    assert bool(ran) == (kind not in ("finite bias",))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_bias_with_a_gradient(dtype: torch.dtype, ran: list[str]) -> None:
    wanted = (*QUERY_KEY_VALUE, "bias")
    for sizes in ((2, 2, 6, 20, 16), (1, 2, 160, 130, 128)):
        arguments = drawn(*sizes, dtype=dtype) | {"bias": randn(sizes[1], *sizes[2:4], dtype=dtype)}
        close(computed(arguments, wanted), exact(arguments, wanted))
        assert not ran
        # What is hidden passes nothing back, not even NaN.
        arguments["bias"][0, 1, 2] = -torch.inf
        close(computed(arguments, wanted), exact(arguments, wanted))
        assert "attention_backward" in ran
        ran.clear()


def test_unusual_and_wrong_arguments_are_left_to_the_operator(ran: list[str]) -> None:
    with torch.no_grad():
        arguments: dict[str, Any] = drawn(2, 2, 6, 20, 16)
        for name, wrong in (
            ("key_lengths", torch.tensor([3, 21])), ("key_lengths", torch.tensor([3.0, 2.0])),
            ("key_ranges", (torch.zeros(2, 6).long(), torch.full((2, 6), 21))), ("key_ranges", torch.zeros(2, 6)),
            ("mask", torch.ones(2, 2, 5, 20, dtype=torch.bool)), ("mask", torch.ones(6, 20)),
            ("key_mask", torch.ones(2, 19, dtype=torch.bool)), ("bias", torch.zeros(7, 20)),
            ("key_mask", [True]),
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=f"^{name}"):
                velm_kernels.cross_attention(**arguments, **{name: wrong})
        velm_kernels.cross_attention(**arguments, bias=torch.zeros(6, 20), softcap=5.0)
        assert ran == ["attention_forward"]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_what_is_later_stays_hidden_from_causal_rows(dtype: torch.dtype) -> None:
    arguments: dict[str, Any] = drawn(1, 2, 20, 20, 16, dtype) | {"is_causal": True}
    expected = exact(arguments, ())
    with torch.no_grad():
        close(computed(arguments, ()), expected)
        for name in ("key", "value"):
            for value in (torch.nan, torch.inf):
                poisoned = arguments | {name: arguments[name].clone()}
                poisoned[name][:, :, -1] = value
                close([computed(poisoned, ())[0][:, :, :-1]], [expected[0][:, :, :-1]])


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("keys", [5, 40])
def test_extras_of_few_scores(keys: int, dtype: torch.dtype, ran: list[str]) -> None:
    arguments: dict[str, Any] = drawn(2, 3, 4, keys, 16, dtype)
    asked = {"return_logsumexp": True, "return_key_mass": True}
    found = velm_kernels.cross_attention(**arguments, **asked)
    assert not ran
    with velm_kernels.use_backend("reference"):
        double = {name: value.double() for name, value in arguments.items()}
        expected = velm_kernels.cross_attention(**double, **asked)
    assert [one.dtype for one in found] == [dtype, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other.double(), rtol=1e-5 if one.dtype != BFLOAT16 else 1e-2, atol=1e-3
        )
    (mass,) = velm_kernels.cross_attention(**arguments, return_key_mass=True)[1:]
    assert torch.equal(mass, found[2]) and not mass.requires_grad
    many = drawn(1, 1, 200, 200, 16, dtype)
    velm_kernels.cross_attention(**many, return_key_mass=True)
    assert ran == ["attention_forward"]


@pytest.mark.parametrize(
    ("kv_heads", "queries", "keys", "is_own"),
    [(2, 1, 4112, True), (2, 4, 4112, True), (2, 5, 4112, False), (2, 1, 4096, False), (4, 1, 4112, False)],
)
def test_few_queries_of_grouped_heads_in_bfloat16(
    kv_heads: int, queries: int, keys: int, is_own: bool, ran: list[str]
) -> None:
    arguments = {
        "query": randn(1, 4, queries, 128, dtype=BFLOAT16),
        **{name: randn(1, kv_heads, keys, 128, dtype=BFLOAT16) for name in ("key", "value")},
    }
    with torch.no_grad():
        close(computed(arguments, ()), exact(arguments, ()))
        told = velm_kernels.explain("cross_attention", **arguments).splitlines()[0]
    assert bool(ran) == is_own and told.endswith("-> cpu") == is_own


def test_an_unknown_processor_gets_what_holds_everywhere(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    line = dataclasses.replace(processors.TABLE[-1])
    monkeypatch.setattr(processors, "rules", lambda: line)
    computed(drawn(1, 2, 100, 100, 16), QUERY_KEY_VALUE)
    assert not ran
    computed(drawn(1, 2, 160, 130, 128), QUERY_KEY_VALUE)
    computed(drawn(1, 4, 100, 100, 16, BFLOAT16), QUERY_KEY_VALUE)
    assert ran == ["attention_forward", "attention_backward"] * 2
