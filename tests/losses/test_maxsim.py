"""maxsim beside ColPali's scores, and which of several tokens is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, every_backend
from velm_kernels import maxsim, maxsim_contrastive_loss, measure


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def colpali(queries: Tensor, documents: Tensor) -> Tensor:
    """The score of ColPali's processor for padded rows."""
    return torch.einsum("bnd,csd->bcns", queries, documents).max(3)[0].sum(2)


@every_backend
def test_equals_colpali(backend: Backend) -> None:
    leaves = [_drawn(3, 5, 16).requires_grad_(), _drawn(4, 33, 16).requires_grad_()]
    exact = colpali(*leaves)
    weights = _drawn(3, 4)
    with backend.use():
        got = maxsim(*leaves)
        gradients = torch.autograd.grad(got, leaves, weights)
    torch.testing.assert_close(got, exact)
    for gradient, other in zip(gradients, torch.autograd.grad(exact, leaves, weights), strict=True):
        torch.testing.assert_close(gradient, other)


@every_backend
def test_masks_are_shorter_documents(backend: Backend) -> None:
    queries, documents = _drawn(2, 5, 16), _drawn(2, 40, 16)
    lengths = (37, 18)
    with backend.use():
        got = maxsim(queries, documents, None, torch.arange(40) < torch.tensor(lengths)[:, None])
        # With holes, too.
        holes = maxsim(queries, documents[:1], None, (torch.arange(40) % 3 != 1)[None])
    for document, length in enumerate(lengths):
        exact = colpali(queries, documents[document : document + 1, :length])
        torch.testing.assert_close(got[:, document : document + 1], exact)
    torch.testing.assert_close(holes, colpali(queries, documents[:1, torch.arange(40) % 3 != 1]))


@pytest.mark.parametrize("hidden", [False, True])
@every_backend
def test_the_first_of_equal_tokens_and_of_nan(backend: Backend, hidden: bool) -> None:
    """Both in one vector of the processor, and in several; a mask that hides the very first."""
    queries = torch.ones(1, 1, 4)
    for places in ((3, 7), (5, 70), (33, 34), (64, 68)):
        for value in (2.0, torch.nan):
            documents = torch.zeros(1, 70 + 1, 4)
            documents[0, list(places)] = value
            mask = torch.ones(1, 71, dtype=torch.bool)
            mask[0, places[0]] = not hidden
            documents.requires_grad_()
            with backend.use():
                (gradient,) = torch.autograd.grad(maxsim(queries, documents, None, mask).sum(), documents)
            assert gradient[0, :, 0].nonzero().view(-1).tolist() == [places[1] if hidden else places[0]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 16, 37])
@every_backend
def test_without_a_gradient_in_16_bits(backend: Backend, length: int, masked: bool) -> None:
    """Scores of bfloat16 are rounded, where a processor multiplies it, once: as those of plain torch."""
    queries, documents = _drawn(3, 5, 16).bfloat16(), _drawn(4, length, 16).bfloat16()
    given = [None, None]
    if masked:
        given = [torch.arange(5) < torch.tensor([[5], [3], [0]]), torch.arange(length) % 3 != 1]
        given[1] = given[1].expand(4, length)
        documents[:, 1::3] = torch.nan
        queries[1, 3:] = torch.nan
    exact = maxsim(queries.double(), documents.double(), *given)
    with backend.use():
        got = maxsim(queries, documents, *given)
    assert got.dtype == torch.float32 and exact.isfinite().all()
    terms = queries.double().nan_to_num().norm(dim=2).sum(1)[:, None]
    assert ((got - exact).abs() <= 2.0**-8 * terms * documents.double().nan_to_num().norm(dim=2).amax()).all()
    documents[2, 0, 3] = torch.nan
    with backend.use():
        lost = maxsim(queries, documents, *given).isnan()
    there = queries.isnan().any(2).logical_not().any(1) if given[0] is None else given[0].any(1)
    assert torch.equal(lost, there[:, None] & (torch.arange(4) == 2))


def test_memory() -> None:
    """A place for each token of a query and each document is kept, and no scores."""
    leaves = [_drawn(8, 32, 16).requires_grad_(), _drawn(64, 200, 16).requires_grad_()]
    scores = 8 * 32 * 64 * 200 * 4

    def run() -> None:
        torch.autograd.grad(maxsim(*leaves).sum(), leaves)

    assert measure.peak_memory(run) < scores / 3


def test_the_loss_of_colpali() -> None:
    """Each query's document stands in its place; what stands behind them are negatives."""
    queries, documents = _drawn(3, 5, 16), _drawn(4, 33, 16)
    scale = torch.tensor(0.1, requires_grad=True)
    exact = torch.nn.functional.cross_entropy(scale * colpali(queries, documents), torch.arange(3))
    got = maxsim_contrastive_loss(queries, documents, scale)
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(torch.autograd.grad(got, scale), torch.autograd.grad(exact, scale))
    with pytest.raises(ValueError, match="documents: expected one for each of 3 queries or more"):
        maxsim_contrastive_loss(queries, documents[:2])
