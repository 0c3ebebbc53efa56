"""Pooling over the tokens of vision towers and text encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Inputs, published


def _randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def _lengths(batch: int, tokens: int) -> Tensor:
    """A quarter of the rows is shorter."""
    lengths = torch.full((batch,), tokens)
    lengths[::4] = 2 * tokens // 3
    return lengths


def masked_case(mode: str, batch: int, tokens: int, dim: int) -> Case:
    lengths = _lengths(batch, tokens)

    def eager(x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        if mode == "mean":
            return (x * mask[..., None]).sum(1) / lengths[:, None].to(x.dtype)
        x = x.masked_fill(~mask[..., None], -torch.inf)
        return x.amax(1) if mode == "max" else x.logsumexp(1)

    read, size = float(lengths.sum()) * dim, float(batch * tokens * dim)
    return Case(
        operator="masked_pool",
        name=f"masked-{mode}",
        shape=f"{batch} x {tokens} x {dim}, {int(lengths.sum())} tokens",
        make=lambda generator: {"x": _randn(generator, batch, tokens, dim), "lengths": lengths},
        wanted=("x",),
        ways={"eager": eager, "velm": lambda x, lengths: velm_kernels.masked_pool(x, lengths, mode=mode)},
        flops=read,
        traffic=read,
        backward_flops=size,
        # Gradients are written, and for the softmax of backward x is read again.
        backward_traffic=size + (read if mode == "logsumexp" else 0.0),
        work=size,
    )


def segments_case(mode: str, segments: int, tokens: int, dim: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        cuts = torch.randint(0, tokens + 1, (segments - 1,), generator=generator).sort().values
        bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).int()
        return {"x": _randn(generator, tokens, dim), "cu_seqlens": bounds}

    def index_add(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().long()
        index = torch.repeat_interleave(lengths, output_size=tokens)
        total = x.new_zeros(segments, dim).index_add(0, index, x)
        return total / lengths.clamp(min=1)[:, None].to(x.dtype)

    def segment_reduce(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.segment_reduce(x, mode, lengths=cu_seqlens.diff().long(), initial=0.0)

    size = float(tokens * dim)
    return Case(
        operator="segment_pool",
        name=f"segment-{mode}",
        shape=f"{segments} segments of {tokens} x {dim}",
        make=make,
        wanted=("x",),
        ways={
            "eager": index_add,
            "segment_reduce": segment_reduce,
            "velm": lambda x, cu_seqlens: velm_kernels.segment_pool(x, cu_seqlens, mode),
        },
        flops=size,
        traffic=size,
        backward_flops=size,
        backward_traffic=size,
        work=size,
        dtypes=(torch.float32,),
    )


def attention_pool_case(name: str, batch: int, tokens: int, dim: int, heads: int, shared: bool) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": _randn(generator, batch, tokens, dim),
            "query": _randn(generator, *(() if shared else (batch,)), 1, dim),
            "key_weight": _randn(generator, dim, dim, scale=dim**-0.5),
            "value_weight": _randn(generator, dim, dim, scale=dim**-0.5),
            "value_bias": _randn(generator, dim),
        }

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, dim // heads)).transpose(-3, -2)

    def ordinary(x: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
        key, value = F.linear(x, key_weight), F.linear(x, value_weight, value_bias)
        out = F.scaled_dot_product_attention(split(query.expand(batch, 1, dim)), split(key), split(value))
        return out.transpose(1, 2).flatten(2)

    def folded(x: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
        by_head = split(query * (dim // heads) ** -0.5).reshape(-1, heads, 1, dim // heads)
        rows = (by_head @ key_weight.view(heads, dim // heads, dim)).squeeze(2)
        pooled = (rows @ x.transpose(1, 2)).softmax(-1) @ x
        value = torch.einsum("bhd,hcd->bhc", pooled, value_weight.view(heads, dim // heads, dim))
        return value.flatten(1)[:, None] + value_bias

    def velm(x: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
        return velm_kernels.attention_pool(x, query, key_weight, value_weight, value_bias=value_bias, heads=heads)

    size = float(batch * tokens * dim)
    # The products with the tokens, and those of the queries with the weights of keys and values.
    outer = 1 if shared else batch
    products, around = 4.0 * heads * size, 2.0 * (outer + batch) * dim * dim
    return Case(
        operator="attention_pool",
        name=name,
        shape=f"{batch} x {tokens} x {dim}, {heads} heads, 1 query",
        make=make,
        wanted=("x", "query", "key_weight", "value_weight", "value_bias"),
        ways={"eager": ordinary, "folded by hand": folded, "velm": velm},
        flops=products + around,
        traffic=size,
        backward_flops=2.5 * products + 2 * around,
        backward_traffic=2 * size,
        work=2 * size,
    )


def select_case(batch: int, tokens: int, dim: int, k: int) -> Case:
    def eager(x: Tensor, scores: Tensor) -> Tensor:
        index = scores.topk(k).indices.sort().values
        return x.gather(1, index[..., None].expand(-1, -1, dim))

    def indexed(x: Tensor, scores: Tensor) -> Tensor:
        index = scores.topk(k).indices.sort().values
        return x[torch.arange(batch, device=x.device)[:, None], index]

    kept = float(batch * k * dim)
    return Case(
        operator="select_tokens",
        name="select",
        shape=f"{k} of {batch} x {tokens} x {dim}",
        # Scores that stay different in every dtype.
        make=lambda generator: {
            "x": _randn(generator, batch, tokens, dim),
            "scores": torch.rand(batch, tokens, generator=generator).argsort(1).double(),
        },
        wanted=("x",),
        ways={
            "eager": lambda x, scores: eager(x, scores.float()),
            "indexed": lambda x, scores: indexed(x, scores.float()),
            "velm": lambda x, scores: velm_kernels.select_tokens(x, scores.float(), k).tokens,
        },
        flops=kept,
        traffic=2 * kept,
        backward_flops=kept,
        backward_traffic=kept + batch * tokens * dim,
        work=kept,
        dtypes=(torch.float32, torch.bfloat16),
    )


def published_merge(x: Tensor, metric: Tensor, r: int, size: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    """ToMe's matching and merge as published, in plain torch; what is left of the first set stays in its order."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    if class_token:
        scores[..., 0, :] = -torch.inf
    largest, match = scores.max(dim=-1)
    order = largest.argsort(dim=-1, descending=True)[..., None]
    left, merged = order[..., r:, :].sort(dim=1).values, order[..., :r, :]
    target = match[..., None].gather(dim=-2, index=merged)

    def merge(x: Tensor) -> Tensor:
        source, to = x[..., ::2, :], x[..., 1::2, :]
        rows, half, features = source.shape
        kept = source.gather(dim=-2, index=left.expand(rows, half - r, features))
        source = source.gather(dim=-2, index=merged.expand(rows, r, features))
        to = to.scatter_reduce(-2, target.expand(rows, r, features), source, reduce="sum")
        return torch.cat([kept, to], dim=1)

    total = merge(size[..., None])
    return merge(x * size[..., None]) / total, total[..., 0]


def merge_case(batch: int, tokens: int, dim: int, metric_dim: int, r: int) -> Case:
    def velm(x: Tensor, metric: Tensor) -> Tensor:
        return velm_kernels.merge_tokens(x, metric.float(), r, protected=1).tokens

    def eager(x: Tensor, metric: Tensor) -> Tensor:
        return published_merge(x, metric.float(), r, x.new_ones(x.shape[:2]), True)[0]

    def make(generator: torch.Generator) -> Inputs:
        # Whole numbers, so that every way finds the same matches in every dtype.
        metric = torch.randint(-8, 9, (batch, tokens, metric_dim), generator=generator).double()
        return {"x": _randn(generator, batch, tokens, dim), "metric": metric}

    size = float(batch * tokens * dim)
    matching = 2.0 * batch * (tokens // 2) ** 2 * metric_dim
    return Case(
        operator="merge_tokens",
        name="merge",
        shape=f"{r} of {batch} x {tokens} x {dim}, metric of {metric_dim}",
        make=make,
        wanted=("x",),
        ways={"eager": eager, "velm": velm},
        flops=matching + 2 * size,
        traffic=2 * size,
        backward_flops=size,
        backward_traffic=2 * size,
        work=size,
        dtypes=(torch.float32, torch.bfloat16),
    )


def cases() -> list[Case]:
    size = published()
    return [
        *(masked_case(mode, **size[f"masked-{mode}"]) for mode in ("mean", "max", "logsumexp")),
        segments_case("mean", 64, 36928, 768),
        select_case(16, 577, 1024, 288),
        merge_case(32, 197, 768, 64, 16),
        merge_case(8, 577, 1024, 64, 23),
        attention_pool_case("siglip-head", 64, 196, 768, 12, shared=True),
        attention_pool_case("clip-rn50-head", 64, 50, 2048, 32, shared=False),
    ]
