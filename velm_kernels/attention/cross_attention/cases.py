"""What cross_attention is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.cross_attention import reference
from velm_kernels.attention.cross_attention.arguments import MAX_HEAD_DIM
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


def _rel_pos(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Arguments:
    height = max((side for side in range(1, keys + 1) if keys % side == 0 and side * side <= keys), default=0)
    sides = {"rel_pos_height": height, "rel_pos_width": keys // height if height else 1}
    return {name: 2 * draw(batch, heads, queries, size) for name, size in sides.items()}


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


def _wide(draw: Draw, batch: int, heads: int, queries: int, keys: int, head_dim: int, group: int = 1) -> Arguments:
    """Heads of more than 256 columns; values that are narrower."""
    head_dim = min(head_dim, MAX_HEAD_DIM)
    value = _heads(draw, batch, heads, keys, max(1, head_dim - 24))
    return _plain(draw, batch, heads, queries, keys, head_dim, group) | {"value": value, "is_causal": True}


_SIZES = {"batch": 2, "queries": 5, "keys": 9, "heads": 2, "head_dim": 16}
_LARGER = {"batch": 3, "queries": 37, "keys": 107, "heads": 4, "head_dim": 40}


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
    "gemma-4-global": _of(1, 4, 1024, 1024, 512, group=2),
}

CASES = [
    _attention("", _plain, numbers_only=False, published=_MODELS),
    _attention("everything", _everything, ("bias", *_WEIGHTS), numbers_only=False),
    _attention("grouped heads", _plain, sizes=_SIZES | {"group": 2}, larger=_LARGER | _FEW_HEADS | {"head_dim": 64}),
    _attention("wide heads", _wide, sizes=_of(1, 1, 3, 6, 320, group=2), larger=_of(1, 2, 19, 40, 512, group=2)),
    _attention("few queries", _plain, sizes=_of(2, 2, 1, 40, 16, group=2), larger=_of(2, 3, 2, 1100, 64, group=4)),
    _attention(
        "logsumexp and key mass",
        _with(_always(return_logsumexp=True, return_key_mass=True)),
        published={"key-mass": _of(8, 12, 40, 577, 64)},
    ),
    _attention("key_lengths", _with(_lengths)),
    _attention("key_ranges", _with(_ranges), published={"idefics-4-images": _of(2, 16, 512, 4 * 257, 64)}),
    _attention("key_mask and mask", _with(_masks), larger=_LARGER | _FEW_HEADS),
    # Of so many heads, several batch entries add to one sum.
    _attention(
        "bias",
        _with(_bias),
        ("bias",),
        larger=_of(3, 16, 37, 107, 24),
        published={"trained-bias": _of(4, 12, 128, 577, 64)},
    ),
    _attention(
        "rel_pos",
        _with(_rel_pos, _lengths),
        ("rel_pos_height", "rel_pos_width"),
        numbers_only=False,
        sizes=_SIZES | {"queries": 6},
        larger=_of(3, 4, 37, 110, 24),
        published={"sam-window": _of(25, 12, 196, 196, 64), "sam-global": _of(1, 12, 4096, 4096, 64)},
    ),
    _attention("causal", _with(_always(is_causal=True))),
    _attention("softcap", _with(_always(softcap=5.0))),
    _attention("norms", _with(_norms), _WEIGHTS, larger=_LARGER | _FEW_HEADS),
    _attention("dropout", _with(_always(dropout_p=0.25, seed=7))),
]
