"""``python -m benchmarks``: measures, prints a table, writes a CSV and plots."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    attention,
    fusion,
    grids,
    harness,
    linear,
    losses,
    models,
    pooling,
    published,
    retrieval,
    sequence,
    static,
    terminal,
)
from velm_kernels import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPERATORS = {
    "attention": attention.cases,
    "fusion": fusion.cases,
    "grids": grids.cases,
    "linear": linear.cases,
    "losses": losses.cases,
    "pooling": pooling.cases,
    "published": published.cases,
    "retrieval": retrieval.cases,
    "sequence": sequence.cases,
}
FAMILIES = (*OPERATORS, "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument(
        "--case", action="append", default=[], metavar="PATTERN", help="shell pattern on the case's name"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: fp32 and bf16")
    parser.add_argument("--direction", action="append", help="fwd, fwd+bwd, inference, training step; default: all")
    parser.add_argument("--rounds", type=int, default=10, help="samples of each way (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on a CPU (default 2)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda where there is no GPU: what can be said of its kernels without one",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes long to warm up"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of bench.csv and the plots")
    parser.add_argument("--list", action="store_true", help="only name the cases")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    return parser.parse_args(arguments)


def _jobs(args: argparse.Namespace) -> Iterator[tuple[str, Any, torch.dtype, str]]:
    dtypes = [DTYPES[name] for name in args.dtype or ("fp32", "bf16")]
    families = args.family or FAMILIES
    directions = args.direction or ("fwd", "fwd+bwd")
    for family, cases in OPERATORS.items():
        if family in families:
            for case, dtype, direction in harness.selected(cases(), args.case, dtypes, directions):
                yield family, case, dtype, direction
    if "models" in families:
        for model in models.cases():
            if args.case and not any(fnmatch.fnmatch(model.name, pattern) for pattern in args.case):
                continue
            for dtype in dtypes:
                for direction in models.DIRECTIONS:
                    # Whole models are measured in what people train and serve on CPUs and GPUs alike.
                    if dtype != torch.float16 and direction in (args.direction or models.DIRECTIONS):
                        yield "models", model, dtype, direction


def table(rows: Sequence[harness.Row], title: str) -> Any:
    shown = terminal.table(title)
    shown.add_column("way", no_wrap=True)
    on_gpu = any(row.host_ms is not None for row in rows)
    host = ("host ms",) if on_gpu else ()
    for name in ("ms", "quartiles", *host, "of limit", "GB/s", "over best other", "for backward", "peak", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        speed = row.speedup_over_best_other
        shown.add_row(
            row.way,
            # A time by events holds what launches the work as well.
            f"{row.median_ms:.3f}" + (" (events)" if row.clock == "events" else ""),
            f"{row.lower_quartile_ms:.3f} to {row.upper_quartile_ms:.3f}",
            *([] if not on_gpu else ["" if row.host_ms is None else f"{row.host_ms:.3f}"]),
            "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.0%}",
            "" if row.bytes is None else f"{row.bytes / row.median_ms / 1e6:.1f}",
            "" if speed is None else f"{speed:.2f}x ({row.best_other})",
            _mebibytes(row.saved_bytes),
            _mebibytes(row.peak_bytes),
            f"{row.error:.1e}",
        )
    return shown


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["sweep"]:
        from benchmarks import sweep

        return sweep.main(given[1:])
    if given[:1] == ["host"]:
        from benchmarks import host

        return host.main(given[1:])
    if given[:1] == ["figures"]:
        from benchmarks import figures

        return figures.main(given[1:])
    return run(parse(given))


def run(args: argparse.Namespace) -> int:
    """Runs what ``args`` select; 0 if every way's numbers were right, else 1."""
    console = terminal.console()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        static.show(console)
        return 0
    jobs = list(_jobs(args))
    if not jobs:
        print("python -m benchmarks: nothing selected; see --list", file=sys.stderr)
        return 2
    if args.list:
        for _, case, dtype, direction in jobs:
            console.print(f"{case.name}  [{case.shape}]  {dtype}  {direction}", markup=False)
        return 0
    torch.set_num_threads(args.threads)
    settings = harness.Settings(torch.device(args.device), args.rounds, not args.no_compile, not args.no_memory)
    limits = measure.measure_limits(settings.device)
    bf16 = f"{limits.bf16 / 1e9:.0f}" if limits.bf16 else "none"
    console.print(
        f"limits with {limits.threads} threads: fp32 {limits.fp32 / 1e9:.0f} GFLOP/s, bf16 {bf16}, "
        f"copy {limits.copy / 1e9:.1f} GB/s, reading {(limits.read or 0) / 1e9:.1f} GB/s, torch.matmul "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.matmul.items())
    )
    rows: list[harness.Row] = []
    failures: list[harness.Failure] = []
    with terminal.progress(console, len(jobs)) as now:
        for family, case, dtype, direction in jobs:
            name = f"{case.name} {str(dtype).removeprefix('torch.')} {direction}"
            now(name)
            torch._dynamo.reset()
            if isinstance(case, models.ModelCase):
                new, failed = models.measure_model(case, dtype, direction, limits, settings)
            else:
                assert isinstance(case, harness.Case)
                new, failed = harness.measure_case(case, family, dtype, direction, limits, settings)
            if new:
                harness.write_csv(args.out / "bench.csv", new)
                console.print(table(new, f"{name}  ({case.shape})"))
            for failure in failed:
                console.print(f"no figure: {failure}", style="red", markup=False)
            rows += new
            failures += failed
    if rows:
        try:
            from benchmarks import plots
        except ImportError as error:
            console.print(f"no plots: {error}")
        else:
            for path in plots.write(rows, args.out):
                console.print(f"wrote {path}")
        console.print(f"wrote {args.out / 'bench.csv'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
