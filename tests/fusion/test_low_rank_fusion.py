from __future__ import annotations

import math

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import CUDA_KERNELS, INTERPRETED, Backend, every_cpu_backend, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.fusion import LowRankFusion, low_rank_fusion
from velm_kernels.fusion.low_rank_fusion import op, products, reference


def _tensors(shapes, rank, out, dtype, seed=0):
    """The inputs, their factors, weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [randn(*shape) for shape in shapes]
    factors = [randn(rank, 1 + shape[-1], out) * (1 + shape[-1]) ** -0.5 for shape in shapes]
    return [*inputs, *factors, randn(rank), 3 * randn(out)]


def _call(function, tensors):
    count = len(tensors) // 2 - 1
    return function(tensors[:count], tensors[count : 2 * count], *tensors[2 * count :])


def _all_results(function, tensors, wanted=None, dtype=None):
    wanted = wanted or [True] * len(tensors)
    leaves = [
        value.detach().to(dtype or value.dtype).requires_grad_(want)
        for value, want in zip(tensors, wanted, strict=True)
    ]
    out = _call(function, leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(out.dtype)
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, chosen, grad)]


def _beside_regions(inputs, *others):
    """The meaning for (batch, d) beside (batch, regions, d)."""
    most = max(x.dim() for x in inputs)
    return reference.low_rank_fusion([x[:, None] if x.dim() == 2 < most else x for x in inputs], *others)


def _check(backend, tensors, wanted=None):
    with backend.use():
        got = _all_results(low_rank_fusion, tensors, wanted)
    plain = _all_results(_beside_regions, tensors, wanted)
    exact = _all_results(_beside_regions, tensors, wanted, torch.float64)
    # A gradient of few elements is as inexact as the sums that cancel in it, and a lucky one is not the measure.
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert a.is_contiguous() and a.dtype == tensors[0].dtype
        assert_accurate(f"result {i}", a, b, c, a.dtype, ulps=8, floor=float(c.numel()) ** 0.5)


@every_kernel
@given(data=st.data())
@settings(max_examples=5 if INTERPRETED else 15)
def test_any_shape(backend, data):
    count = data.draw(st.integers(2, 4), label="modalities")
    dims = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count), label="dims")
    leading = data.draw(st.sampled_from([[()] * 4, [(5,)] * 4, [(3, 4)] * 4, [(3,), (3, 4), (3, 1), (1, 4)]]))
    rank, out = data.draw(st.integers(1, 4), label="rank"), data.draw(st.integers(1, 40), label="out")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kept = data.draw(st.booleans(), label="kept")
    wanted = data.draw(st.sampled_from([None, "inputs", "factors", "scalars"]))
    names = ["inputs"] * count + ["factors"] * count + ["scalars"] * 2
    tensors = _tensors([(*lead, dim) for lead, dim in zip(leading, dims, strict=False)], rank, out, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "MOST_KEPT", op.MOST_KEPT if kept else 0)
        _check(backend, tensors, wanted and [name == wanted for name in names])


CUDA = pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
# Of 64 rows and columns, or in the interpreter of 16.
TILES = [Backend("triton")] if INTERPRETED else CUDA_KERNELS
THREE = [(3, 33), (3, 23, 70), (3, 23, 130)]
SEVERAL_TILES = (
    [
        ([(3, 9), (3, 6, 17), (3, 6, 4)], torch.float32, 18, True),
        ([(3, 3), (3, 6, 18), (3, 2), (3, 6, 20)], torch.float16, 17, False),
    ]
    if INTERPRETED
    else [
        (THREE, torch.float32, 72, True),
        # Rows that begin at no multiple of 4 bytes.
        (THREE, torch.float16, 71, False),
        (THREE, torch.bfloat16, 136, True),
    ]
)


@pytest.mark.parametrize("backend", TILES, ids=str)
@pytest.mark.parametrize(("shapes", "dtype", "out", "kept"), SEVERAL_TILES)
def test_several_tiles(backend, shapes, dtype, out, kept, monkeypatch):
    """And two of three ranks at a time in backward."""
    monkeypatch.setattr(op, "MOST_KEPT", op.MOST_KEPT if kept else 0)
    monkeypatch.setattr(products, "WORKSPACE", 2 * math.prod(shapes[1][:2]) * out)
    _check(backend, _tensors(shapes, 3, out, dtype))


@CUDA
@pytest.mark.parametrize("kept", [True, False])
def test_many_ranks(backend, kept, monkeypatch):
    """More than there are blocks, of which the last has fewer, and some at a time in backward; of those not kept, the
    projections of one row for several, some rows at a time in forward."""
    monkeypatch.setattr(op, "MOST_KEPT", 1 << 20 if kept else 0)
    monkeypatch.setattr(products, "WORKSPACE", 301 * 5 * 2 + 7)
    _check(backend, _tensors([(5, 2, 3), (5, 4)], 301, 5, torch.float32))


@every_cpu_backend
@pytest.mark.parametrize("kept", [True, False])
def test_a_few_ranks_at_a_time(backend, kept, monkeypatch):
    monkeypatch.setattr(op, "MOST_KEPT", 1 << 20 if kept else 0)
    _check(backend, _tensors([(50, 12, 9), (50, 17)], 5, 300, torch.float32))


def test_triton_projects_one_row_for_many_once():
    pytest.importorskip("triton")
    from velm_kernels.backends.triton import pretend
    from velm_kernels.fusion.low_rank_fusion.triton import low_rank_fusion_forward

    *inputs, factor0, factor1, weight, bias = _tensors([(3, 6), (12, 5)], 2, 7, torch.float32)
    missing = [None, None]
    arguments = (*inputs, *missing, factor0, factor1, *missing, weight, bias, 12, False)
    with pretend(80) as launches:
        low_rank_fusion_forward(*arguments, torch.empty(12, 7), None)
    project, fuse = launches
    assert project.arguments[0] is inputs[0] and project.arguments[1] is factor0
    # The other kernel reads these projections and has nothing to make them of.
    assert fuse.arguments[4] is None and fuse.arguments[5] is factor1
    assert fuse.arguments[8] is project.arguments[2]


def test_what_backward_keeps(monkeypatch):
    """The projections up to a limit, and beyond it the arguments alone; its gradients are asked for twice."""
    tensors = [value.requires_grad_() for value in _tensors([(8, 6), (8, 5)], 2, 7, torch.float32)]
    for limit, expected in ((2 * 16 * 7, 2 * 16 * 7), (2 * 16 * 7 - 1, 0)):
        monkeypatch.setattr(op, "MOST_KEPT", limit)
        kept = []

        def keep(tensor, kept=kept):
            if not any(tensor.data_ptr() == value.data_ptr() for value in tensors):
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = _call(low_rank_fusion, tensors)
        assert sum(kept) == expected
        first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert torch.equal(a, b)


def test_flops():
    tensors = [value.requires_grad_() for value in _tensors([(3, 6), (12, 5)], 2, 7, torch.float32)]
    tensors[1] = tensors[1].detach().view(3, 4, 5)
    products = 2 * 2 * 7 * (3 * 7 + 12 * 6)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out = _call(low_rank_fusion, tensors)
        assert counter.get_total_flops() == products
        out.sum().backward()
    # Of the second input no gradient is wanted.
    assert counter.get_total_flops() == 2 * products + 2 * 2 * 7 * 3 * 7


def test_module():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, dim) for dim in (4, 5, 6)]
    module = LowRankFusion([4, 5, 6], 7, rank=3)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    factors = {f"factors.{m}": (3, 1 + dim, 7) for m, dim in enumerate((4, 5, 6))}
    assert shapes == {"weight": (3,), "bias": (7,), **factors}
    assert all(parameter.std() > 0 for name, parameter in module.named_parameters() if name != "bias")
    expected = reference.low_rank_fusion(inputs, list(module.factors), module.weight, module.bias)
    torch.testing.assert_close(module(*inputs), expected)
    assert LowRankFusion([4, 5], 7, 2, bias=False).bias is None
    for arguments, name in ((([4], 7, 2), "input_dims"), (([4, 5], 7, 0), "rank")):
        with pytest.raises(ValueError, match=f"{name}: "):
            LowRankFusion(*arguments)
