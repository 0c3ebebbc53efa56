"""gated_residual on every backend: numbers, unread rows, wanted gradients, torch features, bad arguments."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.attention.gated_residual import reference

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


@every_kernel
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


def test_keeps_x_only_for_the_gradient_of_gate() -> None:
    residual, x = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    for gate, expected in ((torch.randn(8), False), (torch.randn(8, requires_grad=True), True)):
        out = velm_kernels.gated_residual(residual, x, gate)
        node = out.grad_fn.next_functions[0][0]  # below the view
        assert any(tensor is not None and tensor.shape == x.shape for tensor in node.saved_tensors) is expected
