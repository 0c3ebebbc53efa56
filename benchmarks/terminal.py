"""What the benchmarks print with: rich where it is installed, plain lines where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import rich.console as _rich
    import rich.progress as _progress
    import rich.table as _table
except ImportError:
    HAS_RICH = False
else:
    HAS_RICH = True


class PlainTable:
    """The part of rich's table that the benchmarks use."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.columns: list[tuple[str, bool]] = []
        self.rows: list[tuple[str, ...]] = []

    def add_column(self, name: str, justify: str = "left", no_wrap: bool = False) -> None:
        self.columns.append((name, justify == "right"))

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [tuple(name for name, _ in self.columns), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        shown = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, (_, right) in zip(line, widths, self.columns)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *shown])


class PlainConsole:
    """The part of rich's console that the benchmarks use."""

    width = 110

    def print(self, *values: Any, **style: Any) -> None:
        print(*values, flush=True)


def console() -> Any:
    """Prints text and tables: at least 110 columns wide."""
    if not HAS_RICH:
        return PlainConsole()
    made = _rich.Console()
    made.width = max(made.width, 110)
    return made


def table(title: str) -> Any:
    """A table with ``add_column(name, justify, no_wrap)`` and ``add_row(*cells)``."""
    return _table.Table(title=title, title_justify="left") if HAS_RICH else PlainTable(title)


@contextmanager
def progress(shown: Any, total: int) -> Iterator[Any]:
    """A bar on a terminal. What it gives is called with a job's name before the job."""
    if not (HAS_RICH and shown.is_terminal):
        yield lambda name: None
        return
    columns = (
        *_progress.Progress.get_default_columns()[:2],
        _progress.MofNCompleteColumn(),
        _progress.TimeElapsedColumn(),
        _progress.TextColumn("{task.fields[now]}"),
    )
    with _progress.Progress(*columns, console=shown) as bar:
        task = bar.add_task("measuring", total=total, now="")
        begun = 0

        def now(name: str) -> None:
            nonlocal begun
            bar.update(task, now=name, completed=begun)
            begun += 1

        yield now
        bar.update(task, completed=total)
