"""Bars of speed over the best other way, one plot a family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import Row


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG per family: the time of every way over the time of eager, in the order measured."""
    written = []
    for family in dict.fromkeys(row.family for row in rows):
        chosen = [row for row in rows if row.family == family]
        groups = list(dict.fromkeys((row.case, row.dtype, row.direction) for row in chosen))
        ways = list(dict.fromkeys(row.way for row in chosen))
        times = {((row.case, row.dtype, row.direction), row.way): row.median_ms for row in chosen}
        figure, axes = plt.subplots(figsize=(9, 0.9 + 0.5 * len(groups)), layout="constrained")
        height = 0.8 / len(ways)
        for number, way in enumerate(ways):
            places, widths = [], []
            for place, group in enumerate(groups):
                mine, eager = times.get((group, way)), times.get((group, "eager"))
                if mine is not None and eager is not None:
                    places.append(place + (number - (len(ways) - 1) / 2) * height)
                    widths.append(eager / mine)
            axes.barh(places, widths, height=height, label=way)
        axes.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("times as fast as eager (longer is better)")
        axes.legend(fontsize=8)
        path = folder / f"{family}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written
