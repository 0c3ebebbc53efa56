from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.fusion import factorized_pool
from velm_kernels.fusion.dropout_residual.reference import kept
from velm_kernels.fusion.factorized_pool import reference

SEED = 0x123456789ABCDEF0


def _inputs(leading, dim, factor, layout, dtype, scale=1.0, seed=0):
    """Products of one sign in every sum: where they cancel, any way to add them is inexact, and its root more so."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * (torch.randn(*leading, factor * dim, generator=generator).abs() + 0.1) for _ in range(2))
    sign = torch.randint(0, 2, (*leading, dim), generator=generator) * 2.0 - 1
    sign = sign.repeat_interleave(factor, -1) if layout == "inner" else sign.repeat(*[1] * len(leading), factor)
    return [a.to(dtype), (b * sign).to(dtype)]


def _eager(a, b, factor, layout, power_norm, l2_norm, dropout_p, seed=None):
    return reference.factorized_pool(
        a, b, factor, layout, power_norm, l2_norm, dropout_p, None if seed is None else torch.tensor(seed)
    )


def _all_results(function, inputs, options, dtype=None, wanted=(True, True)):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    out = function(*leaves, *options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(out.dtype)
    out.backward(grad)
    return {"out": out.detach(), "a": leaves[0].grad, "b": leaves[1].grad}


@every_kernel
@given(data=st.data())
def test_any_shape(backend, data):
    small = INTERPRETED or backend.name == "device_on_host"
    factor = data.draw(st.integers(1, 6), label="factor")
    dim = data.draw(st.integers(1, 15 if small else 90), label="dim")
    leading = data.draw(st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]), label="leading")
    layout = data.draw(st.sampled_from(["inner", "outer"]))
    power_norm, l2_norm = data.draw(st.booleans(), label="power"), data.draw(st.booleans(), label="l2")
    dropout_p = data.draw(st.sampled_from([0.0, 0.3]), label="dropout_p")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = data.draw(st.sampled_from([0.2, 1.0, 3.0]))
    wanted = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    inputs = _inputs(leading, dim, factor, layout, dtype, scale)
    options = (factor, layout, power_norm, l2_norm, dropout_p, SEED if dropout_p else None)
    with backend.use():
        got = _all_results(factorized_pool, inputs, options, wanted=wanted)
    # The gradient as written, because autograd's has 0/0 where dropout leaves a sum of 0; and not in half precision,
    # where the least norm is 0.
    results = []
    for precision in (torch.float64, torch.float32):
        values, seed = [x.to(precision) for x in inputs], torch.tensor(SEED) if dropout_p else None
        out = reference.factorized_pool(*values, *options[:-1], seed)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(precision)
        grads = reference.factorized_pool_gradient(grad, *values, *options[:-1], seed)
        results.append(dict(zip(("out", "a", "b"), (out, *grads), strict=True)))
    exact, plain = results
    for name, value in got.items():
        assert (value is None) == (name != "out" and not wanted["ab".index(name)]), name
        if value is not None:
            assert_accurate(name, value, plain[name].to(dtype), exact[name], dtype)


@pytest.mark.parametrize("layout", ["inner", "outer"])
@pytest.mark.parametrize("power_norm", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_gradient_as_written_is_that_of_the_meaning(layout, power_norm, l2_norm):
    inputs = _inputs((4,), 30, 3, layout, torch.float64)
    options = (3, layout, power_norm, l2_norm, 0.2, SEED)
    expected = _all_results(_eager, inputs, options)
    got = _all_results(factorized_pool, inputs, options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_gradient_of_root_and_norm_needs_the_output_alone():
    """``dz = (g - u (u . g)) / (2 n^2 |u|)`` with ``n^2 = sum |z|``."""
    z, grad = torch.randn(3, 20).double(), torch.randn(3, 20).double()
    one = torch.ones_like(z).requires_grad_()
    factorized_pool(one, z, power_norm=True, l2_norm=True).backward(grad)
    u, n2 = factorized_pool(z, torch.ones_like(z), power_norm=True, l2_norm=True), z.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(one.grad, (grad - u * (u * grad).sum(-1, keepdim=True)) / (2 * n2 * u.abs()) * z)


@every_backend_with_cuda
@pytest.mark.parametrize("power_norm", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_finite_where_the_root_is_steep(backend, power_norm, l2_norm):
    a = torch.ones(4, 40).requires_grad_()
    b = torch.ones(4, 40)
    b[0] = 0.0  # a row of zeros
    b[1, ::2] = 0.0
    b[2] = 1e-38
    b[3, 5] = 1e-42
    b.requires_grad_()
    with backend.use():
        out = factorized_pool(a, b, 2, "outer", power_norm, l2_norm)
        out.backward(torch.ones_like(out))
    for value in (out, a.grad, b.grad):
        assert value.isfinite().all()
    if power_norm or l2_norm:
        assert (out[0] == 0).all() and (a.grad[0] == 0).all() and (b.grad[0] == 0).all()
    if power_norm:
        assert (b.grad[1, ::2] == 0).all() and (b.grad[3] != 0).any()


@every_backend_with_cuda
@pytest.mark.parametrize("dim", [30, 70])
def test_dropout_drops_products_and_does_not_read_them(backend, dim):
    keep = kept(torch.tensor(SEED), 6, dim, 0.5)
    a = torch.where(keep, 1.0, torch.inf).view(2, 3, dim).requires_grad_()
    b = torch.ones(2, 3, dim).requires_grad_()
    with backend.use():
        out = factorized_pool(a, b, dropout_p=0.5, seed=SEED)
        out.sum().backward()
    for value in (out, a.grad, b.grad):
        assert torch.equal(value.detach().view(6, dim), 2.0 * keep)
