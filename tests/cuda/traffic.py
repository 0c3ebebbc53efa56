"""The bytes that CUDA attention moves at the benchmark shapes, counted on host threads: the table beside this file.

python -m tests.cuda.traffic            # counts and compares with the table
python -m tests.cuda.traffic --write    # writes the table
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import static

FILE = Path(__file__).with_name("traffic.csv")
COLUMNS = ("case", "dtype", "read", "written", "least", "ratio", "matrix_instructions", "bank_conflicts")
# Of the bytes that the stated way of working cannot avoid.
LIMIT = 1.15


def line(one: static.Traffic) -> list[str]:
    return [f"{one.ratio:.3f}" if name == "ratio" else str(getattr(one, name)) for name in COLUMNS]


def written() -> dict[tuple[str, str], dict[str, str]]:
    with FILE.open() as file:
        return {(row["case"], row["dtype"]): row for row in csv.DictReader(file)}


def worse(counted: Iterable[static.Traffic]) -> list[str]:
    """What exceeds the table or the limit. The number of matrix instructions may fall, where tiles are skipped."""
    found, table = [], written()
    for one in counted:
        before = table.get((one.case, one.dtype))
        if before is None:
            found.append(f"{one.case} in {one.dtype} is not in the table")
            continue
        for name in ("read", "written", "matrix_instructions", "bank_conflicts"):
            if getattr(one, name) > int(before[name]):
                found.append(f"{one.case} in {one.dtype}: {name} {getattr(one, name)}, in the table {before[name]}")
        if one.ratio > LIMIT:
            found.append(f"{one.case} in {one.dtype}: {one.ratio:.3f} times the least bytes, at most {LIMIT}")
        if one.dtype == "bfloat16" and not one.matrix_instructions:
            found.append(f"{one.case} in {one.dtype}: no matrix instruction")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.traffic", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table")
    args = parser.parse_args()
    # Read when the first kernel runs.
    os.environ["DEVICE_ON_HOST_BANK_CONFLICTS"] = "1"
    counted = list(static.traffic())
    if args.write:
        with FILE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *map(line, counted)])
    found = worse(counted)
    print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
