"""One small call of every public operator, and of its features that take a way of their own: what tests over all
operators run; tests/modules.py has those of modules.

Sizes have names, so that a test can change one of them (to 0, to another batch) and make the arguments anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import velm_kernels
from velm_kernels.attention.bidirectional_attention import reference as bidirectional_reference
from velm_kernels.attention.cross_attention import reference as attention_reference
from velm_kernels.attention.gated_residual import reference as gated_reference
from velm_kernels.attention.merge_attention import reference as merge_reference
from velm_kernels.fusion import reference as fusion_reference
from velm_kernels.linear.linear import reference as linear_reference
from velm_kernels.pooling import reference as pooling_reference

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a public operator.

    Attributes:
        operator: name of the public function; case: which of its features.
        make: makes the arguments by name, from a function that makes normally distributed tensors and from the sizes.
        meaning: plain torch, differentiable to any order; takes the same arguments, those of ``seed`` as tensors.
        differentiable: the arguments with a gradient; of a list of tensors, each of them has one.
        sizes: the sizes by name.
        not_zero: sizes that must not be 0.
    """

    operator: str
    case: str
    make: Callable[..., Arguments]
    meaning: Callable[..., Any]
    differentiable: tuple[str, ...]
    sizes: dict[str, int] = field(hash=False)
    not_zero: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator}-{self.case}" if self.case else self.operator

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(velm_kernels, self.operator)

    def arguments(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **sizes: int
    ) -> Arguments:
        """Arguments in ``dtype`` (integers, masks and what must be wider aside), no gradients asked for."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, wide: bool = False) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(torch.promote_types(dtype, torch.float32) if wide else dtype)

        made = self.make(normal, **(self.sizes | sizes))
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, made)

    def leaves(self, arguments: Arguments) -> list[Tensor]:
        """The tensors of ``arguments`` that have a gradient."""
        return [leaf for name in self.differentiable for leaf in tree_flatten(arguments[name])[0]]

    def with_leaves(self, arguments: Arguments, leaves: list[Tensor]) -> Arguments:
        """``arguments`` with other tensors in place of those that :meth:`leaves` lists."""
        left, changed = iter(leaves), dict(arguments)
        for name in self.differentiable:
            flat, spec = tree_flatten(arguments[name])
            changed[name] = tree_unflatten([next(left) for _ in flat], spec)
        return changed

    def requiring_gradients(self, arguments: Arguments) -> Arguments:
        return self.with_leaves(arguments, [leaf.detach().clone().requires_grad_() for leaf in self.leaves(arguments)])

    def exact(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The results by the written meaning, as the public function orders them."""
        given = dict(arguments)
        if isinstance(given.get("seed"), int):
            given["seed"] = torch.tensor(given["seed"])
        return results(self.meaning(**given))


def results(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def differentiable_results(value: Any) -> list[Tensor]:
    return [result for result in results(value) if result.requires_grad]


def _without(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """``function`` that ignores the arguments ``names``."""

    def call(**given: Any) -> Any:
        return function(**{name: value for name, value in given.items() if name not in names})

    return call


def _attention(return_logsumexp: bool = False, return_key_mass: bool = False, **given: Any) -> Any:
    out, logsumexp, mass = attention_reference.cross_attention(**given)
    extras = [value for wanted, value in ((return_logsumexp, logsumexp), (return_key_mass, mass)) if wanted]
    return (out, *extras) if extras else out


def _heads(normal: Any, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    return normal(batch, rows, heads, dim).transpose(1, 2)


def _plain_attention(normal: Any, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {
        "query": _heads(normal, batch, heads, queries, head_dim),
        "key": _heads(normal, batch, heads, keys, head_dim),
        "value": _heads(normal, batch, heads, keys, head_dim),
    }


def _full_attention(normal: Any, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    start = torch.arange(queries).expand(batch, queries) % max(keys, 1)
    return {
        "query": _heads(normal, batch, 2 * heads, queries, head_dim),
        "key": _heads(normal, batch, heads, keys, head_dim),
        "value": _heads(normal, batch, heads, keys, 12),
        "key_lengths": torch.full((batch,), max(keys - 1, 0)),
        "key_ranges": (start.clamp(max=keys), (start + 5).clamp(max=keys)),
        "key_mask": (torch.arange(keys) % 4 != 3).expand(batch, keys),
        "bias": normal(1, 2 * heads, queries, keys),
        "softcap": 5.0,
        "query_norm_weight": 1 + 0.1 * normal(head_dim),
        "key_norm_weight": 1 + 0.1 * normal(head_dim),
        "return_logsumexp": True,
        "return_key_mass": True,
    }


def _packed_attention(normal: Any, sequences: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {
        "query": normal(sequences * queries, heads, head_dim),
        "key": normal(sequences * keys, heads, head_dim),
        "value": normal(sequences * keys, heads, head_dim),
        "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32) * queries,
        "cu_seqlens_k": torch.arange(sequences + 1, dtype=torch.int32) * keys,
        "is_causal": True,
    }


def _packed_meaning(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **given: Any
) -> Tensor:
    outs = [query[:0, :, :1] * key[:0, :1, :1].sum(0) * value.sum((0, 1))]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[columns], value[columns]))
        outs.append(attention_reference.cross_attention(*parts, **given)[0][0].transpose(0, 1))
    return torch.cat(outs)


def _two_ways(normal: Any, batch: int, heads: int, a: int, b: int, head_dim: int) -> Arguments:
    return {
        "query_a": _heads(normal, batch, heads, a, head_dim),
        "query_b": _heads(normal, batch, heads, b, head_dim),
        "value_a": _heads(normal, batch, heads, a, 12),
        "value_b": _heads(normal, batch, heads, b, 20),
        "mask_a": (torch.arange(a) % 4 != 3).expand(batch, a),
        "return_logsumexp": True,
    }


def _gated(normal: Any, batch: int, rows: int, dim: int) -> Arguments:
    mask = (torch.arange(rows) % 4 != 3).expand(batch, rows)
    return {"residual": normal(batch, rows, dim), "x": normal(batch, rows, dim), "gate": normal(dim), "row_mask": mask}


def _shards(normal: Any, batch: int, heads: int, queries: int, head_dim: int) -> Arguments:
    return {
        "outs": [_heads(normal, batch, heads, queries, head_dim) for _ in range(3)],
        "logsumexps": [normal(batch, heads, queries, wide=True) for _ in range(3)],
    }


def _merge_meaning(outs: list[Tensor], logsumexps: list[Tensor]) -> Any:
    return merge_reference.merge_attention(torch.stack(outs), torch.stack(logsumexps))


def _linear(normal: Any, batch: int, rows: int, features: int, out: int) -> Arguments:
    return {
        "x": normal(batch, rows, features),
        "weight": normal(out, features),
        "bias": normal(out),
        "activation": "gelu",
        "residual": normal(batch, rows, out),
    }


def _plain_linear(normal: Any, batch: int, rows: int, features: int, out: int) -> Arguments:
    return {"x": normal(batch, rows, features), "weight": normal(out, features), "bias": normal(out)}


def _pooled(mode: str) -> Callable[..., Arguments]:
    def make(normal: Any, batch: int, tokens: int, dim: int) -> Arguments:
        lengths = torch.full((batch,), max(tokens - 2, 0))
        mask = (torch.arange(tokens) % 3 != 0).expand(batch, tokens)
        return {"x": normal(batch, tokens, dim), "lengths": lengths, "mask": mask, "mode": mode}

    return make


def _pixels(normal: Any, batch: int, height: int, width: int, dim: int) -> Arguments:
    return {"x": normal(batch, dim, height, width), "channels_first": True}


def _segments(normal: Any, segments: int, tokens: int, dim: int) -> Arguments:
    bounds = torch.arange(segments + 1, dtype=torch.int32) * tokens
    return {"x": normal(segments * tokens, dim), "cu_seqlens": bounds, "mode": "max"}


def _attention_pool(queries: int) -> Callable[..., Arguments]:
    def make(normal: Any, batch: int, tokens: int, dim: int, head_dim: int) -> Arguments:
        return {
            "x": normal(batch, tokens, dim),
            "query": normal(queries, 2 * head_dim),
            "key_weight": normal(2 * head_dim, dim) * max(dim, 1) ** -0.5,
            "value_weight": normal(2 * head_dim, dim) * max(dim, 1) ** -0.5,
            "key_bias": normal(2 * head_dim),
            "value_bias": normal(2 * head_dim),
            "heads": 2,
            "lengths": torch.full((batch,), max(tokens - 2, 0)),
        }

    return make


def _packed_pool_meaning(x: Tensor, **others: Any) -> Tensor:
    if len(others["cu_seqlens"]) > 1:
        return pooling_reference.attention_pool(x, **others)
    query, value_weight = others["query"], others["value_weight"]
    return x.sum() + query.sum() + value_weight.new_zeros(0, len(query), len(value_weight))


def _packed_pool(normal: Any, segments: int, tokens: int, dim: int, head_dim: int) -> Arguments:
    arguments = _attention_pool(1)(normal, segments * tokens, 1, dim, head_dim)
    del arguments["lengths"]
    bounds = torch.arange(segments + 1, dtype=torch.int32) * tokens
    return arguments | {"x": arguments["x"].flatten(0, 1), "cu_seqlens": bounds}


def _selected(normal: Any, batch: int, tokens: int, dim: int) -> Arguments:
    return {"x": normal(batch, tokens, dim), "scores": normal(batch, tokens), "k": tokens // 2}


def _select_meaning(x: Tensor, scores: Tensor, k: int) -> Any:
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values
    taken = x.gather(1, indices[..., None].expand(*indices.shape, x.shape[-1]))
    return taken, indices, torch.full(scores.shape[:-1], k, dtype=torch.int32)


def _merged(normal: Any, batch: int, tokens: int, dim: int, metric_dim: int) -> Arguments:
    return {
        "x": normal(batch, tokens, dim),
        "metric": normal(batch, tokens, metric_dim),
        "r": max(tokens - 1, 0) // 2,
        "size": 1 + normal(batch, tokens).square(),
        "protected": min(1, tokens),
    }


def _merge_tokens_meaning(x: Tensor, metric: Tensor, r: int, size: Tensor, protected: int) -> Any:
    batch, tokens = size.shape
    if batch and tokens:
        return pooling_reference.merge_tokens(x, metric, r, size, protected)
    none = x[:, : tokens - r] * size[:, : tokens - r, None]
    return none, size[:, : tokens - r], torch.zeros(batch, tokens, dtype=torch.long)


def _unmerged(normal: Any, batch: int, tokens: int, merged: int, dim: int) -> Arguments:
    indices = torch.arange(tokens if merged else 0).expand(batch, tokens if merged else 0) % max(merged, 1)
    return {"merged": normal(batch, merged, dim), "indices": indices}


def _shuffled(normal: Any, batch: int, rows: int, dim: int, out: int) -> Arguments:
    arguments = {"x": normal(batch, 4 * rows * rows, dim), "height": 2 * rows, "width": 2 * rows, "factor": 2}
    return arguments | {"weight": normal(out, 4 * dim), "bias": normal(out)}


def _shuffle_meaning(x: Tensor, height: int, width: int, factor: int, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, dim = x.shape
    map_ = x.view(batch, height // factor, factor, width // factor, factor, dim).permute(0, 1, 3, 2, 4, 5)
    squares = map_.reshape(batch, height * width // factor**2, factor**2 * dim)
    return torch.nn.functional.linear(squares, weight, bias)


def _bilinear(normal: Any, batch: int, dx: int, dy: int, out: int) -> Arguments:
    return {"x": normal(batch, dx), "y": normal(batch, dy), "weight": normal(out, dx, dy), "bias": normal(out)}


def _bilinear_regions(normal: Any, batch: int, regions: int, dx: int, dy: int, out: int) -> Arguments:
    arguments = _bilinear(normal, batch, dx, dy, out)
    return arguments | {"y": normal(batch, regions, dy)}


def _bilinear_meaning(x: Tensor, y: Tensor, **others: Tensor) -> Tensor:
    return fusion_reference.bilinear(x[:, None] if y.dim() == 3 else x, y, **others)


def _maps(normal: Any, batch: int, regions: int, words: int, k: int, glimpses: int) -> Arguments:
    return {
        "v": normal(batch, regions, k),
        "q": normal(batch, words, k),
        "h": normal(glimpses, k) * max(k, 1) ** -0.5,
        "bias": normal(glimpses),
        "v_lengths": torch.full((batch,), max(regions - 1, 0)),
        "q_mask": (torch.arange(words) % 4 != 3).expand(batch, words),
        "return_logits": True,
    }


def _maps_meaning(function: Callable[..., Any], v: Tensor, **given: Any) -> Any:
    given.pop("return_logits", None)
    v_live = torch.arange(v.shape[1]) < given.pop("v_lengths")[:, None]
    return function(v=v, v_live=v_live, q_live=given.pop("q_mask"), **given)


def _map_pool(normal: Any, batch: int, regions: int, words: int, k: int, glimpses: int) -> Arguments:
    arguments = _maps(normal, batch, regions, words, k, glimpses)
    kept = {name: arguments[name] for name in ("v", "q", "v_lengths", "q_mask")}
    return kept | {"attention": normal(batch, glimpses, regions, words)}


def _fused(normal: Any, batch: int, d0: int, d1: int, d2: int, out: int) -> Arguments:
    weight = normal(out, (1 + d0) * (1 + d1) * (1 + d2))
    return {"inputs": [normal(batch, d0), normal(batch, d1), normal(batch, d2)], "weight": weight, "bias": normal(out)}


def _low_rank(normal: Any, batch: int, regions: int, d0: int, d1: int, out: int, rank: int) -> Arguments:
    return {
        "inputs": [normal(batch, regions, d0), normal(batch, d1)],
        "factors": [normal(rank, 1 + d0, out), normal(rank, 1 + d1, out)],
        "weight": normal(rank),
        "bias": normal(out),
    }


def _low_rank_meaning(inputs: list[Tensor], **others: Any) -> Tensor:
    return fusion_reference.low_rank_fusion([inputs[0], inputs[1][:, None]], **others)


def _film(normal: Any, batch: int, regions: int, dim: int) -> Arguments:
    return {"x": normal(batch, regions, dim), "gamma": normal(batch, dim), "beta": normal(batch, dim)}


def _film_pixels(normal: Any, batch: int, height: int, width: int, dim: int) -> Arguments:
    given = {"gamma": normal(batch, dim), "beta": normal(batch, dim), "channels_first": True, "gamma_offset": 1.0}
    return {"x": normal(batch, dim, height, width), **given}


def _film_meaning(
    x: Tensor, gamma: Tensor, beta: Tensor, channels_first: bool = False, gamma_offset: float = 0.0
) -> Tensor:
    gamma, beta = (value[:, :, None, None] if channels_first else value[:, None] for value in (gamma, beta))
    return fusion_reference.film(x, gamma, beta, gamma_offset)


def _weighted(normal: Any, batch: int, regions: int, dim: int) -> Arguments:
    features = [normal(batch, regions, dim), normal(batch, dim), normal(batch, regions, dim)]
    return {"features": features, "weights": normal(batch, 3)}


def _weighted_meaning(features: list[Tensor], weights: Tensor) -> Tensor:
    return fusion_reference.weighted_sum(
        [value[:, None] if value.dim() == 2 else value for value in features], weights[:, None]
    )


def _compact(normal: Any, batch: int, regions: int, dx: int, dy: int, dim: int) -> Arguments:
    return {
        "x": normal(batch, dx),
        "y": normal(batch, regions, dy),
        "sketch_x": velm_kernels.make_sketch(dx, dim, seed=1),
        "sketch_y": velm_kernels.make_sketch(dy, dim, seed=2),
        "dim": dim,
    }


def _compact_meaning(x: Tensor, y: Tensor, dim: int, **others: Any) -> Tensor:
    if not y.numel():  # nothing that torch.fft would take, or nothing to convolve with
        return (x.sum() + y.sum()) * y.new_zeros(*y.shape[:2], dim)
    return fusion_reference.compact_bilinear(x[:, None], y, dim=dim, **others)


def _dropped(normal: Any, batch: int, rows: int, dim: int) -> Arguments:
    return {"x": normal(batch, rows, dim), "residual": normal(batch, rows, dim), "dropout_p": 0.25, "seed": 7}


def _dropped_meaning(x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    rows = [value.reshape(-1, x.shape[-1]) if x.numel() else value.reshape(0, x.shape[-1]) for value in (x, residual)]
    return fusion_reference.dropout_residual(*rows, seed, dropout_p).view(x.shape)


def _factorized(normal: Any, batch: int, regions: int, dim: int) -> Arguments:
    a, b = normal(batch, regions, 3 * dim), normal(batch, 1, 3 * dim)
    # The root of a sum that cancels is as inexact as the sum.
    return {"a": a.abs() + 0.1, "b": b.abs() + 0.1, "factor": 3, "power_norm": True, "l2_norm": True}


def _outer(normal: Any, batch: int, dx: int, dy: int) -> Arguments:
    return {"x": normal(batch, dx), "y": normal(batch, dy)}


def _outer_regions(normal: Any, batch: int, regions: int, dx: int, dy: int) -> Arguments:
    mask = (torch.arange(regions) % 4 != 3).expand(batch, regions)
    return {"x": normal(batch, regions, dx), "y": normal(batch, regions, dy), "mask": mask}


_QKV = ("query", "key", "value")
_HEADS = {"heads": 2, "head_dim": 16}
_POOL = ("x", "query", "key_weight", "value_weight", "key_bias", "value_bias")

CALLS = [
    Call(
        "cross_attention", "", _plain_attention, _attention, _QKV,
        {"batch": 2, "queries": 5, "keys": 9, **_HEADS}, ("heads", "head_dim"),
    ),
    Call(
        "cross_attention", "everything", _full_attention, _attention,
        (*_QKV, "bias", "query_norm_weight", "key_norm_weight"),
        {"batch": 2, "queries": 5, "keys": 9, **_HEADS}, ("heads", "head_dim"),
    ),
    Call(
        "cross_attention_varlen", "", _packed_attention, _packed_meaning, _QKV,
        {"sequences": 3, "queries": 5, "keys": 9, **_HEADS}, ("heads", "head_dim"),
    ),
    Call(
        "bidirectional_attention", "", _two_ways,
        _without(bidirectional_reference.bidirectional_attention, "return_logsumexp"),
        ("query_a", "query_b", "value_a", "value_b"),
        {"batch": 2, "a": 5, "b": 9, **_HEADS}, ("head_dim",),
    ),
    Call(
        "gated_residual", "", _gated, gated_reference.gated_residual, ("residual", "x", "gate"),
        {"batch": 2, "rows": 5, "dim": 12},
    ),
    Call(
        "merge_attention", "", _shards, _merge_meaning, ("outs", "logsumexps"),
        {"batch": 2, "queries": 5, **_HEADS},
    ),
    Call(
        "linear", "", _plain_linear, linear_reference.linear, ("x", "weight", "bias"),
        {"batch": 2, "rows": 5, "features": 12, "out": 8},
    ),
    Call(
        "linear", "gelu", _linear, linear_reference.linear, ("x", "weight", "bias", "residual"),
        {"batch": 2, "rows": 5, "features": 12, "out": 8},
    ),
    *(
        Call(
            "masked_pool", mode, _pooled(mode), pooling_reference.masked_pool, ("x",),
            {"batch": 2, "tokens": 7, "dim": 12},
        )
        for mode in pooling_reference.MODES
    ),
    Call(
        "masked_pool", "pixels", _pixels, pooling_reference.masked_pool, ("x",),
        {"batch": 2, "height": 3, "width": 4, "dim": 12},
    ),
    Call(
        "segment_pool", "", _segments, pooling_reference.segment_pool, ("x",), {"segments": 3, "tokens": 4, "dim": 12}
    ),
    Call(
        "attention_pool", "folded", _attention_pool(1), pooling_reference.attention_pool, _POOL,
        {"batch": 2, "tokens": 7, "dim": 12, "head_dim": 8}, ("head_dim",),
    ),
    Call(
        "attention_pool", "ordinary", _attention_pool(20), pooling_reference.attention_pool, _POOL,
        {"batch": 2, "tokens": 7, "dim": 12, "head_dim": 8}, ("head_dim",),
    ),
    Call(
        "attention_pool", "packed", _packed_pool, _packed_pool_meaning, _POOL,
        {"segments": 2, "tokens": 7, "dim": 12, "head_dim": 8}, ("head_dim",),
    ),
    Call("select_tokens", "", _selected, _select_meaning, ("x",), {"batch": 2, "tokens": 8, "dim": 12}),
    Call(
        "merge_tokens", "", _merged, _merge_tokens_meaning, ("x", "size"),
        {"batch": 2, "tokens": 9, "dim": 12, "metric_dim": 6},
    ),
    Call(
        "unmerge_tokens", "", _unmerged, pooling_reference.unmerge_tokens, ("merged",),
        {"batch": 2, "tokens": 8, "merged": 3, "dim": 12},
    ),
    Call(
        "pixel_shuffle_tokens", "", _shuffled, _shuffle_meaning, ("x", "weight", "bias"),
        {"batch": 2, "rows": 3, "dim": 4, "out": 8}, ("rows",),
    ),
    Call(
        "bilinear", "", _bilinear, _bilinear_meaning, ("x", "y", "weight", "bias"),
        {"batch": 5, "dx": 4, "dy": 6, "out": 8},
    ),
    Call(
        "bilinear", "regions", _bilinear_regions, _bilinear_meaning, ("x", "y", "weight", "bias"),
        {"batch": 3, "regions": 5, "dx": 4, "dy": 6, "out": 8},
    ),
    Call(
        "bilinear_attention", "", _maps,
        lambda **given: _maps_meaning(fusion_reference.bilinear_attention, **given), ("v", "q", "h", "bias"),
        {"batch": 2, "regions": 5, "words": 4, "k": 12, "glimpses": 3},
    ),
    Call(
        "bilinear_attention_pool", "", _map_pool,
        lambda **given: _maps_meaning(fusion_reference.bilinear_attention_pool, **given), ("v", "q", "attention"),
        {"batch": 2, "regions": 5, "words": 4, "k": 12, "glimpses": 3},
    ),
    Call(
        "tensor_fusion", "", _fused, fusion_reference.tensor_fusion, ("inputs", "weight", "bias"),
        {"batch": 3, "d0": 3, "d1": 4, "d2": 5, "out": 8},
    ),
    Call(
        "low_rank_fusion", "", _low_rank, _low_rank_meaning, ("inputs", "factors", "weight", "bias"),
        {"batch": 3, "regions": 5, "d0": 6, "d1": 4, "out": 8, "rank": 2},
    ),
    Call("film", "", _film, _film_meaning, ("x", "gamma", "beta"), {"batch": 2, "regions": 5, "dim": 12}),
    Call(
        "film", "pixels", _film_pixels, _film_meaning, ("x", "gamma", "beta"),
        {"batch": 2, "height": 3, "width": 4, "dim": 12},
    ),
    Call(
        "weighted_sum", "", _weighted, _weighted_meaning, ("features", "weights"),
        {"batch": 2, "regions": 5, "dim": 12},
    ),
    Call(
        "compact_bilinear", "", _compact, _compact_meaning, ("x", "y"),
        {"batch": 2, "regions": 5, "dx": 6, "dy": 8, "dim": 16}, ("dim",),
    ),
    Call(
        "dropout_residual", "", _dropped, _dropped_meaning, ("x", "residual"), {"batch": 2, "rows": 5, "dim": 12}
    ),
    Call(
        "factorized_pool", "", _factorized, fusion_reference.factorized_pool, ("a", "b"),
        {"batch": 2, "regions": 5, "dim": 4},
    ),
    Call("outer_product_fusion", "", _outer, fusion_reference.outer_product_fusion, ("x", "y"),
        {"batch": 3, "dx": 4, "dy": 6},
    ),
    Call(
        "outer_product_fusion", "regions", _outer_regions, fusion_reference.outer_product_fusion, ("x", "y"),
        {"batch": 3, "regions": 5, "dx": 4, "dy": 6},
    ),
]  # fmt: skip


def public_operators() -> set[str]:
    """The names of all functions of the library that take tensors."""
    others = {"explain", "use_backend", "patch", "unpatch", "make_sketch"}
    return {name for name in velm_kernels.__all__ if inspect.isfunction(getattr(velm_kernels, name))} - others


assert {call.operator for call in CALLS} == public_operators()
