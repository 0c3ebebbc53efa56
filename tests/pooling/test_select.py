"""select_tokens: which tokens, in which order, their gradients, ragged k, padding, torch features, bad arguments."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import velm_kernels
from tests.conftest import every_kernel
from velm_kernels.pooling import select_tokens
from velm_kernels.pooling.select_tokens import reference


@every_kernel
@given(data=st.data())
def test_any_shape(backend, data):
    leading = data.draw(st.sampled_from([(), (3,), (2, 2)]), label="leading")
    tokens = data.draw(st.integers(0, 20), label="tokens")
    dim = data.draw(st.integers(0, 40), label="dim")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(*leading, tokens, 2 * dim, generator=generator).to(dtype)[..., ::2].requires_grad_()
    # Few different scores, so that there are ties, infinity and NaN among them.
    values = torch.tensor([0.0, -0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    scores = values[torch.randint(0, len(values), (*leading, tokens), generator=generator)]
    options = {}
    if data.draw(st.booleans(), label="ragged"):
        k = torch.randint(0, tokens + 1, leading, generator=generator)
        if data.draw(st.booleans(), label="max_k"):
            options["max_k"] = int(k.max())
    else:
        k = data.draw(st.integers(0, tokens), label="k")
    padded = {}
    if data.draw(st.booleans(), label="lengths"):
        padded["lengths"] = torch.randint(0, tokens + 1, leading, generator=generator)
    if data.draw(st.booleans(), label="mask"):
        padded["mask"] = torch.rand(*leading, tokens, generator=generator) < 0.7
    if backend.name != "reference" and dtype == torch.float64:
        dtype = torch.float32
        x = x.detach().float().requires_grad_()
    with backend.use():
        got = select_tokens(x, scores, k, **padded, **options)
        got.tokens.backward(grad := torch.randn(got.tokens.shape, generator=generator).to(dtype))
    expected = reference.select_tokens(x, scores, k, **padded, **options)
    expected_grad = torch.autograd.grad(expected[0], x, grad)[0]
    for ours, theirs in zip((*got, x.grad), (*expected, expected_grad), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert got.tokens.is_contiguous()


def test_prunes_by_the_mass_of_keys():
    """The pruned keys give the attention that the mask of them gives."""
    query, key, value = (torch.randn(2, 3, n, 16) for n in (5, 12, 12))
    _, mass = velm_kernels.cross_attention(query, key, value, return_key_mass=True)
    packed = torch.cat([key, value], -1).transpose(1, 2).flatten(2)
    tokens, indices, lengths = select_tokens(packed, mass.sum(1), torch.tensor([4, 7]), max_k=8)
    kept = torch.zeros(2, 13).scatter_(1, indices + 13 * (indices < 0), 1.0)[:, :12] > 0
    few = tokens.unflatten(2, (3, 32)).transpose(1, 2)
    out = velm_kernels.cross_attention(query, few[..., :16], few[..., 16:], key_lengths=lengths)
    torch.testing.assert_close(out, velm_kernels.cross_attention(query, key, value, key_mask=kept))
    assert kept.sum(1).tolist() == [4, 7]


def test_operator_checks_compile_and_explain():
    x, scores = torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 7)
    lengths, k = torch.tensor([7, 3]).int(), torch.tensor([2, 5]).int()
    torch.library.opcheck(torch.ops.velm.select_rows.default, (scores, lengths, None, k, 6))
    index, inverse, *_ = torch.ops.velm.select_rows(scores, lengths, None, k, 6)
    torch.library.opcheck(torch.ops.velm.gather_rows_forward.default, (x, index, None, None, inverse, None, None, ""))
    compiled = torch.compile(select_tokens, fullgraph=True, backend="aot_eager")
    for given_k in (3, k):
        expected = select_tokens(x, scores, given_k, lengths=lengths)
        for ours, theirs in zip(compiled(x, scores, given_k, lengths=lengths), expected, strict=True):
            assert torch.equal(ours, theirs)
    told = velm_kernels.explain("select_tokens", x, scores, k, lengths=lengths).splitlines()
    assert told[0].startswith("select_tokens -> ") and told[1].startswith("  gather_rows -> ")
