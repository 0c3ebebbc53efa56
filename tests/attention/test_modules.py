"""The attention modules against the same blocks written in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import velm_kernels

A, B = torch.randn(2, 7, 24), torch.randn(2, 9, 16)
MASK_A, MASK_B = torch.rand(2, 7) > 0.3, torch.rand(2, 9) > 0.3
MASK_A[:, 0] = MASK_B[:, 0] = True
STARTS = torch.tensor([[0, 0, 0, 4, 4, 4, 4], [0, 0, 2, 2, 2, 2, 2]])
STOPS = torch.tensor([[0, 4, 4, 9, 9, 9, 9], [0, 0, 6, 6, 6, 6, 6]])


def plain_attention(module: Any, x: Tensor, context: Tensor, visible: Tensor | None) -> Tensor:
    """CrossAttention in plain torch; visible is bool (batch, 1, queries, keys). Rows that see nothing give 0."""

    def heads(projection: nn.Linear, x: Tensor, count: int) -> Tensor:
        x = F.linear(x, projection.weight, projection.bias)
        return x.view(*x.shape[:2], count, module.head_dim).transpose(1, 2)

    query = heads(module.q_proj, x, module.num_heads)
    key, value = (heads(p, context, module.num_kv_heads) for p in (module.k_proj, module.v_proj))
    if module.q_norm_weight is not None:
        query = F.rms_norm(query, query.shape[-1:], module.q_norm_weight, module.norm_eps)
        key = F.rms_norm(key, key.shape[-1:], module.k_norm_weight, module.norm_eps)
    key, value = (t.repeat_interleave(module.num_heads // module.num_kv_heads, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * module.head_dim**-0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    out = scores.softmax(-1).nan_to_num(0.0) @ value
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)


def visible_by_ranges() -> Tensor:
    keys = torch.arange(9)
    return ((keys >= STARTS[..., None]) & (keys < STOPS[..., None]))[:, None]


def plain_gated(module: Any) -> Tensor:
    seen = (STOPS > STARTS)[..., None]
    branch = plain_attention(module.attention, module.attention_norm(A), B, visible_by_ranges())
    x = A + torch.tanh(module.attention_gate) * branch * seen
    up = module.feed_forward.up
    hidden = F.gelu(F.linear(module.feed_forward_norm(x), up.weight, up.bias))
    down = module.feed_forward.down
    return x + torch.tanh(module.feed_forward_gate) * F.linear(hidden, down.weight, down.bias)


def plain_bidirectional(module: Any) -> tuple[Tensor, Tensor]:
    a, b = module.norm_a(A), module.norm_b(B)

    def heads(name: str, x: Tensor) -> Tensor:
        projection = getattr(module, name)
        return F.linear(x, projection.weight, projection.bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    scores = heads("query_a", a) @ heads("query_b", b).transpose(-1, -2)
    scores = scores * (module.inner_dim // module.num_heads) ** -0.5
    over_b = scores.masked_fill(~MASK_B[:, None, None], -torch.inf).softmax(-1) @ heads("value_b", b)
    over_a = scores.transpose(-1, -2).masked_fill(~MASK_A[:, None, None], -torch.inf).softmax(-1) @ heads("value_a", a)
    out_a = F.linear(over_b.transpose(1, 2).flatten(2), module.out_a.weight, module.out_a.bias)
    out_b = F.linear(over_a.transpose(1, 2).flatten(2), module.out_b.weight, module.out_b.bias)
    return a + module.scale_a * out_a, b + module.scale_b * out_b


def plain_co(module: Any) -> tuple[Tensor, Tensor]:
    a = plain_attention(module.attention_a, A, B, MASK_B[:, None, None])
    b = plain_attention(module.attention_b, B, A, MASK_A[:, None, None])
    return module.norm_a(A + a), module.norm_b(B + b)


class Block:
    """How to make a module, call it, and compute the same in plain torch."""

    def __init__(self, make: Callable[..., nn.Module], call: Callable[[Any], Any], plain: Callable[[Any], Any]) -> None:
        self.make, self.call, self.plain = make, call, plain


BLOCKS = {
    "cross": Block(
        lambda **more: velm_kernels.CrossAttention(24, 4, kv_dim=16, **more),
        lambda m: m(A, B, key_mask=MASK_B),
        lambda m: plain_attention(m, A, B, MASK_B[:, None, None]),
    ),
    "cross, grouped, norms, ranges": Block(
        lambda **more: velm_kernels.CrossAttention(24, 4, 16, 2, 8, bias=False, qk_norm=True, **more),
        lambda m: m(A, B, key_ranges=(STARTS, STOPS)),
        lambda m: plain_attention(m, A, B, visible_by_ranges()),
    ),
    "gated": Block(
        lambda **more: velm_kernels.GatedCrossAttention(24, 4, kv_dim=16, **more),
        lambda m: m(A, B, key_ranges=(STARTS, STOPS)),
        plain_gated,
    ),
    "gated, a gate per channel": Block(
        lambda **more: velm_kernels.GatedCrossAttention(24, 4, kv_dim=16, per_channel_gates=True, **more),
        lambda m: m(A, B, key_ranges=(STARTS, STOPS)),
        plain_gated,
    ),
    "co": Block(
        lambda **more: velm_kernels.CoAttention(24, 16, 4, **more),
        lambda m: m(A, B, mask_a=MASK_A, mask_b=MASK_B),
        plain_co,
    ),
    "bidirectional": Block(
        lambda **more: velm_kernels.BidirectionalAttention(24, 16, 32, 4, layer_scale=0.5, **more),
        lambda m: m(A, B, mask_a=MASK_A, mask_b=MASK_B),
        plain_bidirectional,
    ),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def randomised(module: nn.Module) -> nn.Module:
    """Away from the initial values, so that every parameter matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def gradients(outputs: Any, module: nn.Module) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return list(torch.autograd.grad(sum(torch.cos(out).sum() for out in outputs), list(module.parameters())))


@every_block
def test_is_the_plain_block(block: Block) -> None:
    module = randomised(block.make())
    got, expected = block.call(module), block.plain(module)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, ours, theirs in zip(
        [name for name, _ in module.named_parameters()], gradients(got, module), gradients(expected, module)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@every_block
def test_compiles_whole(block: Block) -> None:
    module = randomised(block.make())
    compiled = torch.compile(block.call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module), block.call(module))
    for ours, theirs in zip(gradients(compiled(module), module), gradients(block.call(module), module)):
        torch.testing.assert_close(ours, theirs)


@every_block
def test_state_dict_dtype_device_and_repr(block: Block) -> None:
    module, other = randomised(block.make()), block.make()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(block.call(other), block.call(module), rtol=0, atol=0)
    half = block.make(dtype=torch.bfloat16, device="meta")
    assert all(p.dtype == torch.bfloat16 and p.device.type == "meta" for p in half.parameters())
    assert "num_heads=4" in repr(module)


@every_block
def test_dropout_only_in_training(block: Block) -> None:
    module = randomised(block.make(dropout=0.5))
    torch.testing.assert_close(block.call(module.eval()), block.plain(module), rtol=1e-4, atol=1e-5)
    module.train()
    torch.manual_seed(0)
    first, second = block.call(module), block.call(module)
    torch.manual_seed(0)
    again = block.call(module)
    first, second, again = (out[0] if isinstance(out, tuple) else out for out in (first, second, again))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_new_gated_layer_is_the_identity() -> None:
    module = velm_kernels.GatedCrossAttention(24, 4, kv_dim=16)
    assert torch.equal(module(A, B), A)


def test_key_mass_of_a_module() -> None:
    module = velm_kernels.CrossAttention(24, 4, kv_dim=16)
    out, mass = module(A, B, key_mask=MASK_B, return_key_mass=True)
    assert out.shape == A.shape and mass.shape == (2, 4, 9)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 4), 7.0))
    assert not mass.masked_select(~MASK_B[:, None]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: velm_kernels.CrossAttention(25, 4), "embed_dim: expected a multiple of num_heads = 4, given 25"),
        (lambda: velm_kernels.CrossAttention(24, 4, num_kv_heads=3), "num_heads: expected a multiple of num_kv_heads"),
        (lambda: velm_kernels.CrossAttention(24, 4, dropout=1.0), "dropout: expected a probability in"),
        (lambda: velm_kernels.CoAttention(24, 16, 5), "inner_dim: expected a multiple of num_heads = 5, given 16"),
        (lambda: velm_kernels.BidirectionalAttention(24, 16, 30, 4), "inner_dim: expected a multiple of num_heads"),
    ],
)
def test_bad_sizes(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
