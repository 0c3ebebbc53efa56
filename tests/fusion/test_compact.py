from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_backend_once, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.fusion import MCB, Sketch, compact_bilinear, make_sketch
from velm_kernels.fusion.compact_bilinear import reference


def _randn(seed, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _results(function, x, y, wanted=(True, True), dtype=None):
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_(want) for v, want in zip((x, y), wanted, strict=True)]
    out = function(*leaves)
    grad = _randn(1, *out.shape).to(x.dtype).to(out.dtype)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _check(backend, x, y, hashes, dim, wanted=(True, True)):
    def ours(x, y):
        with backend.use():
            return compact_bilinear(x, y, *hashes, dim)

    def meaning(x, y):
        x, y = (v[:, None] if v.dim() < most else v for v in (x, y))
        return reference.compact_bilinear(x, y, *hashes, dim)

    most = max(x.dim(), y.dim())
    got = _results(ours, x, y, wanted)
    plain = _results(meaning, x, y, wanted, torch.float32)
    exact = _results(meaning, x, y, wanted, torch.float64)
    for i, (value, rounded, expected) in enumerate(zip(got, plain, exact, strict=True)):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == x.dtype and value.is_contiguous()
            assert_accurate(f"result {i}", value, rounded.to(x.dtype), expected, x.dtype)


@every_kernel
@settings(max_examples=min(12, settings().max_examples))
@given(data=st.data())
def test_any_shape(backend, data):
    small = INTERPRETED or backend.name == "device_on_host"
    most = 40 if small else 300
    dx, dy, dim = (data.draw(st.integers(1, most), label=name) for name in ("dx", "dy", "dim"))
    batch = data.draw(st.integers(1, 3), label="batch")
    shapes = data.draw(
        st.sampled_from([((), ()), ((4,), (4,)), ((), (11,)), ((11,), ()), ((1,), (3,))]), label="regions"
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    wanted = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    hashes = make_sketch(dx, dim, seed=3), make_sketch(dy, dim, seed=4)
    if data.draw(st.booleans(), label="int32"):
        hashes = tuple(Sketch(index.int(), sign) for index, sign in hashes)
    x, y = _randn(0, batch, *shapes[0], dx).to(dtype), _randn(5, batch, *shapes[1], dy, scale=3.0).to(dtype)
    _check(backend, x, y, hashes, dim, wanted)


@pytest.mark.skipif(INTERPRETED, reason="rows are cut above the kernels")
@pytest.mark.parametrize("shapes", [((7,), (7,)), ((7,), ()), ((), (7,)), ((1,), (1,))])
@pytest.mark.parametrize("elements", [1, 33 * 3, 33 * 20])
@every_backend_once
def test_rows_in_pieces(backend, elements, shapes, monkeypatch):
    """Pieces of one region, of several regions of an entry, and of several entries, the last ones smaller."""
    monkeypatch.setattr(
        importlib.import_module("velm_kernels.fusion.compact_bilinear.composed"), "ELEMENTS_ON_CPU", elements
    )
    hashes = make_sketch(20, 33, seed=3), make_sketch(30, 33, seed=4)
    _check(backend, _randn(0, 5, *shapes[0], 20), _randn(1, 5, *shapes[1], 30), hashes, 33)


@every_backend_with_cuda
def test_is_the_sketch_of_the_outer_product(backend):
    """From the definition, without any transform; several features go to one bucket."""
    dim, dx, dy = 7, 12, 20
    (ix, sx), (iy, sy) = make_sketch(dx, dim, seed=0), make_sketch(dy, dim, seed=1)
    x, y = _randn(2, 3, dx), _randn(3, 3, dy)
    place = (ix[:, None] + iy[None, :]) % dim
    outer = x[:, :, None] * y[:, None, :] * sx[:, None] * sy[None, :]
    expected = torch.zeros(3, dim).index_add_(1, place.flatten(), outer.flatten(1))
    with backend.use():
        got = compact_bilinear(x, y, (ix, sx), (iy, sy), dim)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_is_unbiased():
    """``E <f(x, y), f(x', y')> = <x, x'> <y, y'>`` over random hashes."""
    generator = torch.Generator().manual_seed(0)
    x, y = _randn(1, 2, 6), _randn(2, 2, 5)
    products = []
    for _ in range(600):
        hashes = make_sketch(6, 16, generator=generator), make_sketch(5, 16, generator=generator)
        f = compact_bilinear(x, y, *hashes, 16)
        products.append(float(f[0] @ f[1]))
    products = torch.tensor(products)
    expected = float((x[0] @ x[1]) * (y[0] @ y[1]))
    error = float(products.std()) / len(products) ** 0.5
    assert error < 0.5 * abs(expected) and abs(float(products.mean()) - expected) < 4 * error


def _published(module, x):
    """What the published module computed, on rows and without dropout, with transforms of full length."""
    spectra = []
    for value, hashes in zip(x, (module.mcb.sketch1, module.mcb.sketch2), strict=True):
        sketch = value.new_zeros(len(value), module.mm_dim)
        sketch.scatter_add_(1, hashes.h.expand(len(value), -1), value * hashes.s.to(value.dtype))
        spectra.append(torch.fft.fft(sketch))
    z = module.linear_out(torch.fft.ifft(spectra[0] * spectra[1]).real)
    return getattr(F, module.activ_output)(z) if module.activ_output else z


@pytest.mark.parametrize("activation", [None, "relu", "softplus"])
def test_module_equals_the_published_form(activation):
    torch.manual_seed(0)
    module = MCB([7, 9], 5, mm_dim=30, activ_output=activation, dropout_output=0.5).double().eval()
    x = [torch.randn(4, 7).double().requires_grad_(), torch.randn(4, 9).double().requires_grad_()]
    leaves = [*x, *module.parameters()]
    got, expected = module(x), _published(module, x)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)
    regions = torch.randn(4, 3, 9).double()
    rows = module([x[0][:, None].expand(4, 3, 7).reshape(12, 7), regions.reshape(12, 9)])
    torch.testing.assert_close(module([x[0], regions]), rows.view(4, 3, 5))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_hashes_of_the_module_are_saved_under_their_published_names():
    module, other = MCB([7, 9], 5, mm_dim=30), MCB([7, 9], 5, mm_dim=30)
    state = module.state_dict()
    described = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    assert described == {
        "mcb.sketch1.h": ((7,), torch.int64),
        "mcb.sketch1.s": ((7,), torch.float32),
        "mcb.sketch2.h": ((9,), torch.int64),
        "mcb.sketch2.s": ((9,), torch.float32),
        "linear_out.weight": ((5, 30), torch.float32),
        "linear_out.bias": ((5,), torch.float32),
    }
    x = [torch.randn(4, 7), torch.randn(4, 9)]
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))
    # Indices stay what they are in any dtype of the module.
    assert module.bfloat16()([v.bfloat16() for v in x]).dtype == torch.bfloat16


def test_hashes():
    a, b = make_sketch(500, 40, seed=7), make_sketch(500, 40, seed=7)
    assert torch.equal(a.bucket, b.bucket) and torch.equal(a.sign, b.sign)
    assert a.bucket.dtype == torch.int64 and set(a.bucket.tolist()) == set(range(40))
    assert set(a.sign.tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match="dim: expected at least 1, given 0"):
        make_sketch(3, 0)
