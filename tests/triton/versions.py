"""Whether every version of Triton that is supported compiles every instance of the kernels, without spills.

    python -m tests.triton.versions                                  all versions
    python -m tests.triton.versions --versions 3.6 3.8 --arch 90     some; the rest as tests.triton.resources has it

Versions are installed by pip beside the environment's own, each into a folder of its own under `build/triton`, where
compiled kernels are kept too: a second run compiles only what has changed, and one that was interrupted goes on.

`versions.csv` says by which blocks (block_m x block_n x stages x warps) each older version compiled an instance without
complaints, the registers a thread and the digest of what it compiled, which is not there where the row is older than
digests; a run writes it as it goes, with `--stale` of what is compiled otherwise now. A field is empty where the
version complained, and where it was not asked yet about one of `NEWEST_FIRST` or heads of more than `WIDEST`. Of the
newest version resources.csv says
more.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What comes with torch 2.10 to 2.14, and the newest one. pyproject.toml names the same.
SUPPORTED = ("3.6", "3.7", "3.8", "3.9")
OLDER = SUPPORTED[:-1]
FILE = Path(__file__).with_name("versions.csv")
# Second launches, which do nothing but where there is NaN, and the level of decomposed positions: older versions have
# compiled some of them, or none; and topk_similarity, which none was asked about.
NEWEST_FIRST = (
    "grad_key_guarded",
    "grad_value_guarded",
    "grad_side_guarded",
    "grid",
    "topk_keys",
    "topk_pairs",
    "topk_pairs_backward",
    "topk_grad_queries",
    "topk_grad_database",
)
# Heads of more columns, which older versions were not asked about either.
WIDEST = 256
KEYS = ("kernel", "level", "dtype", "head_dim", "arch")
Key = tuple[str, str, str, int, int]


def read() -> dict[Key, dict[str, str]]:
    """instance -> {version: "64x32x2x8:168:0badf00d", or "" where it has not been compiled}"""
    table = {}
    if FILE.exists():
        with FILE.open() as file:
            for row in csv.DictReader(file):
                key = (row["kernel"], row["level"], row["dtype"], int(row["head_dim"]), int(row["arch"]))
                table[key] = {version: row[version] for version in OLDER}
    return table


def write(table: dict[Key, dict[str, str]], order: list[Key]) -> None:
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*KEYS, *OLDER))
        for key in order:
            cells = table.get(key, {})
            writer.writerow((*key, *(cells.get(version, "") for version in OLDER)))


def installed(version: str) -> Path:
    """The folder with a version of Triton."""
    folder = ROOT / "build" / "triton" / version
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"triton=={version}.*"], check=True)
    return folder


def compiles(version: str, arguments: list[str]) -> bool:
    """Whether this version compiles all instances; says what is wrong with the others."""
    folder = installed(version)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH")))),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "tests.triton.resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="*", default=SUPPORTED)
    chosen, arguments = parser.parse_known_args()
    failed = [version for version in chosen.versions if not compiles(version, arguments)]
    if failed:
        print(f"Triton {', '.join(failed)}: see above")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
