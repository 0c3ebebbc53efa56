"""What ``velm check`` runs: small calls that together reach every feature of every operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import velm_kernels
from velm_kernels.attention.bidirectional_attention import reference as bidirectional_reference
from velm_kernels.attention.cross_attention import reference
from velm_kernels.attention.gated_residual import reference as gated_reference
from velm_kernels.attention.merge_attention import reference as merge_reference
from velm_kernels.fusion import reference as fusion_reference
from velm_kernels.linear.linear import reference as linear_reference
from velm_kernels.pooling import reference as pooling_reference

Inputs = dict[str, Any]


def _as_it_is(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Check:
    """One call of a public function.

    Attributes:
        make: makes float64 inputs from a generator.
        function, reference: the public function and its written meaning, both called with the inputs by name.
        wanted: inputs whose gradients are compared.
        poison: puts NaN and infinity where nothing may be read; gets copies of the inputs.
    """

    operator: str
    name: str
    make: Callable[[torch.Generator], Inputs]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    wanted: tuple[str, ...]
    poison: Callable[[Inputs], Inputs] = _as_it_is


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


B, HEADS, KV, M, N = 2, 4, 2, 37, 75


def _qkv(generator: torch.Generator, heads: int = HEADS, kv: int = HEADS, dim: int = 40, value_dim: int = 24) -> Inputs:
    return {
        "query": _randn(generator, B, M, heads, dim).transpose(1, 2),
        "key": _randn(generator, B, N, kv, dim).transpose(1, 2),
        "value": _randn(generator, B, N, kv, value_dim).transpose(1, 2),
    }


def _seed(seed: int | None) -> Tensor | None:
    return None if seed is None else torch.tensor(seed)


def _reference_attention(extras: bool = False, seed: int | None = None, **inputs: Any) -> Any:
    out, logsumexp, key_mass = reference.cross_attention(seed=_seed(seed), **inputs)
    return (out, logsumexp, key_mass) if extras else out


def _attention(extras: bool = False, **inputs: Any) -> Any:
    return velm_kernels.cross_attention(return_logsumexp=extras, return_key_mass=extras, **inputs)


def _poison_unseen(inputs: Inputs) -> Inputs:
    """NaN in keys and values that no query sees and in queries that see no key."""
    given = {name: inputs[name] for name in ("key_lengths", "key_ranges", "key_mask", "mask") if name in inputs}
    batch, heads, queries, _ = inputs["query"].shape
    kv, keys = inputs["key"].shape[1:3]
    visible = reference.visible_keys(batch, queries, keys, inputs["query"].device, **given)
    visible = visible.expand(batch, heads, queries, keys)
    unseen = ~visible.any(2).unflatten(1, (kv, heads // kv)).any(2)[..., None]
    return inputs | {
        "query": inputs["query"].masked_fill(~visible.any(3)[..., None], torch.nan),
        "key": inputs["key"].masked_fill(unseen, torch.nan),
        "value": inputs["value"].masked_fill(unseen, torch.inf),
    }


QKV = ("query", "key", "value")


def _attention_check(
    name: str, more: Callable[[torch.Generator], Inputs], wanted: tuple[str, ...] = QKV, **shape: int
) -> Check:
    return Check(
        "cross_attention",
        name,
        lambda generator: _qkv(generator, **shape) | more(generator),
        _attention,
        _reference_attention,
        wanted,
        _poison_unseen,
    )


def _nothing(generator: torch.Generator) -> Inputs:
    return {}


def _lengths(generator: torch.Generator) -> Inputs:
    return {"key_lengths": torch.tensor([N - 13, 1])}


def _ranges(generator: torch.Generator) -> Inputs:
    start = torch.randint(0, N, (B, M), generator=generator)
    # Some ranges are empty.
    stop = (start + torch.randint(0, 20, (B, M), generator=generator)).clamp(max=N)
    return {"key_ranges": (start, stop)}


def _masks(generator: torch.Generator) -> Inputs:
    key_mask = torch.rand(B, N, generator=generator) > 0.3
    key_mask[1] = False
    return {"key_mask": key_mask, "mask": torch.rand(B, 1, M, N, generator=generator) > 0.2}


def _bias(generator: torch.Generator) -> Inputs:
    return {"bias": 2 * _randn(generator, 1, HEADS, M, N)}


def _norms(generator: torch.Generator) -> Inputs:
    return {name: 1 + 0.3 * _randn(generator, 40) for name in ("query_norm_weight", "key_norm_weight")}


def _varlen_make(generator: torch.Generator) -> Inputs:
    queries, keys = [20, 0, 17, 5], [31, 9, 0, 70]
    return {
        "query": _randn(generator, sum(queries), HEADS, 40),
        "key": _randn(generator, sum(keys), KV, 40),
        "value": _randn(generator, sum(keys), KV, 24),
        "cu_seqlens_q": torch.tensor([0, *queries]).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor([0, *keys]).cumsum(0).int(),
    }


def _varlen_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[columns], value[columns]))
        outs.append(reference.cross_attention(*parts)[0][0].transpose(0, 1))
    return torch.cat(outs)


def _poison_varlen(inputs: Inputs) -> Inputs:
    """The second sequence has keys but no query, the third a query but no keys."""
    inputs = inputs | {name: inputs[name].clone() for name in QKV}
    inputs["key"][31:40] = torch.nan
    inputs["value"][31:40] = torch.nan
    inputs["query"][20:37] = torch.nan
    return inputs


def _two_ways_make(generator: torch.Generator, masked: bool, dropout: bool) -> Inputs:
    inputs: Inputs = {
        "query_a": _randn(generator, B, M, HEADS, 40).transpose(1, 2),
        "query_b": _randn(generator, B, N, HEADS, 40).transpose(1, 2),
        "value_a": _randn(generator, B, M, HEADS, 24).transpose(1, 2),
        "value_b": _randn(generator, B, N, HEADS, 32).transpose(1, 2),
    }
    if masked:
        inputs["mask_a"] = torch.rand(B, M, generator=generator) > 0.3
        inputs["mask_b"] = torch.rand(B, N, generator=generator) > 0.3
        inputs["mask_b"][1] = False
    if dropout:
        inputs |= {"dropout_p": 0.25, "seed": 7}
    return inputs


def _two_ways_reference(seed: int | None = None, **inputs: Any) -> Any:
    return bidirectional_reference.bidirectional_attention(seed=_seed(seed), **inputs)


def _two_ways(**inputs: Any) -> Any:
    return velm_kernels.bidirectional_attention(return_logsumexp=True, **inputs)


def _poison_two_ways(inputs: Inputs) -> Inputs:
    for side in "ab":
        hidden = ~inputs[f"mask_{side}"][:, None, :, None]
        inputs = inputs | {f"value_{side}": inputs[f"value_{side}"].masked_fill(hidden, torch.nan)}
    return inputs


def _gated_make(generator: torch.Generator, gate: int) -> Inputs:
    return {
        "residual": _randn(generator, B, M, 96),
        "x": _randn(generator, B, M, 96),
        "gate": _randn(generator, gate),
        "row_mask": torch.rand(B, M, generator=generator) > 0.3,
    }


def _poison_gated(inputs: Inputs) -> Inputs:
    return inputs | {"x": inputs["x"].masked_fill(~inputs["row_mask"][..., None], torch.nan)}


def _merge_make(generator: torch.Generator) -> Inputs:
    logsumexps = 3 * _randn(generator, 3, B, HEADS, M)
    logsumexps[1, 0] = -torch.inf
    logsumexps[:, 1, 0, :5] = -torch.inf
    return {"outs": _randn(generator, 3, B, HEADS, M, 24), "logsumexps": logsumexps.float()}


def _poison_merge(inputs: Inputs) -> Inputs:
    return inputs | {"outs": inputs["outs"].masked_fill((inputs["logsumexps"] == -torch.inf)[..., None], torch.nan)}


def _merge(outs: Tensor, logsumexps: Tensor) -> Any:
    return velm_kernels.merge_attention(outs, logsumexps.float())


def _linear_checks() -> list[Check]:
    found = []
    for activation, residual in (("", False), ("gelu", False), ("relu", True)):

        def make(generator: torch.Generator, residual: bool = residual) -> Inputs:
            inputs = {
                "x": _randn(generator, B, M, 70),
                "weight": _randn(generator, 90, 70) * 70**-0.5,
                "bias": _randn(generator, 90),
            }
            return inputs | ({"residual": _randn(generator, B, M, 90)} if residual else {})

        found.append(
            Check(
                "linear",
                (activation or "plain") + (" + residual" if residual else ""),
                make,
                functools.partial(velm_kernels.linear, activation=activation or None),
                functools.partial(linear_reference.linear, activation=activation),
                ("x", "weight", "bias", *(("residual",) if residual else ())),
            )
        )
    return found


def _dropout_make(generator: torch.Generator, residual: bool) -> Inputs:
    names = ("x", "residual") if residual else ("x",)
    return {name: _randn(generator, B * M, 90) for name in names} | {"dropout_p": 0.25, "seed": 7}


def _dropout_reference(x: Tensor, dropout_p: float, seed: int, residual: Tensor | None = None) -> Tensor:
    return fusion_reference.dropout_residual(x, residual, torch.tensor(seed), dropout_p)


def _masked_pool_make(generator: torch.Generator, mode: str) -> Inputs:
    mask = torch.rand(B, N, generator=generator) > 0.3
    mask[1] = False
    return {"x": _randn(generator, B, N, 90), "lengths": torch.tensor([N - 13, N]), "mask": mask, "mode": mode}


def _poison_padding(inputs: Inputs) -> Inputs:
    live = inputs["mask"] & (torch.arange(N) < inputs["lengths"][:, None])
    return inputs | {"x": inputs["x"].masked_fill(~live[..., None], torch.nan)}


def _segment_pool_make(generator: torch.Generator, mode: str) -> Inputs:
    bounds = torch.tensor([0, 20, 20, 150, 151], dtype=torch.int32)
    return {"x": _randn(generator, 151, 90), "cu_seqlens": bounds, "mode": mode}


def _attention_pool_make(generator: torch.Generator, queries: int) -> Inputs:
    mask = torch.rand(B, N, generator=generator) > 0.3
    return {
        "x": _randn(generator, B, N, 80),
        "query": _randn(generator, queries, HEADS * 16),
        "key_weight": _randn(generator, HEADS * 16, 80) * 80**-0.5,
        "value_weight": _randn(generator, HEADS * 16, 80) * 80**-0.5,
        "value_bias": _randn(generator, HEADS * 16),
        "heads": HEADS,
        "lengths": torch.tensor([N - 13, N]),
        "mask": mask,
    }


def _select_tokens_make(generator: torch.Generator) -> Inputs:
    scores = torch.randint(0, 9, (B, N), generator=generator).float()
    return {"x": _randn(generator, B, N, 90), "scores": scores, "k": torch.tensor([20, 31]), "max_k": 40}


def _merge_tokens_make(generator: torch.Generator) -> Inputs:
    metric = torch.randint(-8, 9, (B, N, 40), generator=generator).float()
    size = torch.randint(1, 5, (B, N), generator=generator).float()
    return {"x": _randn(generator, B, N, 90), "metric": metric, "r": N // 3, "size": size, "protected": 1}


def _unmerge_tokens_make(generator: torch.Generator) -> Inputs:
    indices = torch.randint(0, N // 2, (B, N), generator=generator)
    return {"merged": _randn(generator, B, N // 2, 90), "indices": indices}


def _tokens(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: function(**given)[0]


def _pooling_checks() -> list[Check]:
    found = []
    for mode in pooling_reference.MODES:
        make = functools.partial(_masked_pool_make, mode=mode)
        call, written = velm_kernels.masked_pool, pooling_reference.masked_pool
        found.append(Check("masked_pool", mode, make, call, written, ("x",), _poison_padding))
        make = functools.partial(_segment_pool_make, mode=mode)
        found.append(
            Check("segment_pool", mode, make, velm_kernels.segment_pool, pooling_reference.segment_pool, ("x",))
        )
    wanted = ("x", "query", "key_weight", "value_weight", "value_bias")
    for queries, name in ((1, "folded"), (40, "ordinary")):
        make = functools.partial(_attention_pool_make, queries=queries)
        attend, plain = velm_kernels.attention_pool, pooling_reference.attention_pool
        found.append(Check("attention_pool", name, make, attend, plain, wanted, _poison_padding))
    for operator, inputs in (("select_tokens", _select_tokens_make), ("merge_tokens", _merge_tokens_make)):
        ours, theirs = _tokens(getattr(velm_kernels, operator)), _tokens(getattr(pooling_reference, operator))
        found.append(Check(operator, "", inputs, ours, theirs, ("x",)))
    spread, plain_spread = velm_kernels.unmerge_tokens, pooling_reference.unmerge_tokens
    found.append(Check("unmerge_tokens", "", _unmerge_tokens_make, spread, plain_spread, ("merged",)))
    return found


def _bilinear_check(name: str, regions: tuple[int, ...]) -> Check:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": _randn(generator, M, 70),
            "y": _randn(generator, M, *regions, 90),
            "weight": _randn(generator, 30, 70, 90),
            "bias": 10 * _randn(generator, 30),
        }

    def meaning(x: Tensor, **inputs: Tensor) -> Tensor:
        return fusion_reference.bilinear(x[:, None] if regions else x, **inputs)

    return Check("bilinear", name, make, velm_kernels.bilinear, meaning, ("x", "y", "weight", "bias"))


def _factorized_check(layout: str, **options: Any) -> Check:
    def make(generator: torch.Generator) -> Inputs:
        # The root of a sum that cancels would be as inexact as the sum.
        a, b = (_randn(generator, B, M, 90).abs() + 0.1 for _ in range(2))
        return {"a": a, "b": b, "factor": 5, "layout": layout, **options}

    def meaning(seed: int | None = None, **inputs: Any) -> Tensor:
        return fusion_reference.factorized_pool(seed=_seed(seed), **inputs)

    name = ", ".join((layout, *options))
    return Check("factorized_pool", name, make, velm_kernels.factorized_pool, meaning, ("a", "b"))


def _bilinear_attention_checks() -> list[Check]:
    def make(generator: torch.Generator, pooled: bool) -> Inputs:
        k, q_mask = 70, torch.ones(B, M, dtype=torch.bool)
        q_mask[:, 3::4] = False
        inputs: Inputs = {"v": _randn(generator, B, N, k), "q": _randn(generator, B, M, k)}
        if pooled:
            inputs |= {"attention": _randn(generator, B, 3, N, M)}
        else:
            inputs |= {"h": 2 * k**-0.5 * _randn(generator, 3, k), "bias": _randn(generator, 3), "return_logits": True}
        return inputs | {"v_lengths": torch.tensor([N - 13, N]), "q_mask": q_mask}

    def live(v_lengths: Tensor) -> Tensor:
        return torch.arange(N, device=v_lengths.device) < v_lengths[:, None]

    def meaning(
        function: Callable[..., Any], v_lengths: Tensor, q_mask: Tensor, return_logits: bool = True, **inputs: Tensor
    ) -> Any:
        found = function(**inputs, v_live=live(v_lengths), q_live=q_mask)
        # Of pairs that do not count the logits are infinite.
        return found if isinstance(found, Tensor) else (found[0], found[1].clamp(min=-1e4))

    def poison(inputs: Inputs) -> Inputs:
        inputs["v"][~live(inputs["v_lengths"])] = torch.nan
        inputs["q"][~inputs["q_mask"]] = torch.nan
        return inputs

    def attend(**inputs: Any) -> Any:
        maps, logits = velm_kernels.bilinear_attention(**inputs)
        return maps, logits.clamp(min=-1e4)

    return [
        Check(
            "bilinear_attention",
            "masks, with logits",
            functools.partial(make, pooled=False),
            attend,
            functools.partial(meaning, fusion_reference.bilinear_attention),
            ("v", "q", "h", "bias"),
            poison,
        ),
        Check(
            "bilinear_attention_pool",
            "masks",
            functools.partial(make, pooled=True),
            velm_kernels.bilinear_attention_pool,
            functools.partial(meaning, fusion_reference.bilinear_attention_pool),
            ("v", "q", "attention"),
            poison,
        ),
    ]


def _tensor_fusion_check() -> Check:
    dims = (9, 14, 30)

    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {f"x{m}": _randn(generator, M, dim) for m, dim in enumerate(dims)}
        return inputs | {"weight": _randn(generator, 20, 10 * 15 * 31), "bias": 10 * _randn(generator, 20)}

    def apply(function: Callable[..., Tensor], x0: Tensor, x1: Tensor, x2: Tensor, **others: Tensor) -> Tensor:
        return function([x0, x1, x2], **others)

    ours = functools.partial(apply, velm_kernels.tensor_fusion)
    written = functools.partial(apply, fusion_reference.tensor_fusion)
    return Check("tensor_fusion", "three inputs", make, ours, written, ("x0", "x1", "x2", "weight", "bias"))


def _low_rank_check() -> Check:
    dims, rank, out = (9, 30), 3, 20
    names = ("x0", "x1", "factor0", "factor1", "weight", "bias")

    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {"x0": _randn(generator, B, M, dims[0]), "x1": _randn(generator, B, 1, dims[1])}
        for m, dim in enumerate(dims):
            inputs[f"factor{m}"] = _randn(generator, rank, 1 + dim, out) * (1 + dim) ** -0.5
        return inputs | {"weight": _randn(generator, rank), "bias": 3 * _randn(generator, out)}

    def apply(
        function: Callable[..., Tensor], x0: Tensor, x1: Tensor, factor0: Tensor, factor1: Tensor, **others: Tensor
    ) -> Tensor:
        return function([x0, x1], [factor0, factor1], **others)

    ours = functools.partial(apply, velm_kernels.low_rank_fusion)
    written = functools.partial(apply, fusion_reference.low_rank_fusion)
    return Check("low_rank_fusion", "one row for every region", make, ours, written, names)


def _film_check(channels_first: bool) -> Check:
    def make(generator: torch.Generator) -> Inputs:
        x = _randn(generator, B, 90, N) if channels_first else _randn(generator, B, N, 90)
        inputs: Inputs = {"x": x, "gamma": _randn(generator, B, 90), "beta": 3 * _randn(generator, B, 90)}
        return inputs | {"channels_first": channels_first}

    def meaning(x: Tensor, gamma: Tensor, beta: Tensor, channels_first: bool) -> Tensor:
        along = 2 if channels_first else 1
        return fusion_reference.film(x, gamma.unsqueeze(along), beta.unsqueeze(along))

    name = "pixels" if channels_first else "regions"
    return Check("film", name, make, velm_kernels.film, meaning, ("x", "gamma", "beta"))


def _compact_check() -> Check:
    hashes = velm_kernels.make_sketch(70, 200, seed=0), velm_kernels.make_sketch(90, 200, seed=1)

    def make(generator: torch.Generator) -> Inputs:
        return {"x": _randn(generator, B, 70), "y": _randn(generator, B, M, 90)}

    def on(device: torch.device, m: int) -> velm_kernels.Sketch:
        return velm_kernels.Sketch(*(part.to(device) for part in hashes[m]))

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return velm_kernels.compact_bilinear(x, y, on(x.device, 0), on(x.device, 1), 200)

    def meaning(x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y, dtype = x[:, None].to(wide), y.to(wide), x.dtype
        return fusion_reference.compact_bilinear(x, y, on(x.device, 0), on(x.device, 1), 200).to(dtype)

    return Check("compact_bilinear", "one row for every region", make, ours, meaning, ("x", "y"))


def _weighted_sum_check() -> Check:
    def make(generator: torch.Generator) -> Inputs:
        values = {"x0": _randn(generator, B, N, 90), "x1": _randn(generator, B, 90), "x2": _randn(generator, B, N, 90)}
        return values | {"weights": 3 * _randn(generator, B, 3)}

    def ours(x0: Tensor, x1: Tensor, x2: Tensor, weights: Tensor) -> Tensor:
        return velm_kernels.weighted_sum([x0, x1, x2], weights)

    def meaning(x0: Tensor, x1: Tensor, x2: Tensor, weights: Tensor) -> Tensor:
        return fusion_reference.weighted_sum([x0, x1[:, None], x2], weights[:, None])

    return Check("weighted_sum", "regions and rows", make, ours, meaning, ("x0", "x1", "x2", "weights"))


def _fusion_checks() -> list[Check]:
    return [
        _film_check(False),
        _film_check(True),
        _weighted_sum_check(),
        _compact_check(),
        _bilinear_check("pairs of rows", ()),
        _bilinear_check("one row for every region", (5,)),
        *_bilinear_attention_checks(),
        _tensor_fusion_check(),
        _low_rank_check(),
        _factorized_check("outer"),
        _factorized_check("inner", power_norm=True, l2_norm=True),
        _factorized_check("inner", l2_norm=True, dropout_p=0.25, seed=7),
    ]


def checks() -> list[Check]:
    """Every check, operator by operator."""
    two_ways = ("query_a", "query_b", "value_a", "value_b")
    found = [
        _attention_check("plain", _nothing),
        _attention_check("grouped heads, head_dim 64", _nothing, kv=KV, dim=64, value_dim=64),
        _attention_check("logsumexp and key mass", lambda generator: {"extras": True}),
        _attention_check("key_lengths", _lengths),
        _attention_check("key_ranges", _ranges),
        _attention_check("key_mask and mask, empty rows", _masks, kv=KV),
        _attention_check("bias with gradient", _bias, (*QKV, "bias")),
        _attention_check("causal", lambda generator: {"is_causal": True}),
        _attention_check("softcap", lambda generator: {"softcap": 5.0}),
        _attention_check("norms", _norms, (*QKV, "query_norm_weight", "key_norm_weight"), kv=KV),
        _attention_check("dropout", lambda generator: {"dropout_p": 0.25, "seed": 7}),
        Check(
            "cross_attention_varlen",
            "ragged, empty sequences",
            _varlen_make,
            velm_kernels.cross_attention_varlen,
            _varlen_reference,
            QKV,
            _poison_varlen,
        ),
        Check(
            "bidirectional_attention",
            "plain",
            lambda generator: _two_ways_make(generator, False, False),
            _two_ways,
            _two_ways_reference,
            two_ways,
        ),
        Check(
            "bidirectional_attention",
            "masks",
            lambda generator: _two_ways_make(generator, True, False),
            _two_ways,
            _two_ways_reference,
            two_ways,
            _poison_two_ways,
        ),
        Check(
            "bidirectional_attention",
            "dropout",
            lambda generator: _two_ways_make(generator, False, True),
            _two_ways,
            _two_ways_reference,
            two_ways,
        ),
        Check(
            "merge_attention",
            "missing shards",
            _merge_make,
            _merge,
            merge_reference.merge_attention,
            ("outs", "logsumexps"),
            _poison_merge,
        ),
    ]
    for gate in (1, 96):
        found.append(
            Check(
                "gated_residual",
                f"gate of {gate}",
                functools.partial(_gated_make, gate=gate),
                velm_kernels.gated_residual,
                gated_reference.gated_residual,
                ("residual", "x", "gate"),
                _poison_gated,
            )
        )
    for residual in (False, True):
        found.append(
            Check(
                "dropout_residual",
                "with residual" if residual else "alone",
                functools.partial(_dropout_make, residual=residual),
                velm_kernels.dropout_residual,
                _dropout_reference,
                ("x", "residual") if residual else ("x",),
            )
        )
    return found + _linear_checks() + _pooling_checks() + _fusion_checks()
