"""TokenMerge and PerceiverResampler: beside what they replace, and what they promise."""

from __future__ import annotations

import pytest
import torch

import velm_kernels
from tests.pooling.test_modules import compare
from velm_kernels import PerceiverResampler, TokenMerge, unmerge_tokens


@pytest.mark.parametrize("qk_norm", [False, True])
def test_perceiver_resampler_is_idefics(qk_norm):
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": 48}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
    )
    theirs = IdeficsPerceiverResampler(config, 48, 2, 3, 24, 7)
    ours = PerceiverResampler(48, 2, 3, 24, 7, qk_norm=qk_norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 20, 48)

    def same_parameters(x):
        return torch.func.functional_call(theirs, dict(ours.named_parameters()), (x,))

    compare(ours, same_parameters, x)
    lengths = torch.tensor([20, 0, 7])
    live = torch.arange(20) < lengths[:, None]
    short = torch.cat([theirs(x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    padded = torch.where(live[..., None], x, torch.nan).requires_grad_()
    for given in ({"lengths": lengths}, {"mask": live}):
        out = ours(padded, **given)
        torch.testing.assert_close(out, short, rtol=1e-4, atol=1e-5)
        for grad in torch.autograd.grad(out.square().sum(), [padded, *ours.parameters()]):
            assert grad.isfinite().all()
    with pytest.raises(ValueError, match="activation: expected one of relu"):
        PerceiverResampler(48, activation="softplus")


def test_merging_goes_on_from_layer_to_layer():
    x = torch.randn(2, 21, 16)
    merge = TokenMerge(ratio=0.25, protected=1)
    first = merge(x)
    second = merge(first.tokens, first.tokens[..., :8], first)
    assert first.tokens.shape[1] == 16 and second.tokens.shape[1] == 12
    torch.testing.assert_close(second.size.sum(1), torch.full((2,), 21.0))
    means = unmerge_tokens(second.tokens, second.indices)
    for row in range(2):
        for to in range(12):
            group = second.indices[row] == to
            torch.testing.assert_close(means[row, group][0], x[row, group].mean(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(means[:, 0], x[:, 0])
    assert TokenMerge(r=100)(x).tokens.shape[1] == 11
    assert "r=3" in repr(TokenMerge(3)) and "ratio=0.25" in repr(merge)


def test_attention_over_merged_tokens_is_that_over_all():
    """Where equal tokens were merged: each counts as often as its size says."""
    x = torch.randn(2, 5, 24).repeat_interleave(2, 1)
    merged = TokenMerge(r=5)(x)
    assert (merged.size == 2).all()
    merged = merged._replace(size=merged.size * torch.tensor([1.0, 2, 3, 1, 1]))
    repeated = torch.cat([x[:, ::2].repeat_interleave(torch.tensor([1, 2, 3, 1, 1]), 1)] * 2, 1)
    query = torch.randn(2, 3, 4, 8)

    def heads(x):
        return x.unflatten(2, (3, 8)).transpose(1, 2)

    few = heads(merged.tokens)
    out = velm_kernels.cross_attention(query, few, few, bias=TokenMerge.attention_bias(merged))
    torch.testing.assert_close(out, velm_kernels.cross_attention(query, heads(repeated), heads(repeated)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "r: expected one of r and ratio, given None and None"),
        ({"r": 3, "ratio": 0.5}, ValueError, "r: expected one of r and ratio"),
        ({"r": -1}, ValueError, "r: expected at least 0, given -1"),
        ({"r": 1.5}, TypeError, "r: expected an integer"),
        ({"ratio": 0.7}, ValueError, "ratio: expected .* at most 0.5, given 0.7"),
        ({"r": 1, "protected": -1}, ValueError, "protected: expected at least 0, given -1"),
    ],
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        TokenMerge(**given)
