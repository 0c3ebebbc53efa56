from __future__ import annotations

import pytest
import torch

from tests.conftest import every_backend_with_cuda
from velm_kernels import use_backend
from velm_kernels.fusion import dropout_residual
from velm_kernels.fusion.dropout_residual import reference

SEED = 0x123456789ABCDEF0


def _gradients(x, residual, p, grad):
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    out = dropout_residual(x, residual, p, seed=SEED)
    out.backward(grad)
    return out.detach(), x.grad, residual.grad


@every_backend_with_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 63), (7, 64), (5, 130), (2, 4, 768)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_every_backend_computes_what_the_reference_computes(backend, dtype, shape, p):
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    with backend.use():
        actual = _gradients(x, residual, p, grad)
    with use_backend("reference"):
        expected = _gradients(x, residual, p, grad)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype is torch.float32 else 1e-2, atol=1e-6)
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_independence_of_what_is_kept(p):
    keep = reference.kept(torch.tensor(SEED), 512, 512, p).double()
    share, deviation = keep.mean().item(), (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(share - (1 - p)) < 5 * deviation
    centred = keep - (1 - p)
    for shift in [(0, 1), (0, 16), (0, 64), (1, 0)]:
        correlation = (centred * centred.roll(shift, (0, 1))).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / 512
    assert not torch.equal(keep, reference.kept(torch.tensor(SEED + 1), 512, 512, p).double())


@every_backend_with_cuda
def test_backward_drops_what_forward_dropped(backend):
    x = torch.rand(4, 100) + 1
    x.requires_grad_()
    with backend.use():
        out = dropout_residual(x, dropout_p=0.4)
        out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0)
    assert 0 < (out == 0).sum() < out.numel()
    torch.testing.assert_close(out.detach(), x.grad * x.detach())


@every_backend_with_cuda
def test_what_is_dropped_may_be_infinite(backend):
    keep = reference.kept(torch.tensor(SEED), 5, 70, 0.5)
    x = torch.where(keep, torch.ones(5, 70), torch.inf)
    with backend.use():
        assert torch.equal(dropout_residual(x, dropout_p=0.5, seed=SEED), 2.0 * keep)


def test_without_dropout_it_adds():
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(dropout_residual(x, residual, 0.0), x + residual)
    assert torch.equal(dropout_residual(x, None, 0.0), x)


def test_seed_comes_from_torchs_generator():
    x = torch.randn(8, 64)
    torch.manual_seed(1)
    first, second = dropout_residual(x, dropout_p=0.5), dropout_residual(x, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout_residual(x, dropout_p=0.5), first)
    assert not torch.equal(first, second)
