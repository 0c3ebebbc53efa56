"""What cross_attention and cross_attention_varlen are tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.cross_attention import reference
from velm_kernels.cases import Arguments, Case, Draw

_QKV = ("query", "key", "value")
_MASKS = ("key_lengths", "key_ranges", "key_mask", "mask", "is_causal")


def _heads(draw: Draw, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    return draw(batch, rows, heads, dim).transpose(1, 2)


def _plain(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 1) -> Arguments:
    return {
        "query": _heads(draw, batch, group * heads, queries, head_dim),
        "key": _heads(draw, batch, heads, keys, head_dim),
        "value": _heads(draw, batch, heads, keys, head_dim),
    }


def _with(*features: Callable[..., Arguments]) -> Callable[..., Arguments]:
    """Plain arguments and those of ``features``, each made from the draw, batch, heads, queries, keys and head_dim."""

    def make(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 1) -> Arguments:
        arguments = _plain(draw, batch, heads, queries, keys, head_dim, group)
        for feature in features:
            arguments |= feature(draw, batch, group * heads, queries, keys, head_dim)
        return arguments

    return make


def _always(**options: Any) -> Callable[..., Arguments]:
    return lambda *sizes: options


def _lengths(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {"key_lengths": (keys - torch.arange(batch) * keys // 2).clamp(min=0)}


def _ranges(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    start = draw.integers(0, keys, batch, queries)
    # Some ranges are empty.
    return {"key_ranges": (start, (start + draw.integers(0, 20, batch, queries)).clamp(max=keys))}


def _masks(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {"key_mask": draw.mask(batch, keys), "mask": draw.mask(batch, 1, queries, keys, share=0.8)}


def _bias(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {"bias": 2 * draw(1, heads, queries, keys)}


def _norms(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {name: 1 + 0.3 * draw(head_dim) for name in ("query_norm_weight", "key_norm_weight")}


def _everything(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    start = torch.arange(queries).expand(batch, queries) % max(keys, 1)
    return {
        "query": _heads(draw, batch, 2 * heads, queries, head_dim),
        "key": _heads(draw, batch, heads, keys, head_dim),
        "value": _heads(draw, batch, heads, keys, 12),
        "key_lengths": torch.full((batch,), max(keys - 1, 0)),
        "key_ranges": (start.clamp(max=keys), (start + 5).clamp(max=keys)),
        "key_mask": (torch.arange(keys) % 4 != 3).expand(batch, keys),
        "bias": draw(1, 2 * heads, queries, keys),
        "softcap": 5.0,
        "query_norm_weight": 1 + 0.1 * draw(head_dim),
        "key_norm_weight": 1 + 0.1 * draw(head_dim),
        "return_logsumexp": True,
        "return_key_mass": True,
    }


def _meaning(return_logsumexp: bool = False, return_key_mass: bool = False, **given: Any) -> Any:
    out, logsumexp, mass = reference.cross_attention(**given)
    extras = [value for wanted, value in ((return_logsumexp, logsumexp), (return_key_mass, mass)) if wanted]
    return (out, *extras) if extras else out


def _unread(arguments: Arguments) -> Arguments:
    """Keys and values that no query sees, and queries that see no key."""
    query, key, value = (arguments[name] for name in _QKV)
    batch, heads, queries, _ = query.shape
    kv, keys = key.shape[1:3]
    given = {name: arguments[name] for name in _MASKS if name in arguments}
    visible = reference.visible_keys(batch, queries, keys, query.device, **given).expand(batch, heads, queries, keys)
    unseen = ~visible.any(2).unflatten(1, (kv, heads // kv)).any(2)[..., None]
    return arguments | {
        "query": query.masked_fill(~visible.any(3)[..., None], torch.nan),
        "key": key.masked_fill(unseen, torch.nan),
        "value": value.masked_fill(unseen, torch.inf),
    }


def _packed(draw: Draw, sequences: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    return {
        "query": draw(sequences * queries, heads, head_dim),
        "key": draw(sequences * keys, heads, head_dim),
        "value": draw(sequences * keys, heads, head_dim),
        "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32) * queries,
        "cu_seqlens_k": torch.arange(sequences + 1, dtype=torch.int32) * keys,
        "is_causal": True,
    }


def _ragged(
    draw: Draw, sequences: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 2
) -> Arguments:
    """The second sequence has keys but no query, the third a query but no keys."""
    counts_q = (queries + torch.arange(sequences)) * (torch.arange(sequences) % 4 != 1)
    counts_k = (keys - torch.arange(sequences)).clamp(min=0) * (torch.arange(sequences) % 4 != 2)
    bounds = [torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int() for counts in (counts_q, counts_k)]
    return {
        "query": draw(int(bounds[0][-1]), group * heads, head_dim),
        "key": draw(int(bounds[1][-1]), heads, head_dim),
        "value": draw(int(bounds[1][-1]), heads, head_dim + 8),
        "cu_seqlens_q": bounds[0],
        "cu_seqlens_k": bounds[1],
    }


def _unread_sequences(arguments: Arguments) -> Arguments:
    changed = {name: arguments[name].clone() for name in _QKV}
    bounds_q, bounds_k = (arguments[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        if rows.start == rows.stop:
            changed["key"][columns], changed["value"][columns] = torch.nan, torch.inf
        if columns.start == columns.stop:
            changed["query"][rows] = torch.nan
    return arguments | changed


def _packed_meaning(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **given: Any
) -> Tensor:
    outs = [query[:0, :, :1] * key[:0, :1, :1].sum(0) * value.sum((0, 1))]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(len(bounds_q) - 1):
        rows, columns = (slice(*bounds[number : number + 2]) for bounds in (bounds_q, bounds_k))
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[columns], value[columns]))
        outs.append(reference.cross_attention(*parts, **given)[0][0].transpose(0, 1))
    return torch.cat(outs)


_SIZES = {"batch": 2, "queries": 5, "keys": 9, "heads": 2, "head_dim": 16}
_LARGER = {"batch": 3, "queries": 37, "keys": 75, "heads": 4, "head_dim": 40}


def _of(batch: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 1) -> dict[str, int]:
    return {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "head_dim": head_dim, "group": group}


def _attention(
    name: str,
    make: Callable[..., Arguments],
    more: tuple[str, ...] = (),
    numbers_only: bool = True,
    sizes: dict[str, int] = _SIZES,
    larger: dict[str, int] = _LARGER,
    published: dict[str, dict[str, int]] | None = None,
) -> Case:
    return Case(
        "cross_attention",
        name,
        make,
        _meaning,
        (*_QKV, *more),
        sizes=sizes,
        larger=larger,
        published=published or {},
        not_zero=("heads", "head_dim"),
        unread=_unread,
        numbers_only=numbers_only,
    )


_WEIGHTS = ("query_norm_weight", "key_norm_weight")
_FEW_HEADS = {"heads": 2, "group": 2}
_MODELS = {
    "q-former": _of(8, 12, 32, 257, 64),
    "llama-3.2-vision": _of(4, 8, 256, 1601, 128, group=4),
    "decode": _of(4, 8, 1, 6404, 128, group=4),
    "decode-long": _of(1, 8, 1, 16384, 128, group=4),
    "decode-wide-group": _of(1, 8, 1, 8192, 128, group=8),
    "decode-blip": _of(16, 12, 1, 577, 64),
}

CASES = [
    _attention("", _plain, numbers_only=False, published=_MODELS),
    _attention("everything", _everything, ("bias", *_WEIGHTS), numbers_only=False),
    _attention("grouped heads", _plain, sizes=_SIZES | {"group": 2}, larger=_LARGER | _FEW_HEADS | {"head_dim": 64}),
    _attention("few queries", _plain, sizes=_of(2, 2, 1, 40, 16, group=2), larger=_of(2, 3, 2, 1100, 64, group=4)),
    _attention(
        "logsumexp and key mass",
        _with(_always(return_logsumexp=True, return_key_mass=True)),
        published={"key-mass": _of(8, 12, 40, 577, 64)},
    ),
    _attention("key_lengths", _with(_lengths)),
    _attention("key_ranges", _with(_ranges), published={"idefics-4-images": _of(2, 16, 512, 4 * 257, 64)}),
    _attention("key_mask and mask", _with(_masks), larger=_LARGER | _FEW_HEADS),
    _attention("bias", _with(_bias), ("bias",), published={"trained-bias": _of(4, 12, 128, 577, 64)}),
    _attention("causal", _with(_always(is_causal=True))),
    _attention("softcap", _with(_always(softcap=5.0))),
    _attention("norms", _with(_norms), _WEIGHTS, larger=_LARGER | _FEW_HEADS),
    _attention("dropout", _with(_always(dropout_p=0.25, seed=7))),
    *(
        Case(
            "cross_attention_varlen",
            name,
            make,
            _packed_meaning,
            _QKV,
            sizes={"sequences": 3, "queries": 5, "keys": 9, "heads": 2, "head_dim": 16},
            larger={"sequences": 4, "queries": 17, "keys": 70, "heads": 2, "head_dim": 40},
            not_zero=("heads", "head_dim"),
            unread=_unread_sequences,
            numbers_only=name != "",
        )
        for name, make in (("", _packed), ("ragged", _ragged))
    ),
]
