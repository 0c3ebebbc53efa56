from __future__ import annotations

import pytest
import torch

from tests.numbers import assert_accurate
from velm_kernels.fusion import outer_product_fusion
from velm_kernels.fusion.outer_product_fusion import reference


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
