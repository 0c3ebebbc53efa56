"""Where the row of an id is: ids in order, and a dict of what has changed since they were put in order."""

from __future__ import annotations

import torch
from torch import Tensor

# So few changes are looked up one by one.
FEW = 4096


class Places:
    """A number for each id, found by bisection: 16 bytes a row, where a dict of Python takes about 100.

    Changes go into a dict, which is sorted into the rest once it has grown to an eighth of it: a change costs
    O(log rows) on average, however few come at a time. Not safe for threads by itself.
    """

    def __init__(self, ids: Tensor, places: Tensor) -> None:
        self._ids, self._places = ids, places
        if not bool((ids[1:] > ids[:-1]).all()):
            self._ids, index = ids.sort()
            self._places = places[index]
        self._changed: dict[int, int] = {}

    def find(self, ids: Tensor) -> Tensor:
        """The place of every id, -1 where there is none."""
        found = torch.full_like(ids, -1)
        if len(self._ids):
            at = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
            found = torch.where(self._ids[at] == ids, self._places[at], found)
        if self._changed:
            changed = self._changed
            found = torch.tensor(
                [changed.get(id_, place) for id_, place in zip(ids.tolist(), found.tolist())], device="cpu"
            )
            found = found.to(torch.int64)
        return found

    def put(self, ids: Tensor, places: Tensor) -> None:
        """From now on ``ids``, all different, are at ``places``; -1 takes one out."""
        if len(ids) <= FEW:
            self._changed.update(zip(ids.tolist(), places.tolist()))
        else:
            self._merge(ids, places)
        if len(self._changed) > max(FEW, len(self._ids) // 8):
            self._merge(ids[:0], places[:0])

    def _merge(self, ids: Tensor, places: Tensor) -> None:
        # The last one counts where an id is there several times.
        before = (
            torch.tensor(list(values), dtype=torch.int64, device="cpu")
            for values in (self._changed, self._changed.values())
        )
        all_ids, all_places = (torch.cat(three) for three in zip((self._ids, self._places), before, (ids, places)))
        self._changed = {}
        all_ids, index = all_ids.sort(stable=True)
        all_places = all_places[index]
        last = torch.ones_like(all_ids, dtype=torch.bool)
        last[:-1] = all_ids[1:] != all_ids[:-1]
        kept = last & (all_places >= 0)
        self._ids, self._places = all_ids[kept], all_places[kept]
