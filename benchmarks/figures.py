"""``python -m benchmarks figures``: docs/figures.md and the table of README.md, from the stored results.

A stored run is a folder of ``benchmarks/results``: ``run.json`` says when, on which machine and by which commands it
was measured; ``bench.csv`` has rows of the harness (benchmarks/README.md says what the columns mean; columns that a run
did not record are left out), ``results.csv`` those of ``make results``. ``--keep out/bench/bench.csv --name NAME``
makes such a folder of a run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "figures.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin figures: python -m benchmarks figures -->", "<!-- end figures -->"
FAMILIES = ("attention", "linear", "fusion", "pooling", "published", "sequence", "models")
RUN, BENCH, TRAINED = "run.json", "bench.csv", "results.csv"

# What README.md shows: name of the case, what to call it. One of them is a loss.
TELLING = {
    "llama-3.2-vision": "cross-attention of Llama 3.2 Vision",
    "idefics-4-images": "cross-attention, each token to its own image",
    "trained-bias": "attention with a trained bias",
    "ragged-images": "packed images of different sizes",
    "siglip-head": "SigLIP's pooling head",
    "masked-mean": "mean of the tokens that are not padding",
    "ban": "bilinear attention maps (BAN)",
    "bilinear": "`torch.nn.Bilinear`",
    "mfb-tail": "the tail of MFB",
    "merge": "ToMe's token merging",
    "ban-pool-patches": "pooling by one attention map",
}

Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """A folder of stored results.

    Attributes:
        machine: processor, cores and threads in words; limits: what that machine reached in the same run.
        rows: of bench.csv; trained: of results.csv, the titles first.
    """

    title: str
    date: str
    machine: str
    torch: str
    commands: list[str]
    limits: str = ""
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    trained: list[list[str]] = field(default_factory=list)


def load(folder: Path) -> Run:
    told = json.loads((folder / RUN).read_text())
    rows, trained = [], []
    if (folder / BENCH).exists():
        with (folder / BENCH).open(newline="") as file:
            rows = list(csv.DictReader(file))
    if (folder / TRAINED).exists():
        with (folder / TRAINED).open(newline="") as file:
            trained = list(csv.reader(file))
    if not rows and not trained and not told.get("notes"):
        raise ValueError(f"{folder}: neither {BENCH} nor {TRAINED} has a row, and {RUN} has no notes")
    return Run(**told, rows=rows, trained=trained)


def runs(results: Path = RESULTS) -> list[Run]:
    """The stored runs, the newest first."""
    found = [load(path.parent) for path in sorted(results.glob(f"*/{RUN}"))]
    return sorted(found, key=lambda run: run.date, reverse=True)


def ratio(value: float) -> str:
    """Two digits: medians are stored to about three."""
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{round(value, digits):.{digits}f}x" if value < 99.5 else f"{value:.0f}x"


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.3g}"


@dataclass(frozen=True)
class Line:
    """A case in one dtype and direction: the medians of its ways in milliseconds."""

    family: str
    case: str
    shape: str
    dtype: str
    direction: str
    medians: dict[str, float]

    @property
    def best_other(self) -> str:
        others = {way: value for way, value in self.medians.items() if way in self.others}
        return min(others, key=lambda way: others[way])

    @property
    def others(self) -> list[str]:
        # Ways of this library's: velm, and for whole models patched and patched+compiled.
        return [way for way in self.medians if way != "velm" and not way.startswith("patched")]

    @property
    def ours(self) -> str:
        return next(way for way in ("velm", "patched") if way in self.medians)

    @property
    def speedup(self) -> float:
        return self.medians[self.best_other] / self.medians[self.ours]


def lines(rows: Iterable[Row]) -> list[Line]:
    """One for each case, dtype and direction that the library and another way were measured in; of several
    measurements the last."""
    found: dict[tuple[str, str, str, str, str], dict[str, float]] = {}
    for row in rows:
        key = row["family"], row["case"], row["shape"], row["dtype"], row["direction"]
        found.setdefault(key, {})[row["way"]] = float(row["median_ms"])
    made = [Line(*key, medians) for key, medians in found.items()]
    return [line for line in made if line.others and {"velm", "patched"} & set(line.medians)]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A Markdown table whose columns from ``numbers_from`` on are aligned to the right."""
    rule = ["---" if column < numbers_from else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def telling(found: Sequence[Run]) -> str:
    """The table of README.md with the sentence below it: each case of TELLING from the newest run that has it."""
    cells: list[list[str]] = []
    sources: dict[tuple[str, ...], None] = {}
    for case, name in TELLING.items():
        for run in found:
            pair = {
                line.direction: line for line in reversed(lines(run.rows)) if line.case == case and "32" in line.dtype
            }
            if {"fwd", "fwd+bwd"} <= set(pair):
                both, forward = pair["fwd+bwd"], pair["fwd"]
                sources[run.date, run.machine, run.torch] = None
                cells.append(
                    [
                        f"{name} ({both.shape})",
                        milliseconds(both.medians["eager"]),
                        f"{milliseconds(both.medians[both.best_other])} ({both.best_other})",
                        milliseconds(both.medians[both.ours]),
                        ratio(both.speedup),
                        ratio(forward.speedup),
                    ]
                )
                break
    titles = ("float32, forward and backward, ms", "eager torch", "best other", "this", "speed-up", "forward alone")
    told = "; ".join(f"{date}: {machine}, torch {torch}" for date, machine, torch in sources)
    return f"{table(titles, cells)}\n\nMeasured {told}. Speed-ups are over the best other way."


def section(run: Run) -> str:
    parts = [f"## {run.title}", f"Measured {run.date}: {run.machine}, torch {run.torch}."]
    if run.limits:
        parts.append(f"Limits of the machine in the same run: {run.limits}.")
    parts.append("```\n" + "\n".join(run.commands) + "\n```")
    found = lines(run.rows)
    families = [name for name in FAMILIES if any(line.family == name for line in found)]
    for name in families:
        titles = ("case", "shape", "dtype", "direction", "eager ms", "best other ms", "this ms", "speed-up")
        cells = [
            [
                line.case,
                line.shape,
                line.dtype.removeprefix("torch."),
                line.direction,
                milliseconds(line.medians["eager"]) if "eager" in line.medians else "",
                f"{milliseconds(line.medians[line.best_other])} ({line.best_other})",
                milliseconds(line.medians[line.ours]),
                ratio(line.speedup),
            ]
            for line in found
            if line.family == name
        ]
        parts += [f"### {name.capitalize()}", table(titles, cells, 4)]
    if run.trained:
        parts.append(table(run.trained[0], run.trained[1:], 2))
    return "\n\n".join(parts + run.notes)


def page(found: Sequence[Run]) -> str:
    """docs/figures.md."""
    head = (
        "# Figures\n\n<!-- Written by python -m benchmarks figures from benchmarks/results; do not edit. -->\n\n"
        "Medians of a call in milliseconds. The speed-up is that of this library over the best other way, which is\n"
        "named: eager is plain torch as it stands in model files or in the published code, sdpa is\n"
        "`torch.nn.functional.scaled_dot_product_attention`. Speeds depend on the processor: `make bench` measures on\n"
        "yours. No GPU time has been measured. `benchmarks/README.md` says how measurements are made.\n"
    )
    return "\n\n".join([head.rstrip(), *map(section, found)]) + "\n"


def with_table(text: str, shown: str) -> str:
    """README.md with the table between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{shown}\n{rest[rest.index(END) :]}"


def keep(rows: Path, name: str, machine: str, title: str, commands: Sequence[str], results: Path = RESULTS) -> Path:
    """Stores a run under ``results``."""
    import torch

    folder = results / name
    folder.mkdir(parents=True)
    (folder / BENCH).write_bytes(rows.read_bytes())
    run = Run(title, datetime.date.today().isoformat(), machine, torch.__version__, list(commands))
    told = {key: value for key, value in asdict(run).items() if key not in ("rows", "trained")}
    (folder / RUN).write_text(json.dumps(told, indent=2) + "\n")
    return folder


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks figures", description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="CSV", help="store this bench.csv as a run first")
    parser.add_argument("--name", help="its folder, by default today's date")
    parser.add_argument("--title", default="Operators", help="its heading")
    parser.add_argument("--machine", default=platform.machine(), help="processor, cores, threads")
    parser.add_argument("--command", action="append", default=[], help="how it was measured")
    args = parser.parse_args(arguments)
    if args.keep:
        name = args.name or datetime.date.today().isoformat()
        print(f"stored {keep(args.keep, name, args.machine, args.title, args.command)}")
    found = runs()
    PAGE.write_text(page(found))
    README.write_text(with_table(README.read_text(), telling(found)))
    print(f"wrote {PAGE} and the table of {README}")
    return 0
