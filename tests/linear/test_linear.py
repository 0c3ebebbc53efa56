"""velm_kernels.linear against float64, forward and backward, on every backend and with either product on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import velm_kernels
from tests.conftest import BACKENDS, ONCE, TRITON, Backend, first_and_last_cpu_backend
from tests.numbers import assert_accurate
from velm_kernels.linear.linear import reference
from velm_kernels.products import PRODUCTS, use_product

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "tanh": torch.tanh,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")

# The reference has no choice of product; the CPU libraries have two.
ROUTES = [
    (backend, product)
    for backend in [*BACKENDS, *TRITON]
    for product in (PRODUCTS if backend.name == "cpu" else ("torch",))
]
every_route = pytest.mark.parametrize(("backend", "product"), ROUTES, ids=lambda value: str(value))
every_route_once = pytest.mark.parametrize(
    ("backend", "product"), [route for route in ROUTES if route[0] in [*ONCE, *TRITON]], ids=lambda value: str(value)
)


@contextlib.contextmanager
def route(backend: Backend, product: str):
    with backend.use(), use_product(product):
        yield


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values in other memory ("expanded": the first row everywhere)."""
    if layout == "transposed":
        return value.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "sliced":
        around = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 3), torch.nan, dtype=value.dtype)
        around[..., 1 : value.shape[-1] + 1] = value
        return around[..., 1 : value.shape[-1] + 1]
    if layout == "expanded" and value.shape[-2]:
        return value[..., :1, :].expand(value.shape)
    return value


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    out = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def eager_in_steps(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """As written by hand: in half precision the product is rounded before the bias is added."""
    z = x @ weight.T
    out = ACTIVATIONS[activation](z if bias is None else z + bias)
    return out if residual is None else out + residual


def compare(
    inputs: tuple[Tensor | None, ...], activation: str | None, grad: Tensor, context: contextlib.AbstractContextManager
) -> None:
    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        # requires_grad_ on the given tensors themselves keeps their strides
        leaves = [value if value is None or value.dtype == dtype else value.to(dtype) for value in inputs]
        leaves = [None if value is None else value.detach().requires_grad_() for value in leaves]
        x, weight, bias, residual = leaves
        out = function(x, weight, bias, activation, residual)
        grads = torch.autograd.grad(out, [value for value in leaves if value is not None], grad.to(dtype))
        return [out.detach(), *grads]

    dtype = grad.dtype
    with context:
        got = run(velm_kernels.linear, dtype)
    plain = zip(run(eager, dtype), run(eager_in_steps, dtype), strict=True)
    exact = run(eager, torch.float64)
    names = ["out"] + [
        f"grad_{n}" for n, v in zip(("x", "weight", "bias", "residual"), inputs, strict=True) if v is not None
    ]
    for name, ours, torchs, truth in zip(names, got, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_accurate(name, ours, torchs, truth)


def random_inputs(
    leading: tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    residual: bool = False,
    scale: float = 1.0,
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    seed: int = 0,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(shape, generator=generator)).to(dtype)

    x = laid_out(draw(*leading, in_features, factor=scale), layouts[0] if leading else "contiguous")
    weight = laid_out(draw(out_features, in_features, factor=max(in_features, 1) ** -0.5), layouts[1])
    extra = laid_out(draw(*leading, out_features), layouts[2] if leading else "contiguous") if residual else None
    return (x, weight, draw(out_features) if bias else None, extra), draw(*leading, out_features)


@every_route
@given(data=st.data())
def test_against_float64(backend: Backend, product: str, data: st.DataObject) -> None:
    size = st.integers(1, 70)
    leading = data.draw(st.lists(st.integers(1, 12), max_size=2).map(tuple), "leading")
    inputs, grad = random_inputs(
        leading,
        data.draw(size, "in_features"),
        data.draw(size, "out_features"),
        data.draw(st.sampled_from(DTYPES), "dtype"),
        bias=data.draw(st.booleans(), "bias"),
        residual=data.draw(st.booleans(), "residual"),
        scale=data.draw(st.sampled_from((0.02, 1.0, 6.0)), "scale"),
        layouts=data.draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3), "layouts"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    compare(inputs, data.draw(st.sampled_from(list(ACTIVATIONS)), "activation"), grad, route(backend, product))


# Past one tile, block, block of depth and slab of rows in each dimension; odd, so that each has a rest.
LARGE = [(33, 401, 275), (131, 1601, 67), (2051, 35, 131), (4100, 9, 5), (97, 64, 529)]


@first_and_last_cpu_backend
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_rests(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, in_features, out_features = shape
    inputs, grad = random_inputs((rows,), in_features, out_features, dtype, residual=True)
    compare(inputs, "gelu", grad, route(backend, "velm"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: str | None) -> None:
    inputs, grad = random_inputs((7,), 5, 6, torch.float64, residual=True)
    compare(inputs, activation, grad, contextlib.nullcontext())
    z = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    y = reference.activate(z, activation or "")
    (expected,) = torch.autograd.grad(y.sum(), z)
    for dtype in (torch.float64, torch.bfloat16):
        of_value = reference.from_value(activation or "", dtype)
        saved = (y if of_value else z).detach()
        given = reference.activation_gradient(torch.ones_like(z), saved, activation or "", of_value)
        torch.testing.assert_close(given, expected)


@every_route_once
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (40, 0, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_zero_sizes(backend: Backend, product: str, shape: tuple[int, int, int], activation: str | None) -> None:
    rows, in_features, out_features = shape
    inputs, grad = random_inputs((rows,), in_features, out_features, torch.float32, residual=True)
    compare(inputs, activation, grad, route(backend, product))


@every_route
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(backend: Backend, product: str, activation: str | None) -> None:
    """Large, subnormal and NaN pre-activations: as in float64, and gradients finite where those are."""
    z = torch.tensor([-1e4, -90.0, -8.0, -1e-40, 0.0, 1e-40, 8.0, 90.0, 1e4, torch.nan])
    double = z.double().requires_grad_()
    expected = ACTIVATIONS[activation](double)
    (expected_grad,) = torch.autograd.grad(expected.sum(), double)
    x = z[:, None].requires_grad_()
    with route(backend, product):
        out = velm_kernels.linear(x, torch.ones(1, 1), None, activation)
        (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=1e-5, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(grad[:, 0].double(), expected_grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@every_route
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_activations_that_are_closed_let_nothing_through(backend: Backend, product: str, activation: str) -> None:
    """However large the numbers are that their slope, 0, is multiplied with."""
    z = torch.tensor([-20.0, -1e20, -1e30, -1e38]) - 180.0
    x = z[:, None].requires_grad_()
    with route(backend, product):
        out = velm_kernels.linear(x, torch.ones(1, 1), None, activation)
        # relu selects, others multiply with 0.
        upstream = torch.full_like(out, torch.inf if activation == "relu" else 1e38)
        (grad,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(out[:, 0], torch.full((4,), -1.0 if activation == "tanh" else 0.0))
    torch.testing.assert_close(grad[:, 0], torch.zeros(4))


@every_route
def test_gradients_only_where_wanted(backend: Backend, product: str) -> None:
    inputs, grad = random_inputs((40,), 9, 11, torch.float32, residual=True)
    with route(backend, product):
        leaves = [value.clone().requires_grad_() for value in inputs]
        full = torch.autograd.grad(velm_kernels.linear(*leaves[:3], "silu", leaves[3]), leaves, grad)
        for mask in range(1, 16):
            chosen = [value.clone().requires_grad_(bool(mask >> i & 1)) for i, value in enumerate(inputs)]
            out = velm_kernels.linear(*chosen[:3], "silu", chosen[3])
            wanted = [value for value in chosen if value.requires_grad]
            expected = [value for i, value in enumerate(full) if mask >> i & 1]
            for got, same in zip(torch.autograd.grad(out, wanted, grad), expected, strict=True):
                torch.testing.assert_close(got, same)
        for bit in range(3):
            results = torch.ops.velm.linear_backward(
                grad,
                inputs[0] if bit == 1 else None,
                inputs[1] if bit == 0 else None,
                *(None, None, "", "", 1 << bit, backend.name),
            )
            assert [result.shape == (0,) for result in results] == [i != bit for i in range(3)]


@first_and_last_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(backend: Backend, dtype: torch.dtype) -> None:
    inputs, grad = random_inputs((2500,), 70, 130, dtype, residual=True)
    few, few_grad = random_inputs((7,), 70, 900, dtype)

    def results() -> list[Tensor]:
        found = []
        for values, upstream in ((inputs, grad), (few, few_grad)):
            leaves = [None if value is None else value.detach().requires_grad_() for value in values]
            out = velm_kernels.linear(*leaves[:3], "gelu", leaves[3])
            found += [out, *torch.autograd.grad(out, [value for value in leaves if value is not None], upstream)]
        return found

    with route(backend, "velm"):
        torch.set_num_threads(1)
        one = results()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))


@every_route
@pytest.mark.parametrize(("activation", "residual", "kept"), [
    (None, True, 0), ("relu", False, 0), ("tanh", False, 0), ("tanh", True, 1), ("relu", True, 1), ("gelu", False, 1),
    ("silu", True, 1),
])  # fmt: skip
def test_what_is_saved(backend: Backend, product: str, activation: str | None, residual: bool, kept: int) -> None:
    inputs, _ = random_inputs((40,), 8, 12, torch.float32, residual=residual)
    leaves = [None if value is None else value.requires_grad_() for value in inputs]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with route(backend, product), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = velm_kernels.linear(*leaves[:3], activation, leaves[3])
    own = {value.data_ptr() for value in leaves if value is not None} | {out.data_ptr()}
    assert sum(size for pointer, size in saved.items() if pointer not in own) == kept * out.nbytes
