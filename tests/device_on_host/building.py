"""Builds the test programs of csrc/device_on_host and runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "device_on_host"
MISSING = [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool) is None]


def names_in(*names: str) -> list[str]:
    """The tests of these source files, as the programs name them."""
    return [name for file in names for name in re.findall(r"^TEST\((\w+)\)", (HERE / f"{file}.cpp").read_text(), re.M)]


def build(program: str) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", HERE, "-B", BUILD, "-G", "Ninja"]
    # Parallel test processes take turns; those that come later find everything built.
    with FileLock(BUILD / "lock"):
        for step in (configure, ["cmake", "--build", BUILD, "--parallel", "2", "--target", program]):
            done = subprocess.run(step, env={**os.environ, "CXX": "g++"}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / program


def run(program: Path, *tests: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *tests],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
