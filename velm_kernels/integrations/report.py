"""What `patch` did to a model, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module of a known class. `status` is "replaced", "already" (by an earlier `patch`) or "left"."""

    path: str
    class_name: str
    family: str
    status: str
    detail: str


@dataclass
class Fallback:
    """Calls of one replaced module that its original forward served, and why."""

    path: str
    class_name: str
    reason: str
    calls: int = 0


class Report:
    """What `patch` replaced, what it left and why, and which calls the originals served since.

    Attributes:
        entries: one `Entry` for each module of a known class, in the order of `named_modules`.
        fallbacks: one `Fallback` for each replaced module and reason, filled while the model runs (not while it is
            being traced by a compiler).
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.entries: list[Entry] = []
        self._fallbacks: dict[tuple[str, str], Fallback] = {}

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status != "left"]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "left"]

    @property
    def fallbacks(self) -> list[Fallback]:
        return list(self._fallbacks.values())

    def add(self, path: str, class_name: str, family: str, status: str, detail: str) -> None:
        self.entries.append(Entry(path, class_name, family, status, detail))

    def record_fallback(self, path: str, class_name: str, reason: str) -> None:
        self._fallbacks.setdefault((path, reason), Fallback(path, class_name, reason)).calls += 1

    def __str__(self) -> str:
        head = f"{self.model_name}: {len(self.replaced)} modules replaced, {len(self.left)} left"
        if not self.entries:
            return head + " (no module of a known class)"
        details = {"replaced": "{}", "already": "{} (already)", "left": "left: {}"}
        rows = _grouped(
            (entry.path, entry.class_name, details[entry.status].format(entry.detail)) for entry in self.entries
        )
        lines = [head, *_table(("module", "class", "replaced by"), rows)]
        if self._fallbacks:
            calls = _grouped((f.path, f.class_name, f"{f.reason} ({f.calls} calls)") for f in self.fallbacks)
            lines += ["calls served by the original:", *_table(("module", "class", "reason"), calls)]
        return "\n".join(lines)

    __repr__ = __str__


def _grouped(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Join rows that differ in layer numbers only: `layer.0.x`, `layer.1.x` become `layer.{0-1}.x`."""
    groups: dict[tuple[str, str, str], list[list[int]]] = {}
    for path, class_name, detail in rows:
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", "." + path)]
        shape = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", "." + path)[1:]
        groups.setdefault((shape, class_name, detail), []).append(numbers)
    joined = []
    for (shape, class_name, detail), rows_of_numbers in groups.items():
        path = shape
        for column in zip(*rows_of_numbers, strict=True):
            values = sorted(set(column))
            consecutive = values == list(range(values[0], values[-1] + 1))
            if len(values) == 1:
                text = str(values[0])
            else:
                text = f"{{{values[0]}-{values[-1]}}}" if consecutive else f"{{{','.join(map(str, values))}}}"
            path = path.replace("#", text, 1)
        joined.append((path or "(the model)", class_name, detail))
    return joined


def _table(header: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(2)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in [header, *rows]]
