from __future__ import annotations

import pytest
import torch

from tests.numbers import assert_accurate
from velm_kernels.fusion import outer_product_fusion, reference


def _results(function, x, y, dtype=None):
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in (x, y)]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regions", [(), (1,), (300,)])
def test_results_and_gradients(regions, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(3, *regions, 17).to(dtype), (3 * torch.randn(3, *regions, 33)).to(dtype)
    got = _results(outer_product_fusion, x, y)
    assert got[0].is_contiguous() and got[0].shape == (3, 17, 33)
    plain = [value.to(dtype) for value in _results(reference.outer_product_fusion, x, y, torch.float32)]
    exact = _results(reference.outer_product_fusion, x, y, torch.float64)
    for i, (value, rounded, expected) in enumerate(zip(got, plain, exact, strict=True)):
        assert value.dtype == dtype
        assert_accurate(f"result {i}", value, rounded, expected)


def test_padded_regions_are_not_read():
    torch.manual_seed(0)
    x, y = torch.randn(4, 9, 5), torch.randn(4, 9, 6)
    lengths, mask = torch.tensor([9, 4, 0, 1]), torch.rand(4, 9) > 0.4
    live = mask & (torch.arange(9) < lengths[:, None])
    expected = _results(lambda x, y: reference.outer_product_fusion(x, y, live), x, y)
    poisoned = [value.masked_fill(~live[..., None], torch.nan) for value in (x, y)]
    got = _results(lambda x, y: outer_product_fusion(x, y, lengths=lengths, mask=mask), *poisoned)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (got[0][2] == 0).all()


def test_compile_and_autocast():
    x, y = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 6)
    lengths = torch.tensor([7, 2, 0])

    def function(x, y):
        return outer_product_fusion(x, y, lengths=lengths)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), function(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        out = outer_product_fusion(x, y)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, outer_product_fusion(x.bfloat16(), y.bfloat16()), rtol=0, atol=0)


def test_second_gradients_and_those_that_are_wanted():
    x, y = (torch.randn(2, d, dtype=torch.float64, requires_grad=True) for d in (3, 4))
    assert torch.autograd.gradgradcheck(outer_product_fusion, (x, y))
    for wanted in ((x, y.detach()), (x.detach(), y)):
        outer_product_fusion(*wanted).sum().backward()
    torch.testing.assert_close(x.grad, y.detach().sum(1, keepdim=True).expand(2, 3))
    torch.testing.assert_close(y.grad, x.detach().sum(1, keepdim=True).expand(2, 4))


X = torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], X), TypeError, "x: expected a tensor"),
        ((X, X.half()), TypeError, "y: expected dtype torch.float32, given torch.float16"),
        ((X[0, 0], X[0, 0]), ValueError, r"x: expected \(batch, dx\) or \(batch, regions, dx\), given \(6,\)"),
        ((X, X[:, 0]), ValueError, r"y: expected \(2, 5, dy\) for x \(2, 5, 6\), given \(2, 6\)"),
        ((X, X[:, :1]), ValueError, r"y: expected \(2, 5, dy\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        outer_product_fusion(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask: expected dtype torch.bool"),
        ({"lengths": torch.tensor([3])}, ValueError, r"lengths: expected \(batch,\) = \(2,\)"),
        ({"lengths": torch.tensor([3, 6])}, ValueError, "lengths: expected values from 0 to 5"),
    ],
)
def test_bad_masks(options, error, message):
    with pytest.raises(error, match=message):
        outer_product_fusion(X, X, **options)
    with pytest.raises(ValueError, match="expected None for x without regions"):
        outer_product_fusion(X[:, 0], X[:, 0], **options)
