from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_kernel
from tests.numbers import assert_accurate
from velm_kernels import explain
from velm_kernels.fusion import TensorFusion, tensor_fusion
from velm_kernels.fusion.tensor_fusion import reference


def _randn(generator, *shape):
    return torch.randn(shape, generator=generator)


def _tensors(leading, dims, out, dtype):
    """The inputs, then weight and bias."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_randn(generator, *leading, dim) for dim in dims]
    weight = _randn(generator, out, math.prod(1 + dim for dim in dims))
    return [value.to(dtype) for value in (*inputs, weight, 5 * _randn(generator, out))]


def _all_results(function, tensors, dtype=None):
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in tensors]
    out = function(leaves[:-2], *leaves[-2:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@every_kernel
@given(data=st.data())
def test_equals_the_materialised_product(backend, data):
    leading = data.draw(st.sampled_from([(), (5,), (2, 3)]), label="leading")
    dims = data.draw(st.lists(st.integers(0, 4 if INTERPRETED else 9), min_size=2, max_size=4), label="dims")
    out = data.draw(st.integers(1, 8), label="out")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensors = _tensors(leading, dims, out, dtype)
    with backend.use():
        got = _all_results(tensor_fusion, tensors)
    plain = _all_results(reference.tensor_fusion, tensors)
    exact = _all_results(reference.tensor_fusion, tensors, torch.float64)
    # A gradient of few elements is as inexact as the sums that cancel in it, and a lucky one is not the measure.
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        terms = tensors[-2].shape[1] if i == 0 else 1
        assert_accurate(f"result {i}", a, b, c, dtype, ulps=8, floor=float(c.numel() * terms) ** 0.5)


def test_two_modalities_form_no_outer_product():
    """Backward keeps what is of the size of the inputs, and not their product."""
    tensors = [value.requires_grad_() for value in _tensors((64,), (40, 30), 4, torch.float32)]
    kept = []

    def keep(tensor):
        if not any(tensor.data_ptr() == value.data_ptr() for value in tensors):
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tensor_fusion(tensors[:2], *tensors[2:])
    assert sum(kept) <= 64 * (41 + 31)


def test_inputs_broadcast():
    *inputs, weight, bias = _tensors((2, 3), (4, 5, 6), 7, torch.float64)
    for first in (inputs[0][:1, :1], inputs[0][0]):
        # With fewer dimensions than the others, too: they stand for the last ones, as torch broadcasts.
        mixed = [first, inputs[1][:, :1], inputs[2]]
        expected = reference.tensor_fusion(mixed, weight, bias)
        torch.testing.assert_close(tensor_fusion(mixed, weight, bias), expected)


def test_a_row_for_all_regions():
    question, picture, third, weight, bias = _tensors((2,), (4, 5, 6), 7, torch.float64)
    regions = torch.stack([picture, 2 * picture, -picture], 1)
    for inputs in ([question, regions, third], [regions, question, third[:, None]], [question, third, regions]):
        rows = [x if x.dim() == 3 else x[:, None] for x in inputs]
        sizes = [1 + x.shape[-1] for x in inputs]
        shaped = weight[:, : sizes[0] * sizes[1] * sizes[2]]
        expected = reference.tensor_fusion([x.expand(2, 3, -1) for x in rows], shaped, bias)
        torch.testing.assert_close(tensor_fusion(inputs, shaped, bias), expected)
    assert explain("tensor_fusion", inputs, shaped, bias).startswith("tensor_fusion -> ")


def test_module():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, dim) for dim in (4, 5, 6)]
    module = TensorFusion([4, 5, 6], 7)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {"weight": (7, 210), "bias": (7,)}
    assert all(parameter.std() > 0 for parameter in module.parameters())
    torch.testing.assert_close(module(*inputs), reference.tensor_fusion(inputs, module.weight, module.bias))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert TensorFusion([4, 5], 7, bias=False).bias is None
    with pytest.raises(ValueError, match="input_dims: "):
        TensorFusion([4], 7)
