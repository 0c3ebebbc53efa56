"""Where forward of linear_cross_entropy made the gradients and nobody reads them again, backward gives their memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.conftest import Backend, every_backend
from velm_kernels import linear_cross_entropy, measure
from velm_kernels.losses.linear_cross_entropy import op, reference

ROWS, DIM, VOCABULARY = 40, 24, 300


@pytest.fixture(autouse=True)
def blocks_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(op, "SCALED", 5 * DIM)
    yield


def drawn(dtype: torch.dtype, dim: int = DIM, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((ROWS, dim), (vocabulary, dim), (vocabulary,))
    )
    targets = torch.randint(0, vocabulary, (ROWS,), generator=generator)
    targets[::3] = -100
    return hidden, weight, bias, targets


def loss_of(leaves: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    hidden, weight, bias, targets = leaves
    return linear_cross_entropy(hidden, weight, targets, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_the_same_gradients(backend: Backend, dtype: torch.dtype) -> None:
    leaves = drawn(dtype)
    with backend.use():
        kept = loss_of(leaves)
        first = torch.autograd.grad(3 * kept, leaves[:3], retain_graph=True)
        again = torch.autograd.grad(3 * kept, leaves[:3], retain_graph=True)
        last = torch.autograd.grad(3 * kept, leaves[:3])
        in_place = torch.autograd.grad(3 * loss_of(leaves), leaves[:3])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves[:3]]
    loss = 3 * reference.linear_cross_entropy(*exact[:2], leaves[3], exact[2])
    for grad, true in zip(in_place, torch.autograd.grad(loss, exact), strict=True):
        assert measure.relative_rms([grad], [true]) < 40 * torch.finfo(dtype).eps
    for grads in zip(first, again, last, in_place, leaves, strict=False):
        assert all(torch.equal(one, grads[0]) and one.dtype == grads[-1].dtype for one in grads[:-1])


def test_memory_is_that_of_what_forward_made() -> None:
    leaves = drawn(torch.float32)
    loss = loss_of(leaves)
    made = [x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None and x.shape == leaves[1].shape]  # type: ignore[union-attr]
    loss.backward()
    assert leaves[1].grad is not None and leaves[1].grad.data_ptr() in made
    # A second loss adds to what the first one gave.
    once = leaves[1].grad.clone()
    loss_of(leaves).backward()
    assert torch.equal(leaves[1].grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_gradient_of_weight_at_a_time(dtype: torch.dtype) -> None:
    leaves = drawn(dtype, 512, 2048)
    size = leaves[1].numel()
    # In 16 bits sums in float32, and what they are rounded to.
    least = 4 * size if dtype == torch.float32 else 6 * size
    peak = measure.peak_memory(lambda: torch.autograd.grad(loss_of(leaves), leaves[:3]))
    assert least <= peak < least + 0.3 * 4 * size
    if dtype == torch.float32:
        kept = measure.peak_memory(lambda: torch.autograd.grad(loss_of(leaves), leaves[:3], retain_graph=True))
        assert kept > 1.9 * least


def test_what_others_hold_is_not_written_on() -> None:
    leaves = drawn(torch.float32)
    held: list[Tensor] = []

    def hold(x: Tensor) -> Tensor:
        held.append(x)
        return x

    with saved_tensors_hooks(hold, lambda x: x):
        loss = loss_of(leaves)
    before = [x.detach().clone() for x in held]
    loss.backward()
    assert all(map(torch.equal, held, before))
    # And who calls the operator itself has all of its results.
    for leaf in leaves[:3]:
        leaf.grad = None
    hidden, weight, bias, targets = leaves
    places = targets.masked_fill(targets < 0, -1)
    results = torch.ops.velm.linear_cross_entropy_forward(hidden, weight, bias, places, 0.0, 0.0, "mean", False, 7, "")
    before = [x.detach().clone() for x in results]
    results[0].backward()
    assert all(torch.equal(x, y) for x, y in zip(results, before, strict=True))
    assert weight.grad is not None and not torch.equal(weight.grad, before[5])
