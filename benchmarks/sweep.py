"""``python -m benchmarks sweep``: is this library ever slower? Every operator over sizes, from one row to the largest.

Each case is measured against the fastest of the plain forms in torch, in turns; a case below ``--minimum`` is listed,
and makes the exit status 1. The rules that leave sizes to torch follow from what this finds.

Where the machine is quiet for a while only: ``--seconds 200 --resume``, again and again. ``--again`` measures anew what
was slower, and ``--report`` takes the median of each case's runs.
"""

from __future__ import annotations

import argparse
import collections
import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import attention, fusion, harness, linear, pooling
from benchmarks.harness import Case
from velm_kernels import measure

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS = (64, 256, 768, 1024, 4096)
# Multiply-adds above which a case says nothing that a smaller one does not.
MOST_WORK = 4e9
# Elements of what a case reads and writes at the most.
MOST_TRAFFIC = 3e7
# Short calls are repeated for about so long: with five samples of each way all cases take some minutes.
SAMPLE_SECONDS = 0.003

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Operator, case, shape, dtype, direction.
Key = tuple[str, str, str, str, str]


class Run(NamedTuple):
    """This library's way of one case in one run: its speed over the best other way's, which that is, its time."""

    ratio: float
    best_other: str
    ms: float


def _linear() -> Iterator[Case]:
    for rows in ROWS:
        for width in WIDTHS:
            yield linear.linear_case("linear", rows, width, width, None, False)
            yield linear.linear_case("linear-gelu", rows, width, 4 * width, "gelu", False)
            yield linear.linear_case("linear-residual", rows, width, width, None, True)


def _attention() -> Iterator[Case]:
    for heads, dim in ((1, 16), (12, 64), (8, 128), (4, 256)):
        for queries, keys in (
            (1, 1),
            (1, 64),
            (1, 1024),
            (1, 4096),
            (4, 16),
            (16, 64),
            (32, 257),
            (64, 64),
            (197, 197),
        ):
            for batch in (1, 8):
                yield attention.attention_case("attention", batch, heads, heads, queries, keys, dim)
        yield attention.attention_case("attention", 1, heads, heads, 1024, 1024, dim)
        yield attention.attention_case("attention-bias", 1, heads, heads, 64, 64, dim, bias=True)
        yield attention.attention_case("attention-bias", 2, heads, heads, 197, 197, dim, bias=True)
    for images in (1, 4):
        for queries in (8, 64, 256):
            yield attention.ranges_case(1, 8, queries, images, 64, 64)
    for count in (1, 4, 16):
        for tokens in (4, 64, 256):
            yield attention.varlen_case(8, 64, [tokens] * count, [max(1, tokens - i) for i in range(count)])
    for queries in (1, 16, 64):
        yield attention.key_mass_case(1, 8, queries, 257, 64)
    for a, b in ((4, 4), (64, 16), (1000, 64)):
        yield attention.bidirectional_case(1, 4, a, b, 64)
    for batch, length in ((1, 1), (1, 64), (4, 256)):
        for dim in WIDTHS:
            yield attention.gated_residual_case(batch, length, dim)


def _pooling() -> Iterator[Case]:
    for batch, tokens in ((1, 1), (1, 16), (1, 197), (8, 50), (32, 197)):
        for dim in WIDTHS:
            for mode in ("mean", "max", "logsumexp"):
                yield pooling.masked_case(mode, batch, tokens, dim)
            yield pooling.segments_case("mean", batch, batch * tokens, dim)
            for shared in (False, True):
                if dim <= 1024:
                    yield pooling.attention_pool_case("attention-pool", batch, tokens, dim, dim // 64, shared)
            if tokens >= 16:
                yield pooling.select_case(batch, tokens, dim, tokens // 2)
                yield pooling.merge_case(batch, tokens, dim, 64, tokens // 4)


def _fusion() -> Iterator[Case]:
    for rows in (1, 4, 16, 64, 256, 1024):
        for width in WIDTHS:
            yield fusion.film_case("film", rows, 1, width, False)
            yield fusion.weighted_sum_case("weighted-sum", rows, 1, width, 3)
            yield fusion.dropout_residual_case(rows, width)
            for factor, layout, normalized in ((1, "inner", True), (5, "inner", True), (5, "outer", False)):
                yield fusion.factorized_case("factorized", rows, factor, width, layout, normalized)
            if width <= 1024:
                yield fusion.low_rank_case("low-rank", rows, (width, width), width, 4)
            if width <= 256:
                yield fusion.outer_product_case("outer-product", rows, 0, width, width)
                yield fusion.tensor_fusion_case("tensor-fusion", rows, (width, 64), 64)
        for dx, dy, out in ((8, 8, 4), (32, 32, 32), (64, 64, 64), (128, 128, 16), (256, 256, 128), (33, 129, 128)):
            yield fusion.bilinear_case("bilinear", rows, dx, dy, out)
    for batch, regions in ((1, 4), (1, 36), (8, 36), (8, 196)):
        for width in WIDTHS:
            yield fusion.film_case("film-regions", batch, regions, width, False)
            yield fusion.film_case("film-pixels", batch, regions, width, True)
            yield fusion.weighted_sum_case("weighted-sum-regions", batch, regions, width, 3)
            if width <= 1024:
                yield fusion.bilinear_attention_case("ban", batch, regions, 14, width, 2)
                yield fusion.bilinear_attention_pool_case("ban-pool", batch, regions, 14, width)
            if width <= 256:
                yield fusion.outer_product_case("bilinear-pooling", batch, regions, width, width)
                yield fusion.bilinear_case("bilinear-regions", batch, width, width, 16, regions)
    for rows, regions in ((1, 0), (16, 0), (4, 36)):
        for dim in (64, 1000, 16000):
            yield fusion.compact_case("mcb", rows, regions, 512, 512, dim)


OPERATORS = {"linear": _linear, "attention": _attention, "pooling": _pooling, "fusion": _fusion}


def cases(families: list[str]) -> Iterator[tuple[str, Case]]:
    for family in families:
        for case in OPERATORS[family]():
            if case.flops <= 2 * MOST_WORK and case.traffic <= MOST_TRAFFIC:
                yield family, case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=OPERATORS, action="append", help="default: all")
    parser.add_argument("--operator", action="append", help="only cases of this operator, e.g. film")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: fp32 and bf16")
    parser.add_argument("--direction", choices=("fwd", "fwd+bwd"), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each way (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--minimum", type=float, default=0.95, help="list what is slower than this (default 0.95)")
    parser.add_argument("--every", type=int, default=1, help="measure each n-th case only: a quick look")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many seconds")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that sweep.csv has already")
    parser.add_argument(
        "--again", action="store_true", help="only the cases that are slower than --minimum in every run in sweep.csv"
    )
    parser.add_argument("--no-check", action="store_true", help="only times: the numbers were checked in another run")
    parser.add_argument("--report", action="store_true", help="measure nothing: sum up what sweep.csv has")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of sweep.csv")


def _chosen(args: argparse.Namespace) -> list[tuple[str, Case, torch.dtype, str]]:
    return [
        (family, case, DTYPES[dtype], direction)
        for family, case in cases(args.family or list(OPERATORS))
        if not args.operator or case.operator in args.operator
        for dtype in args.dtype or ("fp32", "bf16")
        if DTYPES[dtype] in case.dtypes
        for direction in case.directions
        if not args.direction or direction in args.direction
    ][:: args.every]


def measured(path: Path) -> dict[Key, list[Run]]:
    """What a file has of this library's way: for each case its runs, the latest last."""
    found: dict[Key, list[Run]] = collections.defaultdict(list)
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["way"] == harness.VELM and row["speedup_over_best_other"]:
                    key = row["operator"], row["case"], row["shape"], row["dtype"], row["direction"]
                    run = Run(float(row["speedup_over_best_other"]), row["best_other"], float(row["median_ms"]))
                    found[key].append(run)
    return found


def _say(key: Key, run: Run, before: str = "") -> None:
    _, name, shape, dtype, direction = key
    print(
        f"{before}{run.ratio:5.2f}x of {run.best_other}  {name}  {shape}  {dtype}  {direction}  {run.ms * 1e3:.0f} us",
        flush=True,
    )


def _sum_up(found: dict[Key, Run], minimum: float) -> int:
    """Prints a line for each operator; returns how many cases are slower than ``minimum``."""
    ratios: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for (operator, _, _, dtype, direction), run in found.items():
        ratios[operator, dtype, direction].append(run.ratio)
    print(f"{'operator':<26}{'dtype':<10}{'direction':<10}{'cases':>6}{'least':>8}{'median':>8}{'slower':>8}")
    for (operator, dtype, direction), values in ratios.items():
        below = sum(ratio < minimum for ratio in values)
        print(
            f"{operator:<26}{dtype:<10}{direction:<10}{len(values):>6}{min(values):>8.2f}"
            f"{statistics.median(values):>8.2f}{below:>8}"
        )
    return sum(run.ratio < minimum for run in found.values())


def _median(runs: list[Run]) -> Run:
    return sorted(runs, key=lambda run: run.ratio)[len(runs) // 2]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    path = args.out / "sweep.csv"
    chosen = _chosen(args)
    keys = {
        (case.operator, case.name, case.shape, str(dtype).removeprefix("torch."), direction)
        for _, case, dtype, direction in chosen
    }
    before = {key: runs for key, runs in measured(path).items() if key in keys}
    if args.report:
        medians = {key: _median(runs) for key, runs in before.items()}
        for key, run in sorted(medians.items(), key=lambda item: item[1].ratio):
            if run.ratio < args.minimum:
                _say(key, run)
        slower = _sum_up(medians, args.minimum)
        print(f"{slower} of {len(medians)} cases are slower than {args.minimum} of the best plain form")
        return 1 if slower else 0

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = harness.Settings(
        device,
        args.rounds,
        compile=False,
        memory=False,
        sample_seconds=SAMPLE_SECONDS,
        check=not args.no_check,
    )
    limits = measure.measure_limits(device, seconds=0.2)
    begin = time.monotonic()
    wrong = left = 0
    found: dict[Key, Run] = {}
    for number, (family, case, dtype, direction) in enumerate(chosen, 1):
        key = case.operator, case.name, case.shape, str(dtype).removeprefix("torch."), direction
        if args.resume and key in before:
            continue
        if args.again and (key not in before or max(run.ratio for run in before[key]) >= args.minimum):
            continue
        if time.monotonic() - begin > args.seconds:
            left += 1
            continue
        rows, failures = harness.measure_case(case, family, dtype, direction, limits, settings)
        for failure in failures:
            if failure.way == harness.VELM:
                wrong += 1
                print(f"no figure: {failure}", flush=True)
        mine = next((row for row in rows if row.way == harness.VELM), None)
        if mine is None or mine.speedup_over_best_other is None:
            continue
        harness.write_csv(path, rows)
        found[key] = Run(mine.speedup_over_best_other, mine.best_other, mine.median_ms)
        if mine.speedup_over_best_other < args.minimum:
            _say(key, found[key], f"{number}/{len(chosen)} ")
    slower = _sum_up(found, args.minimum)
    print(
        f"{slower} of {len(found)} cases are slower than {args.minimum} of the best plain form, "
        f"{wrong} have wrong numbers, {left} are left"
    )
    return 1 if slower or wrong else 0
