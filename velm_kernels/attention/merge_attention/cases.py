"""What merge_attention is tried with: three shards, of which rows and whole entries see nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.merge_attention import reference
from velm_kernels.cases import Arguments, Case, Draw


def _shards(missing: bool) -> Any:
    def make(draw: Draw, batch: int, heads: int, queries: int, head_dim: int) -> Arguments:
        logsumexps = [3 * draw(batch, heads, queries, wide=True) for _ in range(3)]
        if missing:
            logsumexps[1][:1] = -torch.inf
            for shard in logsumexps:
                shard[1:, :1, : (queries + 1) // 2] = -torch.inf
        outs = [draw(batch, queries, heads, head_dim).transpose(1, 2) for _ in range(3)]
        return {"outs": outs, "logsumexps": logsumexps}

    return make


def _meaning(outs: list[Tensor], logsumexps: list[Tensor]) -> Any:
    return reference.merge_attention(torch.stack(outs), torch.stack(logsumexps))


def _unread(arguments: Arguments) -> Arguments:
    outs = [
        out.masked_fill((logsumexp == -torch.inf)[..., None], torch.nan)
        for out, logsumexp in zip(arguments["outs"], arguments["logsumexps"], strict=True)
    ]
    return arguments | {"outs": outs}


CASES = [
    Case(
        "merge_attention",
        name,
        _shards(name != ""),
        _meaning,
        ("outs", "logsumexps"),
        sizes={"batch": 2, "queries": 5, "heads": 2, "head_dim": 16},
        larger={"batch": 2, "queries": 500, "heads": 4, "head_dim": 24},
        unread=_unread,
        numbers_only=name != "",
    )
    for name in ("", "missing shards")
]
