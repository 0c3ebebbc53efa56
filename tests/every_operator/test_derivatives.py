"""Derivatives of every operator that no kernel computes: of gradients, forward-mode ones, the transforms of torch.func.

Each is compared with the same derivative, in float64, of the operator's written meaning.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import velm_kernels
from tests.conftest import Backend, every_backend_once
from tests.operators import CALLS, Arguments, Call
from velm_kernels import backends
from velm_kernels.backends import NoBackendError, small
from velm_kernels.linear.linear import reference as linear_reference
from velm_kernels.linear.linear.reference import ACTIVATIONS
from velm_kernels.products import use_product

pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. .* runs on plain torch:UserWarning")


@pytest.fixture(autouse=True)
def _as_shipped(_operators_at_any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no backend is asked for, small calls go to torch's own form, which has to have these derivatives too."""
    monkeypatch.setattr(small, "enabled", True)


every_call = pytest.mark.parametrize("call", CALLS, ids=str)
Function = Callable[..., list[Tensor]]


def floats(results: Any) -> list[Tensor]:
    """The floating results, with 0 for the -inf of rows that see nothing."""
    found = [leaf for leaf in tree_flatten(results)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [torch.where(result.isinf(), 0.0, result) for result in found]


def of_leaves(call: Call, arguments: Arguments) -> Function:
    """The operator as a function of the tensors that have a gradient."""
    return lambda *leaves: floats(call.function(**call.with_leaves(arguments, list(leaves))))


def exact_of_leaves(call: Call, changes: Arguments | None = None) -> Function:
    arguments = call.arguments(torch.float64) | (changes or {})
    return lambda *leaves: floats(call.exact(call.with_leaves(arguments, list(leaves))))


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def normal_like(tensors: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors]


def assert_close(got: Sequence[Tensor], exact: Sequence[Tensor], limit: float = 1e-5) -> None:
    """Each of ``got`` by its norm; where the exact one vanishes, beside the largest of them."""
    assert len(got) == len(exact) > 0
    largest = max(float(value.detach().norm()) for value in exact)
    for number, (ours, theirs) in enumerate(zip(got, exact, strict=True)):
        assert ours.shape == theirs.shape
        error = float((ours.detach().double() - theirs.detach()).norm())
        assert error <= limit * (float(theirs.detach().norm()) + 0.01 * largest) + 1e-12, (number, error, largest)


@contextlib.contextmanager
def served(backend: Backend) -> Iterator[None]:
    with backend.use():
        try:
            yield
        except NoBackendError as error:
            pytest.skip(str(error))


def penalty(function: Function, leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a function of gradients, with respect to what those came from: leaves, and gradients of results."""
    results = zip(function(*leaves), weights, strict=True)
    total = sum((result * weight).sum() for result, weight in results if result.requires_grad)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(total, wanted, create_graph=True, materialize_grads=True)
    loss = sum((gradient.sin() + gradient.square()).sum() for gradient in gradients)
    return list(torch.autograd.grad(loss, [*wanted, *weights], materialize_grads=True))


def assert_penalty(ours: Function, exact: Function, leaves: Sequence[Tensor]) -> None:
    weights = [weight.requires_grad_() for weight in normal_like(ours(*leaves))]
    assert_close(penalty(ours, leaves, weights), penalty(exact, doubles(leaves), doubles(weights)))


def some_wanted(tensors: Sequence[Tensor], wanted: Sequence[int] | None = None) -> list[Tensor]:
    return [tensor.clone().requires_grad_(wanted is None or place in wanted) for place, tensor in enumerate(tensors)]


@every_backend_once
@every_call
def test_gradients_of_gradients(backend: Backend, call: Call) -> None:
    arguments = call.arguments()
    with served(backend):
        leaves = some_wanted(call.leaves(arguments))
        assert_penalty(of_leaves(call, arguments), exact_of_leaves(call), leaves)


@every_call
def test_gradients_of_gradients_where_one_input_alone_has_one(call: Call) -> None:
    """Backward keeps only what the gradients that are wanted need."""
    arguments = call.arguments()
    leaves = call.leaves(arguments)
    for place in range(len(leaves)):
        assert_penalty(of_leaves(call, arguments), exact_of_leaves(call), some_wanted(leaves, [place]))


@pytest.mark.parametrize("activation", [name or None for name in ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True])
def test_activations(activation: str | None, residual: bool) -> None:
    """Backward keeps one tensor of the size of the result, which depends on x, weight and bias."""
    shapes = [(5, 12), (8, 12), (8,), (5, 8)][: 3 + residual]
    tensors = normal_like([torch.empty(shape) for shape in shapes])

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> list[Tensor]:
        return [velm_kernels.linear(x, weight, bias, activation, *others)]

    def exact(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> list[Tensor]:
        return [linear_reference.linear(x, weight, bias, activation or "", *others)]

    with velm_kernels.use_backend("cpu"):
        for wanted in ([0], [1], [2], [0, 2], [0, 1, 2, 3]):
            assert_penalty(ours, exact, some_wanted(tensors, wanted))


@pytest.mark.parametrize("name", ["cross_attention-everything", "cross_attention_varlen", "bidirectional_attention"])
def test_dropout_drops_the_same_again(name: str) -> None:
    call = next(call for call in CALLS if str(call) == name)
    # The written meaning of a packed call here is that of each sequence as the first one.
    sizes = {"sequences": 1} if "varlen" in name else {}
    changes = {"dropout_p": 0.3, "seed": 5}
    arguments = call.arguments(**sizes) | changes
    exact = exact_of_leaves(call, call.arguments(torch.float64, **sizes) | changes)
    assert_penalty(of_leaves(call, arguments), exact, some_wanted(call.leaves(arguments)))


def test_dropout_without_a_seed() -> None:
    """The mask that forward drew shows in the first derivative; second ones have to come from the same."""
    x, gate = torch.randn(40, 30), torch.randn(30, requires_grad=True)

    def dropped(gate: Tensor) -> Tensor:
        return velm_kernels.factorized_pool(x * gate, torch.ones(30), dropout_p=0.5)

    out = dropped(gate)
    (gradient,) = torch.autograd.grad(out.square().sum(), gate, create_graph=True)
    # sum (x gate keep / (1 - p))^2: its gradient is linear in the gate
    second = torch.autograd.grad(gradient.sum(), gate)[0]
    torch.testing.assert_close(second * gate, gradient)


@pytest.mark.parametrize("product", ["velm", "torch"])
def test_sizes_at_which_rules_take_kernels(product: str) -> None:
    """Small calls may go to torch, whose second derivatives were never in question."""
    sizes = {
        "bilinear": {"batch": 40, "dx": 24, "dy": 20, "out": 18},
        "linear": {"rows": 40, "features": 24},
        "linear-gelu": {"rows": 40, "features": 24},
    }
    for call in CALLS:
        if str(call) in sizes:
            with use_product(product):
                arguments = call.arguments(**sizes[str(call)])
                exact = exact_of_leaves(call, call.arguments(torch.float64, **sizes[str(call)]))
                assert_penalty(of_leaves(call, arguments), exact, some_wanted(call.leaves(arguments)))


def test_one_tensor_for_several_arguments() -> None:
    def ours(x: Tensor) -> list[Tensor]:
        return [velm_kernels.cross_attention(x, x, x)]

    def exact(x: Tensor) -> list[Tensor]:
        return [torch.nn.functional.scaled_dot_product_attention(x, x, x)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_penalty(ours, exact, some_wanted(normal_like([torch.empty(1, 2, 5, 8)])))


@every_call
def test_in_float64_by_differences(call: Call) -> None:
    """Against nothing but differences of values, once and twice, in both modes and for gradients in batches."""
    arguments = call.arguments(torch.float64, **({"batch": 1} if "batch" in call.sizes else {}))
    leaves = some_wanted(call.leaves(arguments))
    function = of_leaves(call, arguments)
    differentiable = [place for place, result in enumerate(function(*leaves)) if result.requires_grad]

    def checked(*leaves: Tensor) -> tuple[Tensor, ...]:
        results = function(*leaves)
        return tuple(results[place] for place in differentiable)

    assert torch.autograd.gradcheck(checked, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(checked, leaves, fast_mode=True)


@every_backend_once
@every_call
def test_forward_mode(backend: Backend, call: Call) -> None:
    arguments = call.arguments()
    leaves = call.leaves(arguments)
    tangents = normal_like(leaves)
    function = of_leaves(call, arguments)
    exact = torch.func.jvp(exact_of_leaves(call), tuple(doubles(leaves)), tuple(doubles(tangents)))
    with served(backend):
        got = torch.func.jvp(function, tuple(leaves), tuple(tangents))
        with forward_ad.dual_level(), torch.no_grad():
            duals = [forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents, strict=True)]
            by_duals = [forward_ad.unpack_dual(result).tangent for result in function(*duals)]
    assert_close(got[0], exact[0])
    assert_close(got[1], exact[1])
    for ours, theirs in zip(by_duals, got[1], strict=True):
        assert not theirs.any() if ours is None else torch.equal(ours, theirs)


def test_forward_mode_through_a_graph_made_outside_of_it() -> None:
    x, weight = torch.randn(5, 12), torch.randn(5, 12)
    gate = torch.randn(12, requires_grad=True)
    out = velm_kernels.gated_residual(x, x, gate)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, 2 * weight)
        (gradient,) = torch.autograd.grad(out, gate, dual)
        primal, tangent = forward_ad.unpack_dual(gradient)
    torch.testing.assert_close(tangent, 2 * primal)


def loss(function: Function) -> Callable[..., Tensor]:
    """A sum that no normalisation makes constant."""
    return lambda *leaves: sum((result.square() * 0.5 + result.sin()).sum() for result in function(*leaves))  # type: ignore[return-value]


def several(leaves: Sequence[Tensor], dim: int, count: int = 3) -> list[Tensor]:
    return [torch.stack([leaf * (1 + 0.1 * number) for number in range(count)], dim) for leaf in leaves]


def each(function: Callable[..., Any], batches: Sequence[Tensor], dim: int) -> list[Tensor]:
    """What vmap means."""
    calls = [function(*(batch.select(dim, number) for batch in batches)) for number in range(batches[0].shape[dim])]
    return [torch.stack(parts) for parts in zip(*calls, strict=True)]


def gradients(function: Function, leaves: Sequence[Tensor]) -> Any:
    return torch.func.grad(loss(function), tuple(range(len(leaves))))


def by_grad(function: Function, leaves: list[Tensor]) -> Any:
    return gradients(function, leaves)(*leaves)


def by_vjp(function: Function, leaves: list[Tensor]) -> Any:
    results, backward = torch.func.vjp(function, *leaves)
    return backward([result.detach().cos() for result in results])


def by_jacrev(function: Function, leaves: list[Tensor]) -> Any:
    return [torch.func.jacrev(lambda leaf: function(leaf, *leaves[1:])[0])(leaves[0])]


def by_jacfwd(function: Function, leaves: list[Tensor]) -> Any:
    return [torch.func.jacfwd(lambda leaf: function(leaf, *leaves[1:])[0])(leaves[0])]


def by_hessian(function: Function, leaves: list[Tensor]) -> Any:
    return [torch.func.hessian(lambda leaf: loss(function)(leaf, *leaves[1:]))(leaves[0])]


def by_grad_of_vmap(function: Function, leaves: list[Tensor]) -> Any:
    return by_grad(torch.func.vmap(function), several(leaves, 0))


@pytest.mark.parametrize("way", [by_grad, by_vjp, by_jacrev, by_jacfwd, by_hessian, by_grad_of_vmap])
@every_call
def test_transforms(way: Callable[..., Any], call: Call) -> None:
    arguments = call.arguments()
    leaves = call.leaves(arguments)
    assert_close(way(of_leaves(call, arguments), leaves), way(exact_of_leaves(call), doubles(leaves)))


@pytest.mark.parametrize(
    "call", [call for call in CALLS if "attention" in str(call) or str(call) == "sigmoid_loss-labels"], ids=str
)
def test_linearize(call: Call) -> None:
    """What traces with values lets none of them decide what is computed, which attention's meaning looks at, and drops
    what is written in place, as the numbers of labels once were."""

    def linearized(function: Function, leaves: list[Tensor]) -> list[Tensor]:
        tangents = [leaf.cos() for leaf in leaves]
        return list(torch.func.linearize(lambda *given: tuple(function(*given)), *leaves)[1](*tangents))

    arguments = call.arguments()
    leaves = call.leaves(arguments)
    assert_close(linearized(of_leaves(call, arguments), leaves), linearized(exact_of_leaves(call), doubles(leaves)))


@every_call
def test_vmap(call: Call) -> None:
    arguments = call.arguments()
    leaves = call.leaves(arguments)
    ours, exact = of_leaves(call, arguments), exact_of_leaves(call)
    for dim in (0, -1):
        batches = several(leaves, dim)
        assert_close(torch.func.vmap(ours, in_dims=dim)(*batches), each(exact, doubles(batches), dim))
    # Gradients for each sample, the parameters the same for all.
    first, *others = several(leaves[:1], 0) + leaves[1:]
    of_samples = torch.func.vmap(gradients(ours, leaves), in_dims=(0, *[None] * len(others)))(first, *others)
    exact_others = doubles(others)
    assert_close(of_samples, each(lambda leaf: gradients(exact, leaves)(leaf, *exact_others), doubles([first]), 0))


def test_vmap_of_an_integer_argument() -> None:
    """The kernels are called once for each entry, and so are their checks."""
    x, lengths = torch.randn(3, 7, 4), torch.tensor([[1, 2, 7], [0, 3, 4]])
    got = torch.func.vmap(velm_kernels.masked_pool, in_dims=(None, 0))(x, lengths)
    torch.testing.assert_close(got, torch.stack([velm_kernels.masked_pool(x, row) for row in lengths]))
    with pytest.raises(ValueError, match="lengths: expected values from 0 to 7"):
        torch.func.vmap(velm_kernels.masked_pool, in_dims=(None, 0))(x, lengths + 3)
    bounds = torch.tensor([[0, 2, 7], [0, 5, 7]])
    query = torch.randn(7, 2, 8)

    def packed(bounds: Tensor) -> Tensor:
        return velm_kernels.cross_attention_varlen(query, query, query, bounds, bounds)

    assert torch.equal(torch.func.vmap(packed)(bounds), torch.stack([packed(row) for row in bounds]))
    x = torch.randn(7, 4)
    got = torch.func.vmap(torch.func.grad(lambda x, row: velm_kernels.segment_pool(x, row, "gem").sum()), (None, 0))(
        x, bounds
    )
    for ours, row in zip(got, bounds, strict=True):
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(
            ours, torch.autograd.grad(velm_kernels.segment_pool(leaf, row, "gem").sum(), leaf)[0]
        )


def test_vmap_and_randomness() -> None:
    x = torch.ones(4, 200)

    def dropped(x: Tensor) -> Tensor:
        return velm_kernels.dropout_residual(x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropped)(x)
    same = torch.func.vmap(dropped, randomness="same")(x)
    assert torch.equal(same, same[:1].expand(4, 200)) and (same == 0).any()
    different = torch.func.vmap(dropped, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_of_which_nobody_knows_where_they_begin(compiled: bool, is_causal: bool) -> None:
    """torch.vmap has several bounds at a time, torch.compile none."""
    query, key = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
    bounds, others = torch.tensor([[0, 2, 2, 7], [0, 5, 6, 7]]), torch.tensor([[0, 3, 5, 9], [0, 0, 4, 9]])
    ranges = torch.arange(7) % 2, torch.arange(7) % 2 + 2

    def packed(query: Tensor, bounds: Tensor, others: Tensor) -> Tensor:
        out, logsumexp = velm_kernels.cross_attention_varlen(
            query, key, key, bounds, others, key_ranges=ranges, is_causal=is_causal, softcap=3.0, dropout_p=0.3, seed=5,
            return_logsumexp=True,
        )  # fmt: skip
        return out.square().sum() + torch.where(logsumexp.isinf(), 0.0, logsumexp).sum()

    of_one = torch.func.grad(packed)
    if compiled:
        got = [torch.compile(of_one, backend="aot_eager")(query, *row) for row in zip(bounds, others, strict=True)]
    else:
        got = list(torch.func.vmap(of_one, (None, 0, 0))(query, bounds, others))
    for ours, *row in zip(got, bounds, others, strict=True):
        leaf = query.clone().requires_grad_()
        torch.testing.assert_close(ours, torch.autograd.grad(packed(leaf, *row), leaf)[0])


def test_a_module_through_functional_call() -> None:
    module = velm_kernels.CrossAttention(16, num_heads=2)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    parameters = dict(module.named_parameters())

    def training_loss(parameters: dict[str, Tensor], x: Tensor, memory: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, memory)).square().sum()

    of_samples = torch.func.vmap(torch.func.grad(training_loss), (None, 0, 0))(parameters, x[:, None], memory[:, None])
    for number in range(2):
        loss = module(x[number : number + 1], memory[number : number + 1]).square().sum()
        for name, expected in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            torch.testing.assert_close(of_samples[name][number], expected, rtol=1e-4, atol=1e-5)


def kernels(run: Callable[[], Any]) -> dict[str, int]:
    """How often ``run`` calls the operators of the CPU library."""
    with torch.profiler.profile() as profile:
        run()
    return {
        event.key.split("::")[1]: event.count for event in profile.key_averages() if event.key.startswith("velm_cpu")
    }


STEP = {"attention_forward": 1, "attention_backward": 1}


def training_step(query: Tensor, key: Tensor) -> Tensor:
    return velm_kernels.cross_attention(query, key, key).square().sum()


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (training_step, STEP),
        (torch.compile(training_step, fullgraph=True, dynamic=True, backend="aot_eager"), STEP),
        (lambda *leaves: checkpoint(training_step, *leaves, use_reentrant=False), STEP | {"attention_forward": 2}),
        (lambda *leaves: checkpoint(training_step, *leaves, use_reentrant=True), STEP | {"attention_forward": 2}),
    ],
    ids=["eager", "compiled", "checkpoint", "reentrant checkpoint"],
)
def test_a_training_step_runs_the_kernels(
    form: Callable[..., Tensor], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first of the reentrant checkpoint's calls records nothing, and would be torch's at this size.
    monkeypatch.setattr(small, "enabled", False)
    leaves = some_wanted(normal_like([torch.empty(2, 2, 5, 16), torch.empty(2, 2, 7, 16)]))
    form(*leaves).backward()
    with warnings.catch_warnings(action="error"):
        assert kernels(lambda: form(*leaves).backward()) == expected


def test_a_compiled_step_with_a_penalty_is_right_or_refused() -> None:
    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    leaves = some_wanted(normal_like([torch.empty(2, 2, 5, 16), torch.empty(2, 2, 7, 16)]))
    (gradient,) = torch.autograd.grad(compiled(*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_compiled_transforms() -> None:
    query = torch.randn(1, 2, 5, 16)

    def function(query: Tensor) -> Tensor:
        return torch.func.grad(lambda query: training_step(query, query))(query)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(query), function(query))


def test_what_nothing_differentiates_runs_the_kernels() -> None:
    """A frozen encoder inside of a transform."""
    query, key = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16)

    def scaled(factor: Tensor) -> Tensor:
        with velm_kernels.use_backend("cpu"):
            return (factor * velm_kernels.cross_attention(query, key, key)).sum()

    factor = torch.tensor(2.0)
    scaled(factor)
    assert kernels(lambda: torch.func.grad(scaled)(factor)) == {"attention_forward": 1}
    assert kernels(lambda: torch.func.jvp(scaled, (factor,), (factor,))) == {"attention_forward": 1}


def test_penalty_inside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic is not that of autocast. (That of a small call, which is torch's, is.)"""
    monkeypatch.setattr(small, "enabled", False)
    leaves = some_wanted(normal_like([torch.empty(2, 2, 5, 16), torch.empty(2, 2, 7, 16)]))

    found = []
    for enabled in (False, True):
        out = training_step(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (gradient,) = torch.autograd.grad(out, leaves[0], create_graph=True)
        found += [gradient, torch.autograd.grad(gradient.square().sum(), leaves[1])[0]]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.filterwarnings("default:velm_kernels. .* runs on plain torch:UserWarning")
def test_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(small, "enabled", False)
    x = torch.randn(5, 12, requires_grad=True)
    gate = torch.randn(12, requires_grad=True)

    def differentiate() -> None:
        out = velm_kernels.gated_residual(x, x, gate)
        torch.autograd.grad(out.sum(), gate, create_graph=True)
        torch.func.jvp(lambda x: velm_kernels.gated_residual(x, x, gate), (x.detach(),), (x.detach(),))
        torch.func.grad(lambda x: velm_kernels.gated_residual(x, x, gate).sum())(x.detach())

    with pytest.warns(UserWarning, match="velm_kernels: gated_residual runs on plain torch") as found:
        differentiate()
        differentiate()
    ours = [warning for warning in found if str(warning.message).startswith("velm_kernels: ")]
    said = [str(warning.message).split("(")[1] for warning in ours]
    assert [text.split(",")[0].split(" has")[0] for text in said] == [
        "a gradient that is differentiated again",
        "a forward-mode derivative",
        "a gradient under the transforms of torch.func",
    ]
    assert all(warning.filename == __file__ for warning in ours)


@every_call
def test_of_nothing(call: Call) -> None:
    for name in set(call.sizes) - set(call.not_zero):
        arguments = call.arguments(**{name: 0})
        leaves = some_wanted(call.leaves(arguments))
        function = of_leaves(call, arguments)
        total = sum(result.sum() for result in function(*leaves) if result.requires_grad)
        found = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        second = sum((gradient * leaf).sum() for gradient, leaf in zip(found, leaves, strict=True))
        assert all(
            gradient.isfinite().all() for gradient in torch.autograd.grad(second, leaves, materialize_grads=True)
        )
        plain = [leaf.detach() for leaf in leaves]
        assert all(tangent.isfinite().all() for tangent in torch.func.jvp(function, tuple(plain), tuple(plain))[1])
        assert all(gradient.isfinite().all() for gradient in by_grad(function, plain))


CHECKPOINTED = ["cross_attention-everything", "linear-gelu", "masked_pool-max", "masked_pool-gem", "weighted_sum"]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_third_derivatives_and_checkpointed_ones(name: str) -> None:
    call = next(call for call in CALLS if str(call) == name)
    arguments = call.arguments()
    plain = of_leaves(call, arguments)

    def checkpointed(*leaves: Tensor) -> list[Tensor]:
        return checkpoint(plain, *leaves, use_reentrant=False)

    def third(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
        found: Sequence[Tensor] = [result for result in function(*leaves) if result.requires_grad]
        for _ in range(2):
            total = sum((value.sin() + value.square()).mean() for value in found)
            found = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        total = sum(value.sin().mean() for value in found)
        return list(torch.autograd.grad(total, leaves, materialize_grads=True))

    leaves = some_wanted(call.leaves(arguments))
    exact = third(exact_of_leaves(call), doubles(leaves))
    assert_close(third(plain, leaves), exact)
    assert_close(third(checkpointed, leaves), exact)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_forward_mode(backend: str) -> None:
    """What torch.compile makes of a function enters a level of forward mode without saying so in forward_ad."""
    query, gate = torch.randn(1, 2, 5, 16), torch.randn(16)

    def function(query: Tensor) -> Tensor:
        def inner(query: Tensor) -> Tensor:
            return velm_kernels.gated_residual(query, velm_kernels.cross_attention(query, query, query), gate)

        return torch.func.jvp(inner, (query,), (query.cos(),))[1]

    torch._dynamo.reset()
    expected = function(query)
    assert expected.any()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=backend)(query), expected)


@pytest.mark.parametrize("name", ["cross_attention", "linear-gelu", "film", "weighted_sum", "masked_pool-mean"])
def test_small_calls_compile_to_the_operators(name: str) -> None:
    call = next(call for call in CALLS if str(call) == name)
    arguments = call.arguments()
    function, leaves = of_leaves(call, arguments), some_wanted(call.leaves(arguments))
    torch._dynamo.reset()
    compiled = torch.compile(loss(function), fullgraph=True, dynamic=True, backend="eager")
    exact = exact_of_leaves(call)
    exact_leaves = doubles(leaves)
    expected = torch.autograd.grad(loss(exact)(*exact_leaves), exact_leaves)
    assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
