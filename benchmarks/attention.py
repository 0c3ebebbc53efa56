"""The attention family at the shapes of models that people run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks import peers
from benchmarks.harness import Case, Inputs, published


def eager(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Attention as it stands in most model files."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1) @ value


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias if visible is None else visible, enable_gqa=query.shape[1] != key.shape[1]
    )


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _heads_last(generator: torch.Generator, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """``(batch, heads, length, head_dim)`` as a projection leaves it in memory."""
    return _randn(generator, batch, length, heads, head_dim).transpose(1, 2)


def attention_case(
    name: str,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    detail: str = "",
    backward: bool = True,
    bias: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs = {
            "query": _heads_last(generator, batch, heads, queries, head_dim),
            "key": _heads_last(generator, batch, kv_heads, keys, head_dim),
            "value": _heads_last(generator, batch, kv_heads, keys, head_dim),
        }
        if bias:
            inputs["bias"] = _randn(generator, 1, heads, queries, keys)
        return inputs

    pairs = batch * heads * queries * keys
    grouped = f" kv{kv_heads}" if kv_heads != heads else ""
    traffic = batch * head_dim * (2 * heads * queries + 2 * kv_heads * keys) + bias * heads * queries * keys
    return Case(
        operator="cross_attention",
        name=name,
        shape=f"B{batch} H{heads}{grouped} M{queries} N{keys} D{head_dim}{detail}",
        make=make,
        wanted=("query", "key", "value", "bias") if bias else ("query", "key", "value"),
        ways={"eager": eager, "sdpa": sdpa, "velm": velm_kernels.cross_attention},
        flops=4.0 * pairs * head_dim,
        traffic=traffic,
        backward_flops=10.0 * pairs * head_dim if backward else None,
        backward_traffic=2.0 * traffic,
        work=pairs,
        gpu_ways=dict(peers.for_bias() if bias else peers.for_plain()),
        reads_only=queries * heads <= keys * kv_heads // 16,
    )


def positions_case(name: str, batch: int, heads: int, queries: int, keys: int, head_dim: int, group: int) -> Case:
    """Decomposed relative positions of a square of tokens, from the tables of a tower (SAM, ViTDet)."""
    side = math.isqrt(keys)
    plain = attention_case(name, batch, heads * group, heads, queries, keys, head_dim, detail=f", grid {side} x {side}")

    def make(generator: torch.Generator) -> Inputs:
        tables = {f"{axis}_table": 0.1 * _randn(generator, 2 * side - 1, head_dim) for axis in ("height", "width")}
        return plain.make(generator) | tables

    def positions(query: Tensor, height_table: Tensor, width_table: Tensor) -> tuple[Tensor, Tensor]:
        return velm_kernels.decomposed_position_bias(query, height_table, width_table, (side, side))

    def formed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, **tables: Tensor) -> Tensor:
            height, width = positions(query, **tables)
            bias = (height[..., :, None] + width[..., None, :]).flatten(-2)
            return attend(query, key, value, bias=bias)

        return run

    def velm(query: Tensor, key: Tensor, value: Tensor, **tables: Tensor) -> Tensor:
        height, width = positions(query, **tables)
        return velm_kernels.cross_attention(query, key, value, rel_pos_height=height, rel_pos_width=width)

    return dataclasses.replace(
        plain,
        make=make,
        wanted=(*plain.wanted, "height_table", "width_table"),
        ways={"eager": formed(eager), "sdpa": formed(sdpa), "velm": velm},
        gpu_ways={},
    )


def ranges_case(batch: int, heads: int, queries: int, images: int, image_tokens: int, head_dim: int) -> Case:
    """Text interleaved with images, each stretch of it tied to the image before it (Flamingo, IDEFICS)."""
    keys = images * image_tokens
    plain = attention_case(
        "idefics-4-images", batch, heads, heads, queries, keys, head_dim, detail=f", {images} images"
    )

    def make(generator: torch.Generator) -> Inputs:
        image = torch.arange(queries) * images // queries
        start = (image * image_tokens).expand(batch, queries).contiguous()
        column = torch.arange(keys)
        visible = (column >= start[..., None]) & (column < start[..., None] + image_tokens)
        return plain.make(generator) | {"visible": visible[:, None], "key_ranges": (start, start + image_tokens)}

    def velm(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, key_ranges: tuple[Tensor, Tensor]) -> Tensor:
        return velm_kernels.cross_attention(query, key, value, key_ranges=key_ranges)

    return Case(
        operator="cross_attention",
        name=plain.name,
        shape=plain.shape,
        make=make,
        wanted=plain.wanted,
        ways={
            "eager": lambda query, key, value, visible, key_ranges: eager(query, key, value, visible=visible),
            "sdpa": lambda query, key, value, visible, key_ranges: sdpa(query, key, value, visible=visible),
            "velm": velm,
        },
        flops=plain.flops / images,
        traffic=plain.traffic,
        backward_flops=(plain.backward_flops or 0.0) / images,
        backward_traffic=plain.backward_traffic,
        work=plain.work,
        gpu_ways=dict(peers.for_ranges()),
    )


def varlen_case(heads: int, head_dim: int, queries: list[int], keys: list[int]) -> Case:
    """Images of different sizes behind each other: the others pad them, or loop."""
    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (queries, keys))
    bounds = list(
        zip(starts_q.tolist()[:-1], starts_q.tolist()[1:], starts_k.tolist()[:-1], starts_k.tolist()[1:], strict=True)
    )

    def make(generator: torch.Generator) -> Inputs:
        return {
            "query": _randn(generator, sum(queries), heads, head_dim),
            "key": _randn(generator, sum(keys), heads, head_dim),
            "value": _randn(generator, sum(keys), heads, head_dim),
            "cu_seqlens_q": starts_q,
            "cu_seqlens_k": starts_k,
        }

    def padded(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
            columns_q, columns_k = (
                torch.arange(max(lengths), device=query.device) < torch.tensor(lengths, device=query.device)[:, None]
                for lengths in (queries, keys)
            )
            many = [
                packed.new_zeros(*columns.shape, heads, head_dim).masked_scatter(columns[..., None, None], packed)
                for packed, columns in ((query, columns_q), (key, columns_k), (value, columns_k))
            ]
            out = attention(*(tensor.transpose(1, 2) for tensor in many), visible=columns_k[:, None, None])
            return out.transpose(1, 2)[columns_q]

        return run

    def loop(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        outs = []
        for q0, q1, k0, k1 in bounds:
            parts = (query[None, q0:q1], key[None, k0:k1], value[None, k0:k1])
            outs.append(sdpa(*(part.transpose(1, 2) for part in parts)).transpose(1, 2)[0])
        return torch.cat(outs)

    pairs = heads * sum(q * k for q, k in zip(queries, keys, strict=True))
    traffic = heads * head_dim * (2.0 * sum(queries) + 2.0 * sum(keys))
    return Case(
        operator="cross_attention_varlen",
        name="ragged-images",
        shape=f"H{heads} D{head_dim}, {len(keys)} images of {min(keys)} to {max(keys)} tokens, M{queries[0]} each",
        make=make,
        wanted=("query", "key", "value"),
        ways={
            "eager": padded(eager),
            "sdpa": padded(sdpa),
            "sdpa-loop": loop,
            "velm": velm_kernels.cross_attention_varlen,
        },
        flops=4.0 * pairs * head_dim,
        traffic=traffic,
        backward_flops=10.0 * pairs * head_dim,
        backward_traffic=2 * traffic,
        work=len(keys) * heads * max(queries) * max(keys),
        gpu_ways=dict(peers.for_varlen(max(queries), max(keys))),
    )


def key_mass_case(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Case:
    plain = attention_case("key-mass", batch, heads, heads, queries, keys, head_dim, backward=False)

    def materialised(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(query @ key.transpose(-1, -2) * head_dim**-0.5, -1)
        return weights @ value, weights.sum(2)

    def velm(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return velm_kernels.cross_attention(query, key, value, return_key_mass=True)

    return Case(
        operator="cross_attention",
        name=plain.name,
        shape=plain.shape,
        make=plain.make,
        wanted=(),
        ways={"eager": materialised, "velm": velm},
        flops=plain.flops + 2.0 * plain.work * head_dim,
        traffic=plain.traffic,
        backward_flops=None,
        work=plain.work,
    )


def bidirectional_case(batch: int, heads: int, a: int, b: int, head_dim: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        lengths = {"query_a": a, "query_b": b, "value_a": a, "value_b": b}
        return {name: _heads_last(generator, batch, heads, length, head_dim) for name, length in lengths.items()}

    def shared(query_a: Tensor, query_b: Tensor, value_a: Tensor, value_b: Tensor) -> tuple[Tensor, Tensor]:
        """One matrix of scores for both directions, as in GLIP and Grounding DINO."""
        scores = query_a @ query_b.transpose(-1, -2) * head_dim**-0.5
        return torch.softmax(scores, -1) @ value_b, torch.softmax(scores.transpose(-1, -2), -1) @ value_a

    def twice(query_a: Tensor, query_b: Tensor, value_a: Tensor, value_b: Tensor) -> tuple[Tensor, Tensor]:
        return sdpa(query_a, query_b, value_b), sdpa(query_b, query_a, value_a)

    pairs = batch * heads * a * b
    traffic = 3.0 * batch * heads * (a + b) * head_dim
    return Case(
        operator="bidirectional_attention",
        name="grounding-dino-fusion",
        shape=f"B{batch} H{heads} A{a} B{b} D{head_dim}",
        make=make,
        wanted=("query_a", "query_b", "value_a", "value_b"),
        ways={"eager": shared, "sdpa": twice, "velm": velm_kernels.bidirectional_attention},
        flops=6.0 * pairs * head_dim,
        traffic=traffic,
        backward_flops=14.0 * pairs * head_dim,
        backward_traffic=2 * traffic,
        work=pairs,
    )


def deformable_case(
    name: str, batch: int, queries: int, heads: int, points: int, height: int, width: int, d: int
) -> Case:
    """Four levels of a picture. In an encoder every token is a query, and samples around itself."""
    shapes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    sizes = [rows * columns for rows, columns in shapes]
    tokens = sum(sizes)

    def make(generator: torch.Generator) -> Inputs:
        reference = torch.rand(batch, queries, 2, generator=generator, dtype=torch.float64)
        if queries == tokens:
            grids = [
                torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns).flip(1)
                for rows, columns in shapes
            ]
            reference = torch.cat(grids).double().expand(batch, -1, -1)
        # Two tokens away, most of them.
        sides = torch.tensor(shapes, dtype=torch.float64).flip(1)[:, None]
        offsets = 2.0 * _randn(generator, batch, queries, heads, len(shapes), points, 2) / sides
        weights = _randn(generator, batch, queries, heads, len(shapes) * points).softmax(-1)
        return {
            "value": _randn(generator, batch, tokens, heads, d),
            "sampling_locations": reference[:, :, None, None, None] + offsets,
            "attention_weights": weights.unflatten(-1, (len(shapes), points)),
        }

    def by_grid_sample(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        """As transformers has it."""
        grids = 2 * sampling_locations - 1
        samples = []
        for level, (rows, columns) in enumerate(shapes):
            of_level = value.split(sizes, 1)[level].permute(0, 2, 3, 1).reshape(batch * heads, d, rows, columns)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
            samples.append(F.grid_sample(of_level, grid, align_corners=False))
        weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
        out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1).view(batch, heads * d, queries)
        return out.transpose(1, 2).contiguous()

    def velm(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        # A list would be copied to a GPU in every call.
        if value.device not in levels:
            levels[value.device] = torch.tensor(shapes, device=value.device)
        return velm_kernels.multiscale_deformable_attention(
            value, levels[value.device], sampling_locations, attention_weights
        )

    levels: dict[torch.device, Tensor] = {}
    samples = float(batch * queries * heads * len(shapes) * points)
    inputs = batch * tokens * heads * d + 3 * samples
    out = float(batch * queries * heads * d)
    return Case(
        operator="multiscale_deformable_attention",
        name=name,
        shape=f"B{batch} H{heads} M{queries} D{d}, {points} of {' + '.join(f'{h} x {w}' for h, w in shapes)} each",
        make=make,
        wanted=("value", "sampling_locations", "attention_weights"),
        ways={"eager": by_grid_sample, "velm": velm},
        # Shares of four corners, their weighted sum; backward a product with each corner and one into it.
        flops=10.0 * samples * d,
        traffic=inputs + out,
        backward_flops=16.0 * samples * d,
        backward_traffic=2 * inputs + out,
        work=samples * d,
    )


def gated_residual_case(batch: int, length: int, dim: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "residual": _randn(generator, batch, length, dim),
            "x": _randn(generator, batch, length, dim),
            "gate": _randn(generator, 1),
            "row_mask": torch.rand(batch, length, generator=generator) > 0.2,
        }

    def plain(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor) -> Tensor:
        return residual + torch.tanh(gate) * (row_mask[..., None] * x)

    size = float(batch * length * dim)
    return Case(
        operator="gated_residual",
        name="gated-residual",
        shape=f"B{batch} M{length} dim {dim}",
        make=make,
        wanted=("residual", "x", "gate"),
        ways={"eager": plain, "velm": velm_kernels.gated_residual},
        flops=3 * size,
        traffic=3 * size,
        backward_flops=4 * size,
        # grad and x are read, grad of x is written; grad of residual is grad itself.
        backward_traffic=3 * size,
        work=size,
    )


def cases() -> list[Case]:
    """At the sizes of the operators' own cases, but for images of eight different sizes."""
    size = published()

    def case(name: str, **form: Any) -> Case:
        sizes: dict[str, Any] = dict(size[name])
        kv_heads = sizes.pop("heads")
        return attention_case(name, heads=kv_heads * sizes.pop("group"), kv_heads=kv_heads, **sizes, **form)

    interleaved, mass, gated = (size[name] for name in ("idefics-4-images", "key-mass", "gated-residual"))
    return [
        case("q-former"),
        case("llama-3.2-vision"),
        ranges_case(
            interleaved["batch"],
            interleaved["heads"],
            interleaved["queries"],
            4,
            interleaved["keys"] // 4,
            interleaved["head_dim"],
        ),
        case("trained-bias", bias=True),
        *(positions_case(name, **size[name]) for name in ("sam-window", "sam-global")),
        varlen_case(16, 64, [64] * 8, [196, 1024, 400, 729, 256, 576, 1369, 900]),
        case("decode", backward=False),
        case("decode-long", backward=False),
        case("decode-wide-group", backward=False),
        case("decode-blip", backward=False),
        key_mass_case(*(mass[name] for name in ("batch", "heads", "queries", "keys", "head_dim"))),
        bidirectional_case(**size["grounding-dino-fusion"]),
        deformable_case("deformable-encoder", **size["deformable-encoder"]),
        deformable_case("deformable-decoder", **size["deformable-decoder"]),
        gated_residual_case(gated["batch"], gated["rows"], gated["dim"]),
    ]
