from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from velm_kernels import BilinearAttention, BilinearAttentionPool


def _layers(in_features, out_features, dropout):
    """The projection of the published network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(in_features, out_features), dim=None)
    net = nn.Module()
    net.main = nn.Sequential(*[nn.Dropout(dropout)] * (dropout > 0), layer, nn.ReLU())
    return net


class _Published(nn.Module):
    def __init__(self, v_dim, q_dim, features, glimpses, dropout):
        super().__init__()
        self.logits = nn.Module()
        self.logits.v_net, self.logits.q_net = (_layers(dim, features, dropout) for dim in (v_dim, q_dim))
        self.logits.h_mat = nn.Parameter(torch.randn(1, glimpses, 1, features))
        self.logits.h_bias = nn.Parameter(torch.randn(1, glimpses, 1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.logits, "h_mat", dim=None)
        self.logits.forward = lambda v, q: (
            torch.einsum("xhyk,bvk,bqk->bhvq", self.logits.h_mat, self.logits.v_net.main(v), self.logits.q_net.main(q))
            + self.logits.h_bias
        )

    def forward(self, v, q):
        logits = self.logits(v, q)
        hidden = (v.abs().sum(2) == 0)[:, None, :, None].expand(logits.shape)
        logits = logits.masked_fill(hidden, -torch.inf)
        return logits.flatten(2).softmax(2).view(logits.shape), logits


@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_equals_the_published_attention(dropout):
    theirs = _Published(9, 7, 3 * 5, 4, dropout).eval()
    ours = BilinearAttention(9, 7, 5, 4, dropout=(dropout, 0.5)).eval()
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    v, q = torch.randn(3, 6, 9), torch.randn(3, 4, 7)
    v[1, 2:], v[2, 5] = 0.0, 0.0
    results = []
    for module in (ours, theirs):
        leaves = [value.clone().requires_grad_() for value in (v, q)]
        maps, logits = module(*leaves)
        (maps.square().sum() + logits.clamp(min=-5).sum()).backward()
        found = {name: value.grad for name, value in module.named_parameters()}
        results.append(found | {"maps": maps, "logits": logits, "v": leaves[0].grad, "q": leaves[1].grad})
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_equals_the_published_pooling():
    ours = BilinearAttentionPool(9, 7, 5, factor=3).eval()
    theirs = nn.Module()
    theirs.v_net, theirs.q_net = _layers(9, 15, 0.2).eval(), _layers(7, 15, 0.2).eval()
    theirs.load_state_dict(ours.state_dict())
    v, q, maps = torch.randn(3, 6, 9), torch.randn(3, 4, 7), torch.rand(3, 2, 6, 4)
    pooled = torch.einsum("bvk,bgvq,bqk->bgk", theirs.v_net.main(v), maps, theirs.q_net.main(q))
    pooled = nn.functional.avg_pool1d(pooled, 3, 3) * 3
    torch.testing.assert_close(ours(v, q, maps), pooled)
    torch.testing.assert_close(ours(v, q, maps[:, 1]), pooled[:, 1])


def test_padding_reaches_no_weight():
    attention, pool = BilinearAttention(9, 7, 5, 2).eval(), BilinearAttentionPool(9, 7, 5).eval()
    v, q = torch.randn(2, 6, 9), torch.randn(2, 4, 7)
    lengths, q_mask = torch.tensor([4, 6]), torch.tensor([[True, False, True, True]])
    results = []
    for poison in (0.0, torch.nan):
        v[0, 4:], q[:, 1] = poison, poison
        maps, _ = attention(v, q, None, q_mask, v_lengths=lengths)
        out = pool(v, q, maps, v_lengths=lengths, q_mask=q_mask)
        parameters = [p for p in (*attention.parameters(), *pool.parameters()) if p is not attention.logits.h_bias]
        results.append([maps, out, *torch.autograd.grad(out.square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all() and torch.equal(a, b)


def test_dropout_only_in_training_and_bad_arguments():
    module = BilinearAttention(9, 7, 5, 2)
    v, q = torch.randn(2, 6, 9), torch.randn(2, 4, 7)
    assert not torch.equal(module(v, q)[0], module(v, q)[0])
    module.eval()
    assert torch.equal(module(v, q)[0], module(v, q, None)[0])
    with pytest.raises(ValueError, match=r"dropout: expected two probabilities in \[0, 1\), given list of 1"):
        BilinearAttention(9, 7, 5, 2, dropout=[0.2])
    with pytest.raises(ValueError, match="dropout: "):
        BilinearAttentionPool(9, 7, 5, dropout=1.0)
