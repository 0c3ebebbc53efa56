"""What is peculiar to features at tokens: the forms that models have beside them, counts, what is kept, in place."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import CUDA_KERNELS, Backend, every_backend_with_cuda
from velm_kernels.backends import cuda, failures
from velm_kernels.sequence import places

BATCH, TOKENS, DIM, VOCABULARY, PICTURE = 3, 17, 10, 23, 7


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_ids, weight, features, mask); the picture token has a row of the weight, as in most models."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)
    token_ids[:, 3:9] = PICTURE
    mask = token_ids == PICTURE
    weight = torch.randn(VOCABULARY, DIM, generator=generator).to(dtype)
    return token_ids, weight, torch.randn(int(mask.sum()), DIM, generator=generator).to(dtype), mask


def as_transformers_does(token_ids: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    embeddings = F.embedding(token_ids, weight)
    mask = (token_ids == PICTURE).unsqueeze(-1).expand_as(embeddings)
    return embeddings.masked_scatter(mask, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_backend_with_cuda
def test_splice_beside_masked_scatter(backend: Backend, dtype: torch.dtype) -> None:
    """Bits of the result and of the gradients of features; those of the picture token's own row are 0. torch sums rows
    of the weight in 16 bits."""
    limit = 1e-6 if dtype == torch.float32 else 2**-6
    token_ids, weight, features, mask = drawn(dtype)
    found = []
    for way in ("theirs", "tokens", "positions", "into"):
        leaves = [weight.clone().requires_grad_(), features.clone().requires_grad_()]
        with backend.use():
            if way == "theirs":
                out = as_transformers_does(token_ids, *leaves)
            elif way == "tokens":
                out = velm_kernels.splice_tokens(token_ids, *leaves, image_token_id=PICTURE)
            elif way == "positions":
                where = mask.reshape(-1).nonzero()[:, 0].int()
                out = velm_kernels.splice_tokens(token_ids.int(), *leaves, positions=where)
            else:
                out = velm_kernels.splice_into(F.embedding(token_ids, leaves[0]), leaves[1], mask)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            found.append((out, *torch.autograd.grad(out, leaves, upstream)))
    (out, of_weight, of_features), *others = found
    assert of_weight[PICTURE].count_nonzero() == 0
    for other in others:
        assert torch.equal(other[0], out) and torch.equal(other[2], of_features)
        torch.testing.assert_close(other[1], of_weight, rtol=limit, atol=limit)


@pytest.mark.parametrize("inplace", [False, True])
@every_backend_with_cuda
def test_deepstack_of_qwen3_vl(backend: Backend, inplace: bool) -> None:
    pytest.importorskip("transformers")
    model = importlib.import_module("transformers.models.qwen3_vl.modeling_qwen3_vl").Qwen3VLTextModel
    _, _, features, mask = drawn()
    hidden = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    wanted = model._deepstack_process(None, hidden, mask, features)
    with backend.use(), torch.no_grad():
        got = velm_kernels.add_at_tokens(hidden, features, mask, inplace=inplace)
    assert torch.equal(got, wanted)
    assert (got is hidden) == inplace


@every_backend_with_cuda
def test_in_place_only_without_a_gradient(backend: Backend) -> None:
    _, _, features, mask = drawn()
    before = torch.randn(BATCH, TOKENS, 2 * DIM, generator=torch.Generator().manual_seed(2))
    # Rows that do not lie one behind the other are written where they are.
    for given in (before[..., :DIM].contiguous(), before.clone()[..., :DIM], before[..., :DIM].mT.contiguous().mT):
        kept = given.clone()
        for wants in (True, False):
            rows = features.clone().requires_grad_(wants)
            with backend.use():
                got = velm_kernels.add_at_tokens(given, rows, mask, inplace=True)
            assert (got is given) == (not wants)
            assert torch.equal(given, kept) == wants
            assert torch.equal(got[mask], kept[mask] + features) and torch.equal(got[~mask], kept[~mask])
            if wants:
                (grad,) = torch.autograd.grad(got, rows, 3.0 * torch.ones_like(got))
                assert torch.equal(grad, torch.full_like(features, 3.0))


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_in_place_by_torch_where_a_kernel_does_not_start(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, features, mask = drawn()
    hidden, tried = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(2)), []
    wanted = velm_kernels.add_at_tokens(hidden, features, mask)

    def kernel(*values: Any) -> None:
        tried.append(values)
        raise failures.StartError("planted")

    monkeypatch.setattr(cuda, "op", lambda *names: kernel)
    try:
        # It is tried once.
        for given in (hidden, hidden.clone()):
            with backend.use():
                got = velm_kernels.add_at_tokens(given, features, mask, inplace=True)
            assert got is given
        assert torch.equal(hidden, wanted) and len(tried) == 1
    finally:
        failures.forget()


def test_counts_that_do_not_fit_name_both() -> None:
    token_ids, weight, features, mask = drawn()
    embeddings, count = torch.randn(BATCH, TOKENS, DIM), features.shape[0]
    for given, number in ((features[1:], count - 1), (torch.cat([features, features]), 2 * count)):
        for call in (
            lambda given=given: velm_kernels.splice_into(embeddings, given, mask),
            lambda given=given: velm_kernels.splice_tokens(token_ids, weight, given, PICTURE),
            lambda given=given: velm_kernels.add_at_tokens(embeddings, given, mask),
            lambda given=given: velm_kernels.add_at_tokens(embeddings, given, mask, inplace=True),
            lambda given=given: torch.compile(velm_kernels.splice_into, backend="eager")(embeddings, given, mask),
        ):
            with pytest.raises(ValueError, match=f"features: expected {count} rows.*given {number}"):
                call()


@every_backend_with_cuda
def test_counts_that_nobody_checks_are_clamped(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: tokens behind the last feature keep what they have, unused features have gradient 0."""
    token_ids, weight, features, mask = drawn()
    monkeypatch.setattr(places.checks, "reads_values", lambda value: False)
    embeddings, count = torch.randn(BATCH, TOKENS, DIM), features.shape[0]
    for given in (features[:-4], torch.cat([features, torch.full((3, DIM), torch.nan)]), features[:0]):
        number = min(count, given.shape[0])
        at = mask.reshape(-1).nonzero()[:number, 0]
        leaf = given.clone().requires_grad_()
        with backend.use():
            into = velm_kernels.splice_into(embeddings, leaf, mask)
            tokens = velm_kernels.splice_tokens(token_ids, weight, leaf, PICTURE)
            added = velm_kernels.add_at_tokens(embeddings, leaf, mask)
            (grad,) = torch.autograd.grad((into.sum() + tokens.sum() + added.sum()), leaf)
            in_place = velm_kernels.add_at_tokens(embeddings.clone(), given, mask, inplace=True)
        for out, base, row in (
            (into, embeddings, given[:number]),
            (tokens, weight[token_ids], given[:number]),
            (added, embeddings, embeddings.view(-1, DIM)[at] + given[:number]),
            (in_place, embeddings, embeddings.view(-1, DIM)[at] + given[:number]),
        ):
            wanted = base.reshape(-1, DIM).clone()
            wanted[at] = row
            assert torch.equal(out.view(-1, DIM), wanted)
        assert torch.equal(grad, torch.cat([torch.full((number, DIM), 3.0), torch.zeros(len(given) - number, DIM)]))


@every_backend_with_cuda
def test_ids_that_repeat_are_summed_in_float32(backend: Backend) -> None:
    """A thousand tokens of one id, whose sum in 16 bits would stop growing."""
    token_ids = torch.ones(1, 1000, dtype=torch.long)
    weight = torch.zeros(3, 33, dtype=torch.bfloat16, requires_grad=True)
    with backend.use():
        out = velm_kernels.splice_tokens(token_ids, weight, torch.zeros(0, 33), image_token_id=-200)
        (grad,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(grad, torch.tensor([0.0, 1000.0, 0.0])[:, None].expand(3, 33).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Of a kernel's accesses: one element, 4 bytes, 16 bytes, and several pieces of a row.
@pytest.mark.parametrize("dim", [1, 13, 14, 16, 600, 1040])
@every_backend_with_cuda
def test_rows_of_every_width(backend: Backend, dim: int, dtype: torch.dtype) -> None:
    """Rows that lie one behind the other, and those of wider tensors that begin at odd places."""
    _, _, _, mask = drawn()
    generator, count = torch.Generator().manual_seed(4), int(mask.sum())
    token_ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator).masked_fill(mask, -200)
    for skipped in (0, 1, 2):
        hidden, features, weight = (
            torch.randn(*size, dim + skipped, generator=generator).to(dtype)[..., skipped:]
            for size in ((BATCH, TOKENS), (count,), (VOCABULARY,))
        )
        upstream = torch.randn(BATCH, TOKENS, dim + skipped, generator=generator).to(dtype)[..., skipped:]
        leaves = [x.detach().requires_grad_() for x in (hidden, features, weight)]
        with backend.use():
            into = velm_kernels.splice_into(leaves[0], leaves[1], mask)
            tokens = velm_kernels.splice_tokens(token_ids, leaves[2], leaves[1], -200)
            added = velm_kernels.add_at_tokens(leaves[0], leaves[1], mask)
            of_into = torch.autograd.grad(into, leaves[:2], upstream)
            of_features, of_weight = torch.autograd.grad(tokens, leaves[1:], upstream)
            of_added = torch.autograd.grad(added, leaves[:2], upstream)
            with torch.no_grad():
                in_place = velm_kernels.add_at_tokens(hidden.clone(), features, mask, inplace=True)
        wanted = hidden.clone()
        wanted[mask] = features
        assert torch.equal(into, wanted)
        text = weight[token_ids.masked_fill(mask, 0)]
        text[mask] = features
        assert torch.equal(tokens, text)
        wanted = hidden.clone()
        wanted[mask] = (hidden[mask].float() + features.float()).to(dtype)
        assert torch.equal(added, wanted) and torch.equal(in_place, wanted)
        assert torch.equal(of_into[0], upstream.masked_fill(mask[..., None], 0.0))
        for found in (of_into[1], of_features, of_added[1]):
            assert torch.equal(found, upstream[mask])
        assert torch.equal(of_added[0], upstream)
        exact = torch.zeros(VOCABULARY, dim, dtype=torch.float64)
        exact.index_add_(0, token_ids[~mask], upstream[~mask].double())
        limit = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(of_weight.double(), exact, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_one_row_of_any_width(backend: Backend, dtype: torch.dtype) -> None:
    """Whose stride says nothing of how many columns there are."""
    for dim in (3, 13, 14, 16):
        hidden, features, weight = (x.to(dtype) for x in torch.randn(3, 1, dim))
        for mask in (torch.tensor([True]), torch.tensor([False])):
            given = features if mask.all() else features[:0]
            leaf = weight.clone().requires_grad_()
            with backend.use():
                into = velm_kernels.splice_into(hidden, given, mask)
                tokens = velm_kernels.splice_tokens(torch.where(mask, -1, 0), leaf, given, -1)
                added = velm_kernels.add_at_tokens(hidden, given, mask)
                in_place = velm_kernels.add_at_tokens(hidden.clone(), given, mask, inplace=True)
                (grad,) = torch.autograd.grad(tokens, leaf, hidden)
            assert torch.equal(into, features if mask.all() else hidden)
            assert torch.equal(tokens, features if mask.all() else weight)
            wanted = (hidden.float() + features.float()).to(dtype) if mask.all() else hidden
            assert torch.equal(added, wanted) and torch.equal(in_place, wanted)
            assert torch.equal(grad, torch.zeros_like(hidden) if mask.all() else hidden)


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_past_2_to_the_31_elements(backend: Backend) -> None:
    """Rows as far apart as in a tensor too big to hold: memory that is not touched is not there."""
    token_ids, weight, features, mask = drawn(torch.bfloat16)
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    hidden, upstream = torch.randn(2, 1, mask.numel(), DIM).bfloat16()
    token_ids, mask = token_ids.view(1, -1), mask.view(1, -1)

    def spread(x: Tensor) -> Tensor:
        # Odd, so that elements are counted, not words of several.
        apart = ((far.numel() - DIM) // (x.shape[-2] - 1) - 1) | 1
        strides = (apart, 1) if x.dim() == 2 else (far.numel(), apart, 1)
        return far.as_strided(x.shape, strides).copy_(x)

    def results(hidden: Tensor, weight: Tensor, features: Tensor, in_far: Tensor | None = None) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, features)]
        with backend.use():
            into = velm_kernels.splice_into(leaves[0], leaves[2], mask)
            tokens = velm_kernels.splice_tokens(token_ids, leaves[1], leaves[2], PICTURE)
            added = velm_kernels.add_at_tokens(leaves[0], leaves[2], mask)
            if in_far is None:
                return [into, tokens, added]
            in_far = spread(in_far)
            of_into = torch.autograd.grad(into, leaves[::2], in_far)
            return [*of_into, *torch.autograd.grad(tokens, leaves[1:], in_far)]

    given = (hidden, weight, features)
    near = results(*given)
    for place in range(3):
        with_far = results(*(spread(x) if i == place else x for i, x in enumerate(given)))
        assert all(map(torch.equal, near, with_far))
    of_into, of_features, of_weight, of_pictures = results(*given, in_far=upstream)
    assert torch.equal(of_into, upstream.masked_fill(mask[..., None], 0.0))
    assert torch.equal(of_features, upstream[mask]) and torch.equal(of_pictures, upstream[mask])
    exact = torch.zeros(VOCABULARY, DIM).index_add_(0, token_ids[~mask], upstream[~mask].float())
    torch.testing.assert_close(of_weight.float(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dim", [5, 48])
@every_backend_with_cuda
def test_runs_of_one_id(backend: Backend, dim: int) -> None:
    """Of every length around the stretches that a kernel adds up, and the same bits when they are summed again."""
    generator = torch.Generator().manual_seed(5)
    counts = [1, 31, 33, 0, 64, 63, 2, 97, 30, 1, 200, 32]
    token_ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    token_ids = token_ids[torch.randperm(token_ids.shape[0], generator=generator)]
    # The last stretch has tokens of pictures too, whose gradients are added to no row.
    token_ids[::7] = -1
    weight = torch.randn(len(counts), dim, generator=generator).requires_grad_()
    features = torch.randn(int((token_ids == -1).sum()), dim, generator=generator)
    upstream = torch.randn(token_ids.shape[0], dim, generator=generator)
    found = []
    for _ in range(2):
        with backend.use():
            out = velm_kernels.splice_tokens(token_ids, weight, features, -1)
            found.append(torch.autograd.grad(out, weight, upstream)[0])
    exact = torch.zeros(len(counts), dim, dtype=torch.float64)
    exact.index_add_(0, token_ids[token_ids >= 0], upstream[token_ids >= 0].double())
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=2e-5)
    assert torch.equal(*found) and not found[0][3].any()


@every_backend_with_cuda
def test_ids_that_nobody_checks_are_clamped(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, forward and backward, and an id that takes a feature is not looked at."""
    token_ids, weight, features, mask = drawn()
    monkeypatch.setattr(places.checks, "reads_values", lambda value: False)
    token_ids = token_ids.masked_fill(mask, -(2**40))
    token_ids[0, 0], token_ids[1, 0], token_ids[2, 0] = VOCABULARY, -5, 2**40
    clamped = token_ids.clamp(0, VOCABULARY - 1)
    found = []
    for ids in (token_ids, clamped.masked_fill(mask, -(2**40))):
        leaf = weight.clone().requires_grad_()
        with backend.use():
            out = velm_kernels.splice_tokens(ids, leaf, features, -(2**40))
            found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    wanted = weight[clamped]
    wanted[mask] = features
    assert torch.equal(found[0][0], wanted)


def test_what_backward_keeps() -> None:
    """Numbers of tokens, no floating point."""
    token_ids, weight, features, mask = drawn()
    hidden = torch.randn(BATCH, TOKENS, DIM, requires_grad=True)
    kept: list[Tensor] = []
    leaves = (weight.requires_grad_(), features.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        velm_kernels.splice_tokens(token_ids, *leaves, image_token_id=PICTURE)
        velm_kernels.splice_into(hidden, features, mask)
        velm_kernels.add_at_tokens(hidden, features, mask)
    assert kept and not any(x.is_floating_point() for x in kept)


def test_errors_of_splice_tokens() -> None:
    token_ids, weight, features, mask = drawn()
    where = mask.reshape(-1).nonzero()[:, 0]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("image_token_id: .*None", {}),
        ("positions: expected None", {"image_token_id": PICTURE, "positions": where}),
        ("positions: .*different tokens", {"positions": where.clamp(max=int(where[-2]))}),
        ("positions: .* from 0 to 50, given", {"positions": where + 10}),
        ("positions: .*one for each", {"positions": where[1:]}),
        ("token_ids: .* from 0 to 2, given", {"image_token_id": PICTURE, "embedding_weight": weight[:3]}),
    ]
    for text, given in wrong:
        with pytest.raises(ValueError, match=text):
            velm_kernels.splice_tokens(
                **({"token_ids": token_ids, "embedding_weight": weight, "features": features} | given)
            )


def test_in_place_under_a_compiler() -> None:
    _, _, features, mask = drawn()
    hidden = torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    wanted = velm_kernels.add_at_tokens(hidden, features, mask)

    def twice(x: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return 2 * velm_kernels.add_at_tokens(x, features, mask, inplace=True)

    got = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)(hidden, features, mask)
    assert torch.equal(got, 2 * wanted) and torch.equal(hidden, wanted)
    index, place = places.place_features(mask, features.shape[0])
    rows = hidden.view(-1, DIM)
    torch.library.opcheck(
        torch.ops.velm.add_in_place.default,
        (rows, features, index, place),
        test_utils=["test_schema", "test_faketensor"],
    )
