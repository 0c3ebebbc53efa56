"""No kernel of any instruction set touches memory beside its tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CPU_BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.build.guarded", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", [backend.isa for backend in CPU_BACKENDS])
def test_operators(isa: str) -> None:
    done = run(isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"


def test_catches_a_planted_fault() -> None:
    done = run("baseline", "planted")
    assert done.stdout == "1.0\n"
    assert done.returncode < 0
