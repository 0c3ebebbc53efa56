"""linear_cross_entropy beside torch's own and transformers' losses, and what is peculiar to chunks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend
from velm_kernels import linear_cross_entropy, measure
from velm_kernels.backends import cpu as cpu_backend
from velm_kernels.backends import small
from velm_kernels.losses.linear_cross_entropy import chunks, cpu, reference

# The function of this name hides the module.
module = importlib.import_module("velm_kernels.losses.linear_cross_entropy")


def no_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's form; what is few rows the same switch says."""
    for limit in ("SMALL", "SMALL_OF_HIDDEN", "SMALL_OF_WEIGHT"):
        monkeypatch.setattr(module, limit, 0)


@pytest.fixture(autouse=True, params=[False, True], ids=["in forward", "in backward"])
def few_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of means and sums are made by forward, or, as of few rows, by backward."""
    monkeypatch.setattr(small, "enabled", request.param)
    no_small_calls(monkeypatch)
    monkeypatch.setattr(module, "FEW_ROWS", dict.fromkeys(module.FEW_ROWS, 1 << 20))


def _drawn(rows: int, dim: int, vocabulary: int, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator) * dim**-0.5
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(rows, generator=generator) >= share, -100)


def test_which_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library is: what backward keeps says who makes the gradient of weight."""
    monkeypatch.undo()
    monkeypatch.setattr(small, "enabled", True)
    no_small_calls(monkeypatch)
    for dtype, rows in {torch.float32: 128, torch.bfloat16: 512}.items():
        for count in (rows, rows + 1):
            hidden, weight = torch.randn(count, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype)
            targets = torch.zeros(count, dtype=torch.int64)
            for leaf, is_later in ((weight, count <= rows), (hidden, False)):
                loss = linear_cross_entropy(*(x.requires_grad_(x is leaf) for x in (hidden, weight)), targets)
                kept = [tuple(x.shape) for x in loss.grad_fn.saved_tensors if x is not None]  # type: ignore[union-attr]
                assert ((1, count) in kept) == is_later


def _gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_backend
def test_equals_torch(backend: Backend, reduction: str) -> None:
    hidden, weight, targets = _drawn(13, 12, 37)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.2}
    exact = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, **settings)
    with backend.use():
        loss = linear_cross_entropy(hidden, weight, targets, bias, **settings)
        got = _gradients(loss.square().sum(), *leaves)
    for value, other in zip([loss, *got], [exact, *_gradients(exact.square().sum(), *leaves)], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_equals_the_loss_of_causal_models() -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    hidden, weight, targets = _drawn(22, 12, 37)
    hidden, targets = hidden.view(2, 11, 12), targets.view(2, 11)
    exact = loss_utils.ForCausalLMLoss(hidden @ weight.t(), targets, 37)
    torch.testing.assert_close(velm_kernels.LinearCrossEntropyLoss(shift=True)(hidden, weight, targets), exact)


@every_backend
def test_the_mean_of_nothing(backend: Backend) -> None:
    hidden, weight, targets = _drawn(5, 12, 17, share=0.0)
    hidden[1, 2] = torch.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with backend.use():
        loss = linear_cross_entropy(hidden, weight, targets)
        assert loss.isnan() and F.cross_entropy(hidden @ weight.t(), targets).isnan()
        for gradient in torch.autograd.grad(loss, leaves):
            assert (gradient == 0).all()


@every_backend
def test_backward_twice_and_scaled(backend: Backend) -> None:
    """Gradients that forward has made serve every backward of one graph, multiplied by what comes in."""
    hidden, weight, targets = _drawn(13, 12, 37)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with backend.use():
        loss = linear_cross_entropy(hidden, weight, targets)
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        scaled = torch.autograd.grad(loss, leaves, torch.tensor(65536.0), retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
    for first, other, third in zip(once, scaled, again, strict=True):
        assert torch.equal(65536 * first, other) and torch.equal(first, third)


@pytest.mark.skipif(cpu_backend.in_use() is None, reason="no library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("details", [False, True])
def test_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, details: bool) -> None:
    """Several chunks of rows, of which the last is shorter, and of the vocabulary: one whose logits are all -inf among
    them."""
    hidden, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in _drawn(40, 15, 75, 0.8))
    bias = torch.zeros(75, dtype=dtype)
    bias[16:32] = -torch.inf
    targets[(targets >= 16) & (targets < 32)] = 3
    settings: dict[str, Any] = {"softcap": None, "return_logprobs": details, "reduction": "sum"}

    def run(function: Any, *given: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        found = function(*leaves[:2], targets, leaves[2], **settings)
        # Of the entropy of an impossible label torch knows none.
        loss = found[0] + found[1].square().sum() if details else found
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    whole = run(linear_cross_entropy, hidden, weight, bias)
    monkeypatch.setattr(cpu, "BYTES", 1)
    monkeypatch.setattr(cpu, "LEAST_ROWS", 7)
    monkeypatch.setattr(cpu, "COLUMNS", 16)
    parts = run(linear_cross_entropy, hidden, weight, bias)
    exact = run(reference.linear_cross_entropy, *(x.double() for x in (hidden, weight, bias)))
    for value, other, true in zip(parts, whole, exact, strict=True):
        limit = 2 * measure.relative_rms([other], [true]) + 4 * torch.finfo(dtype).eps
        assert measure.relative_rms([value], [true]) <= limit


@pytest.mark.skipif(cpu_backend.in_use() is None, reason="no library")
def test_many_chunks_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they add up to is rounded once."""
    hidden, weight, targets = _drawn(512, 16, 40, 1.0)
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.requires_grad_().t(), targets), weight)
    leaf = weight.detach().bfloat16().requires_grad_()
    errors = []
    for rows in (512, 4):
        monkeypatch.setattr(cpu, "BYTES", 1)
        monkeypatch.setattr(cpu, "LEAST_ROWS", rows)
        found = torch.autograd.grad(linear_cross_entropy(hidden.bfloat16(), leaf, targets), leaf)
        errors.append(measure.relative_rms([x.float() for x in found], list(exact)))
    assert errors[1] <= 1.2 * errors[0]


def test_logits_are_never_whole() -> None:
    hidden, weight, targets = _drawn(4096, 16, 8192, 1.0)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run(function: Any) -> int:
        return measure.peak_memory(lambda: torch.autograd.grad(function(), leaves))

    ours = run(lambda: linear_cross_entropy(hidden, weight, targets))
    plain = run(lambda: F.cross_entropy(F.linear(hidden, weight), targets))
    assert ours < cpu.BYTES + (8 << 20) < plain / 3


def test_targets_outside_of_the_vocabulary() -> None:
    hidden, weight, targets = _drawn(5, 12, 17, 1.0)
    for wrong in (17, -1, -5):
        targets[2] = wrong
        with pytest.raises(ValueError, match=r"targets: expected ignore_index or values from 0 to 16"):
            linear_cross_entropy(hidden, weight, targets)
    assert linear_cross_entropy(hidden, weight, targets, ignore_index=-5).isfinite()


def test_rows_without_a_label_are_not_multiplied() -> None:
    """Only as many rows as have a label reach a product."""
    hidden, weight, targets = _drawn(64, 12, 17, 0.25)
    work = chunks._Work(_Nothing(), cpu._sizes(hidden), hidden, weight, None, targets, 0.0)
    assert work.rows == int((targets >= 0).sum()) < 64


class _Nothing:
    def fresh(self, x: Tensor) -> None:
        pass
