"""What people run instead, where it is installed: on GPUs FlashAttention, xFormers and FlexAttention; BLOCK's fusions.

Every way of attention takes the inputs of a case of `benchmarks.attention`, heads before the length, and gives its
result back so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Way = Callable[..., Tensor]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def flash_attention_varlen(
    queries: int, keys: int, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, queries, keys)


def xformers(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    batch, heads = query.shape[:2]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    kv_heads = key.shape[2]
    if kv_heads == heads:
        if bias is not None:
            bias = bias.expand(batch, -1, -1, -1)
        return memory_efficient_attention(query, key, value, attn_bias=bias).transpose(1, 2)
    # Groups are a dimension of their own: (batch, length, groups, heads of a group, head_dim).
    query = query.unflatten(2, (kv_heads, heads // kv_heads))
    key, value = (tensor[:, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1) for tensor in (key, value))
    return memory_efficient_attention(query, key, value).flatten(2, 3).transpose(1, 2)


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU only the tests come here, and the uncompiled one says the same.
    return torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention


def flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    def add_bias(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[0, head, row, column]

    return _flex()(
        query, key, value, score_mod=None if bias is None else add_bias, enable_gqa=query.shape[1] != key.shape[1]
    )


# What is visible is worked out once for each tensor of ranges, as a training loop would do for all layers.
_block_masks = WeakTensorKeyDictionary()


def flex_ranges(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, key_ranges: tuple[Tensor, Tensor]
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    start, stop = key_ranges

    def in_range(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= start[batch, row]) & (column < stop[batch, row])

    if start not in _block_masks:
        _block_masks[start] = create_block_mask(
            in_range, query.shape[0], None, query.shape[2], key.shape[2], device=query.device
        )
    return _flex()(query, key, value, block_mask=_block_masks[start])


def for_plain() -> dict[str, Way]:
    """Ways of plain attention with grouped heads."""
    ways: dict[str, Way] = {"flex": flex}
    if installed("flash_attn"):
        ways["flash"] = flash_attention
    if installed("xformers"):
        ways["xformers"] = xformers
    return ways


def for_bias() -> dict[str, Way]:
    """Ways of attention with a bias that has a gradient."""
    return {"flex": flex} | ({"xformers": xformers} if installed("xformers") else {})


def for_ranges() -> dict[str, Way]:
    return {"flex": flex_ranges}


def for_varlen(queries: int, keys: int) -> dict[str, Way]:
    """Ways for packed sequences of at most so many queries and keys."""
    return {"flash": functools.partial(flash_attention_varlen, queries, keys)} if installed("flash_attn") else {}


@functools.cache
def block_fusions() -> Any:
    """The fusions of block-bootstrap-pytorch, or None. Its package imports the logger of a framework that they do not
    need: a stub takes its place where that is not installed."""
    if not installed("block"):
        return None
    if not installed("bootstrap"):
        names = ("bootstrap", "bootstrap.lib", "bootstrap.lib.logger")
        stubs = {name: types.ModuleType(name) for name in names}
        stubs[names[-1]].Logger = object  # type: ignore[attr-defined]
        sys.modules.update(stubs)
    return importlib.import_module("block").models.networks.fusions.fusions


def open_clip_loss(name: str) -> Any:
    """A loss of open_clip, or None. Its file needs torch alone, its package torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.submodule_search_locations is None:
        return None
    path = Path(found.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip.loss", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()
