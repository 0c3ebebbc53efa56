"""The pooling modules beside what they replace, with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import velm_kernels


def compare(ours: nn.Module, theirs, x: Tensor, **given) -> None:
    """Outputs and the gradients of the tokens and of all parameters."""
    results = []
    for function in (lambda x: ours(x, **given), theirs):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        parameters = list(ours.parameters())
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, [leaf, *parameters], upstream)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5)


def attention(module: nn.MultiheadAttention, query: Tensor, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    out, _ = module(query.expand(x.shape[0], -1, -1), x, x, key_padding_mask=hidden, need_weights=False)
    return out


def test_attention_pool_2d_is_clips() -> None:
    ours = velm_kernels.AttentionPool2d(5, 64, 8, 24)
    keys = {"positional_embedding"} | {f"{p}_proj.{n}" for p in "kqvc" for n in ("weight", "bias")}
    assert set(ours.state_dict()) == keys

    def clip(x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + ours.positional_embedding[:, None]
        out, _ = F.multi_head_attention_forward(
            x[:1], x, x, 64, 8, None,
            torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]), None, None, False, 0.0,
            ours.c_proj.weight, ours.c_proj.bias, use_separate_proj_weight=True, need_weights=False,
            q_proj_weight=ours.q_proj.weight, k_proj_weight=ours.k_proj.weight, v_proj_weight=ours.v_proj.weight,
        )  # fmt: skip
        return out[0]

    compare(ours, clip, torch.randn(3, 64, 5, 5))
    with pytest.raises(ValueError, match=r"height \* width = 25, given \(3, 64, 6, 6\)"):
        ours(torch.randn(3, 64, 6, 6))


def test_attention_pool_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of dim = 8, given 3"):
        velm_kernels.AttentionPool(8, 3)
    with pytest.raises(ValueError, match=r"x: expected \(batch, tokens, dim\) with 8 features, given \(2, 5, 7\)"):
        velm_kernels.AttentionPool(8, 2)(torch.randn(2, 5, 7))


def test_probe_pool_is_siglips() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = transformers.SiglipVisionConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4)
    theirs = SiglipMultiheadAttentionPoolingHead(config)
    ours = velm_kernels.ProbePool(48, 4, 96)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 20, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([20, 7, 12])
    short = torch.cat([theirs(x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    padded = torch.where((torch.arange(20) < lengths[:, None])[..., None], x, torch.nan)
    torch.testing.assert_close(ours(padded, lengths), short, rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="activation"):
        velm_kernels.ProbePool(48, 4, 96, activation="softplus")


@pytest.mark.parametrize("context_dim", [32, 48])
@pytest.mark.parametrize("queries", [2, 40])
def test_attentional_pooler_is_open_clips(context_dim: int, queries: int) -> None:
    ours = velm_kernels.AttentionalPooler(32, context_dim, 4, queries)
    weights = ("in_proj_weight",) if context_dim == 32 else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert {f"attn.{name}" for name in weights} < set(ours.state_dict())
    hidden = torch.arange(20) >= torch.tensor([20, 7])[:, None]

    def theirs(x: Tensor) -> Tensor:
        return attention(ours.attn, ours.ln_q(ours.query), ours.ln_k(x), hidden)

    compare(ours, theirs, torch.randn(2, 20, context_dim), mask=~hidden)


def test_attention_pool_is_multi_head_attention() -> None:
    for bias in (True, False):
        ours = velm_kernels.AttentionPool(48, 4, queries=3, bias=bias)
        compare(ours, lambda x, ours=ours: attention(ours.attention, ours.query, x), torch.randn(2, 20, 48))
    lengths, x = torch.tensor([20, 0, 7]), torch.randn(3, 20, 48)
    live = torch.arange(20) < lengths[:, None]
    packed = ours(x[live], cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
    torch.testing.assert_close(packed, ours(x, lengths))


def test_pools_without_parameters() -> None:
    x, lengths = torch.randn(2, 6, 5), torch.tensor([6, 2])
    pool = velm_kernels.MaskedPool("max")
    assert torch.equal(pool(x, lengths), velm_kernels.masked_pool(x, lengths, mode="max"))
    pixels = velm_kernels.MaskedPool("gem", 2.0, channels_first=True)
    torch.testing.assert_close(pixels(x), velm_kernels.masked_pool(x.transpose(1, 2), mode="gem", p=2.0))
    bounds = torch.tensor([0, 1, 6])
    assert torch.equal(velm_kernels.SegmentPool("sum")(x[0], bounds)[1], velm_kernels.masked_pool(x[0, 1:], mode="sum"))
    assert "'max'" in repr(pool) and "'mean'" in repr(velm_kernels.SegmentPool())
    with pytest.raises(ValueError, match="mode"):
        velm_kernels.SegmentPool("median")
