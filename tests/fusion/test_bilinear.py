from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import CPU_BACKENDS, CUDA_KERNELS, INTERPRETED, Backend, every_cpu_backend, every_kernel
from tests.numbers import assert_accurate
from velm_kernels import explain
from velm_kernels.backends import cpu, small
from velm_kernels.fusion import Bilinear, bilinear
from velm_kernels.fusion.bilinear import reference, rule
from velm_kernels.fusion.bilinear import torch as by_torch
from velm_kernels.products import use_product

NAMES = ("x", "y", "weight", "bias")


def _inputs(rows, dx, dy, out, dtype, scale=1.0, regions=None, seed=0):
    """Sums of different sizes for every element, at one of several scales."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    y = randn(rows, dy) if regions is None else randn(rows, regions, dy)
    values = (scale * randn(rows, dx), scale * y, randn(out, dx, dy), randn(out))
    return [value.to(dtype) for value in values]


def _all_results(function, inputs, wanted=(True,) * 4, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(out.dtype)
    out.backward(grad)
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}}


def _check(backend, inputs, wanted=(True,) * 4, plain=F.bilinear, exact=F.bilinear):
    with backend.use():
        got = _all_results(bilinear, inputs, wanted)
    _compare(got, inputs, wanted, plain, exact)


def _compare(got, inputs, wanted=(True,) * 4, plain=F.bilinear, exact=F.bilinear):
    eager = _all_results(plain, inputs, wanted)
    precise = _all_results(exact, inputs, wanted, torch.float64)
    for name, value in got.items():
        assert (value is None) == (precise[name] is None), name
        if value is not None:
            assert value.is_contiguous() and value.dtype == inputs[0].dtype
            assert_accurate(name, value, eager[name], precise[name], inputs[0].dtype)


@every_kernel
@given(data=st.data())
def test_any_shape(backend, data):
    # CUDA's tiles are of 64; what crosses them costs time there, and has a test of its own.
    most = 20 if INTERPRETED else 35 if backend.name == "device_on_host" else 70
    sizes = [data.draw(st.integers(1, most), label=name) for name in ("rows", "dx", "dy")]
    out = data.draw(st.integers(1, 30), label="out")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = data.draw(st.sampled_from([0.1, 1.0, 4.0])) if dtype != torch.float16 else 0.5
    wanted = data.draw(st.tuples(*[st.booleans()] * 4).filter(any))
    _check(backend, _inputs(*sizes, out, dtype, scale), wanted)


@every_cpu_backend
@pytest.mark.parametrize(
    "sizes",
    [
        (1100, 14, 13, 5),  # more rows than are summed at a time
        (40, 13, 800, 3),  # y in pieces, few outputs
        (9, 3, 500, 530),  # outputs in pieces
        (40, 17, 34, 70),  # rows of several outputs in a tile, columns past whole vectors
        (3, 70, 1, 2),
        (3, 1, 70, 1),
    ],
)
def test_shapes_that_are_cut(backend, sizes):
    _check(backend, _inputs(*sizes, torch.float32))


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((130, 37, 66, 3), torch.bfloat16),  # rows in more pieces than there is room for; i in parts
        ((70, 20, 131, 67), torch.float16),  # y and its gradient in pieces, outputs in tiles; odd rows
        ((33, 21, 68, 40), torch.float32),
        ((66, 9, 3, 130), torch.float32),  # the sum over outputs in pieces
    ],
)
def test_shapes_that_cuda_cuts(backend, sizes, dtype):
    _check(backend, _inputs(*sizes, dtype))


def _repeated(x, y, weight, bias):
    return F.bilinear(x[:, None].expand(-1, y.shape[1], -1), y, weight, bias)


@pytest.mark.parametrize("wanted", [(True, True, True, True), (True, False, False, False), (False, True, False, True)])
def test_by_torch_some_outputs_at_a_time(wanted, monkeypatch):
    monkeypatch.setattr(by_torch, "WORKSPACE", 3 * 17 * 20)
    backend = Backend("torch")
    for dtype in (torch.float32, torch.bfloat16):
        _check(backend, _inputs(3, 20, 17, 7, dtype, regions=5), wanted, _repeated, _repeated)
    _check(backend, _inputs(3, 20, 17, 7, torch.float32), wanted)


@pytest.mark.parametrize(
    ("x", "y", "leading"),
    [
        ((4,), (5,), ()),
        ((2, 3, 4), (2, 3, 5), (2, 3)),
        ((2, 3, 4), (3, 5), (2, 3)),
        ((2, 1, 4), (2, 3, 5), (2, 3)),
        ((2, 3, 4), (2, 1, 5), (2, 3)),
        ((4,), (2, 3, 5), (2, 3)),
        ((2, 4), (2, 3, 5), (2, 3)),
        ((7, 1, 1, 4), (2, 3, 5), (7, 2, 3)),
        ((1, 4), (1, 1, 5), (1, 1)),
    ],
)
def test_leading_dimensions(x, y, leading):
    x, y, weight = torch.randn(x).double(), torch.randn(y).double(), torch.randn(6, 4, 5).double()
    out = bilinear(x, y, weight)
    rows = x[:, None] if x.dim() == 2 and y.dim() == 3 and x.shape[0] == y.shape[0] else x
    expected = torch.einsum("...i,kij,...j->...k", rows, weight, y)
    assert out.shape == (*leading, 6)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, *CUDA_KERNELS], ids=str)
def test_other_rows_and_what_lies_behind_them_change_nothing(backend):
    """A row that is not finite stays alone, and memory past the end of a row is not read."""
    x, y, weight, _ = _inputs(40, 13, 17, 5, torch.float32)
    around = [torch.full((*value.shape[:-1], value.shape[-1] + 3), torch.nan) for value in (x, y, weight)]
    for whole, value in zip(around, (x, y, weight), strict=True):
        whole[..., :-3] = value
    *leaves, strided = (whole[..., :-3].detach() for whole in around)
    leaves[0][33] = torch.inf
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with backend.use():
        clean = _all_results(lambda *values: bilinear(*values), [x, y, weight, torch.zeros(5)])
        out = bilinear(*leaves, strided)
        grads = torch.autograd.grad(out, leaves, torch.randn(40, 5, generator=torch.Generator().manual_seed(1)))
    others = torch.arange(40) != 33
    for name, value in zip(("out", "x", "y"), (out, *grads), strict=True):
        assert torch.equal(value[others], clean[name][others]), name


def test_operations_are_counted():
    x, y, weight, _ = (value.requires_grad_() for value in _inputs(5, 6, 7, 3, torch.float32))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        bilinear(x, y, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 6 * 7 * 3
    repeated = _inputs(5, 6, 7, 3, torch.float32, regions=9)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        bilinear(*repeated)
    assert counter.get_total_flops() == 2 * 5 * 3 * 7 * (6 + 9)


def test_module_takes_the_place_of_torchs():
    torch.manual_seed(0)
    theirs = torch.nn.Bilinear(6, 7, 3)
    torch.manual_seed(0)
    ours = Bilinear(6, 7, 3)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 7)
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert ours(torch.randn(2, 6), torch.randn(2, 5, 7)).shape == (2, 5, 3)
    assert Bilinear(6, 7, 3, bias=False).bias is None


def test_written_meaning():
    x, y, weight, bias = (value.double() for value in _inputs(4, 5, 6, 3, torch.float32))
    torch.testing.assert_close(reference.bilinear(x, y, weight, bias), F.bilinear(x, y, weight, bias))


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_small_outer_products_are_formed(leading, monkeypatch):
    monkeypatch.setattr(small, "enabled", True)
    x, y, weight, bias = _inputs(6, 8, 9, 3, torch.float32)
    inputs = (x.view(*leading, 8), y.view(*leading, 9), weight, bias)
    assert rule.plain(*inputs) is not None
    for stranger in (x[:, None], x.double(), x[:, :-1], x.half()):
        assert rule.plain(stranger, y, weight, bias) is None
    many = torch.ones(rule.OUTER // (8 * 9) + 1, 1)
    assert rule.plain(many.expand(-1, 8), many.expand(-1, 9), weight, bias) is None
    with use_product("velm"):
        assert rule.plain(*inputs) is None
    got, expected = _all_results(bilinear, inputs), _all_results(F.bilinear, inputs, dtype=torch.float64)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-4)


@every_cpu_backend
def test_torchs_forward_of_few_rows_has_the_gradients_of_the_operator(backend):
    inputs = _inputs(3, 256, 256, 5, torch.float32)
    with cpu.use_isa(backend.isa):
        assert "bilinear -> torch" in explain("bilinear", *inputs)
        _compare(_all_results(bilinear, inputs), inputs)
