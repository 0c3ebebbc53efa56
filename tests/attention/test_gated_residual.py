"""gated_residual on every backend: numbers, unread rows, wanted gradients, torch features, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_once, every_backend_with_cuda, every_cpu_backend
from tests.numbers import assert_accurate
from velm_kernels.attention.gated_residual import canonical, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "columns first":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], -2)[..., 0, :]
    return x.contiguous()


def run(function: Any, tensors: list[Tensor], row_mask: Tensor | None, upstream: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, row_mask)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    names = ("out", "grad_residual", "grad_x", "grad_gate")
    return dict(zip(names, [out.detach(), *grads], strict=True))


@every_backend_with_cuda
@given(
    leading=st.lists(st.integers(0, 40), max_size=3),
    dim=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    gate=st.sampled_from(["scalar", "one", "dim"]),
    mask_dims=st.none() | st.lists(st.booleans(), max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    layout=st.sampled_from(["contiguous", "columns first", "sliced"]),
    seed=st.integers(0, 2**16),
)
@example([70, 40], 1030, "dim", [True, True], (torch.float32,) * 3, 1.0, "contiguous", 0)
@example([70, 40], 1030, "scalar", [True, False], (torch.bfloat16,) * 3, 1.0, "contiguous", 0)
@example([0, 3], 5, "dim", None, (torch.float32,) * 3, 1.0, "contiguous", 0)
def test_numbers(
    backend: Backend,
    leading: list[int],
    dim: int,
    gate: str,
    mask_dims: list[bool] | None,
    dtypes: tuple[torch.dtype, ...],
    scale: float,
    layout: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gate_shape = {"scalar": (), "one": (1,), "dim": (dim,)}[gate]
    residual, x = randn(*leading, dim).to(dtypes[0]), (scale * randn(*leading, dim)).to(dtypes[1])
    tensors = [laid_out(residual, layout), laid_out(x, layout), randn(*gate_shape).to(dtypes[2])]
    upstream = randn(*leading, dim)
    row_mask = poison = None
    if mask_dims is not None:
        shape = [size if kept else 1 for size, kept in zip(reversed(leading), reversed(mask_dims))]
        row_mask = randn(*reversed(shape)) > -0.5
        poison = ~row_mask.expand(leading)
    exact = run(reference.gated_residual, [t.double() for t in tensors], row_mask, upstream)
    plain = run(reference.gated_residual, tensors, row_mask, upstream)
    given_tensors = [t.clone() for t in tensors]
    if poison is not None:
        given_tensors[1][poison] = torch.nan
    with backend.use():
        got = run(velm_kernels.gated_residual, given_tensors, row_mask, upstream)
    assert got["out"].dtype == torch.promote_types(*dtypes[:2]) and got["out"].is_contiguous()
    # A sum of terms that cancel is as inexact as its terms.
    terms = (upstream * tensors[1]).abs()
    floors = {"grad_gate": 0.1 * float(terms.sum() if gate != "dim" else terms.reshape(-1, dim).sum(0).norm())}
    for name, dtype in zip(got, (got["out"].dtype, *dtypes), strict=True):
        # The upstream gradient was rounded to out's dtype before any kernel saw it.
        coarser = max(dtype, got["out"].dtype, key=lambda d: torch.finfo(d).eps)
        assert_accurate(name, got[name], plain[name], exact[name], coarser, floor=floors.get(name, 0.0))
    if poison is not None:
        assert not got["grad_x"][poison].any()


@every_cpu_backend
@pytest.mark.parametrize("gate_shape", [(), (300,)], ids=str)
def test_same_bits_for_any_number_of_threads(backend: Backend, gate_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((5000, 300), (5000, 300), gate_shape)]
    upstream = torch.randn(5000, 300, generator=generator)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        with backend.use():
            results.append(run(velm_kernels.gated_residual, tensors, None, upstream))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@every_backend_with_cuda
def test_only_wanted_gradients(backend: Backend) -> None:
    tensors = [torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)]
    everything = run(velm_kernels.gated_residual, tensors, None, torch.ones(6, 8))
    for wanted, name in enumerate(("grad_residual", "grad_x", "grad_gate")):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        with backend.use():
            velm_kernels.gated_residual(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]
        torch.testing.assert_close(leaves[wanted].grad, everything[name])


def test_keeps_x_only_for_the_gradient_of_gate() -> None:
    residual, x = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    for gate, expected in ((torch.randn(8), False), (torch.randn(8, requires_grad=True), True)):
        out = velm_kernels.gated_residual(residual, x, gate)
        node = out.grad_fn.next_functions[0][0]  # below the view
        assert any(tensor is not None and tensor.shape == x.shape for tensor in node.saved_tensors) is expected


@every_backend_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_and_compile(backend: Backend, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 4, 6), (3, 4, 6), (6,))]
    row_mask = torch.tensor([True, False, True, True])

    def loss(*tensors: Tensor) -> Tensor:
        return velm_kernels.gated_residual(*tensors, row_mask).square().sum()

    with backend.use():
        torch.library.opcheck(
            torch.ops.velm.gated_residual_forward.default,
            (*canonical(*(t.detach().requires_grad_() for t in tensors), row_mask).values(), backend.name),
        )
        eager = torch.autograd.grad(loss(*tensors), tensors)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.equal(ours, theirs)


def test_float64_is_exact_to_float64() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,))]
    row_mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda *t: velm_kernels.gated_residual(*t, row_mask), tensors)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.randn(3, 4), torch.randn(3, 5), torch.randn(())),
            ValueError,
            r"x: expected .*\(3, 4\), given \(3, 5\)",
        ),
        ((torch.randn(3, 4), torch.randn(3, 4), torch.randn(3)), ValueError, r"gate: .*\(4,\), given \(3,\)"),
        ((torch.randn(()), torch.randn(()), torch.randn(())), ValueError, r"residual: .*given \(\)"),
        ((torch.ones(3, 4).int(), torch.ones(3, 4).int(), torch.randn(())), TypeError, "residual: .*torch.int32"),
        ((torch.randn(3, 4), [1.0], torch.randn(())), TypeError, "x: expected a tensor, given list"),
        (
            (torch.randn(3, 4), torch.randn(3, 4), torch.randn(()), torch.ones(3)),
            TypeError,
            "row_mask: .*torch.float32",
        ),
        (
            (torch.randn(3, 4), torch.randn(3, 4), torch.randn(()), torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"row_mask: .*\(3,\), given \(4,\)",
        ),
        (
            (torch.randn(3, 4), torch.empty(3, 4, device="meta"), torch.randn(())),
            ValueError,
            "x: expected device cpu like residual, given meta",
        ),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        velm_kernels.gated_residual(*arguments)
