"""The operator select_rows: which tokens are taken. By torch on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import derivatives
from velm_kernels.backends.library import LIBRARY
from velm_kernels.pooling.tokens import live_tokens

# scores: (rows, tokens); lengths, k: (rows,) int32; mask: (rows, tokens) bool. Which tokens of each row are taken, at
# most `kept`: (rows, kept) rising and then -1, as int32 and as int64, with its inverse (rows, tokens) int32, -1 for
# those not taken, between them, and how many, (rows,) int32. By torch's sort on every device: it is nothing beside
# moving the tokens.
SCHEMA = (
    "select_rows(Tensor scores, Tensor? lengths, Tensor? mask, Tensor? k, SymInt kept) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _select_rows(
    scores: Tensor, lengths: Tensor | None, mask: Tensor | None, k: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape
    if lengths is not None:
        checks.values_between("lengths", lengths, 0, tokens)
    if k is not None:
        checks.values_between("k", k, 0, kept)
    # Rising, so that the first of equal ones comes first; 0 - 0 and 0 - (-0) are the same. What may not be taken is
    # NaN, behind everything.
    key = torch.where(scores.isnan(), torch.inf, 0.0 - scores)
    live = None
    if lengths is not None or mask is not None:
        live = live_tokens(rows, tokens, lengths, mask, scores.device)
    taken = torch.full((rows,), kept, dtype=torch.int32, device=scores.device) if k is None else k.clamp(0, kept)
    if live is not None:
        key = torch.where(live, key, torch.nan)
        taken = torch.minimum(taken, live.sum(1, dtype=torch.int32))
    best = key.sort(stable=True, dim=1).indices[:, :kept]
    place = torch.arange(kept, device=scores.device)
    best = torch.where(place < taken[:, None], best, tokens).sort(1).values
    # One column more, for what is written nowhere.
    inverse = torch.full((rows, tokens + 1), -1, dtype=torch.int32, device=scores.device)
    inverse.scatter_(1, best, place.int().expand(rows, kept))
    indices = torch.where(best < tokens, best, -1)
    return indices.int(), inverse[:, :tokens].contiguous(), indices, taken if k is None else taken.clone()


def _fake_select_rows(
    scores: Tensor, lengths: Tensor | None, mask: Tensor | None, k: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens = scores.shape
    index = scores.new_empty((rows, kept), dtype=torch.int32)
    inverse = scores.new_empty((rows, tokens), dtype=torch.int32)
    indices = scores.new_empty((rows, kept), dtype=torch.int64)
    return index, inverse, indices, scores.new_empty((rows,), dtype=torch.int32)


LIBRARY.impl("select_rows", _select_rows, "CompositeExplicitAutograd")
torch.library.register_fake("velm::select_rows", _fake_select_rows, lib=LIBRARY)
derivatives.register_vmap(LIBRARY, "select_rows")
select_rows = torch.ops.velm.select_rows
