"""``velm info`` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import velm_kernels
from velm_kernels.backends import cpu


def velm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "velm_kernels.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def rows(text: str) -> dict[str, str]:
    """By name; of torch, which is a version and a backend, the first."""
    return {line[2:24].strip(): line[24:].strip() for line in reversed(text.splitlines()) if line.startswith("  ")}


def test_shows_versions_and_what_is_in_use() -> None:
    done = velm("info", VELM_CPU_ISA="baseline")
    assert done.returncode == 0, done.stderr
    shown = rows(done.stdout)
    assert (shown["velm_kernels"], shown["torch"]) == (velm_kernels.__version__, torch.__version__)
    assert shown["reference"] == "yes"
    assert shown["baseline"] == "in use" if cpu.library_path("baseline").exists() else "was not built"
    for isa in cpu.INSTRUCTION_SETS[1:]:
        assert shown[isa] == ("usable" if cpu.why_not(isa) is None else f"no: {cpu.why_not(isa)}")


def test_a_wrong_instruction_set_is_shown_not_raised() -> None:
    done = velm("info", VELM_CPU_ISA="pentium")
    assert done.returncode == 0, done.stderr
    assert "there is no instruction set 'pentium'" in done.stdout


def test_measures_the_limits_on_request() -> None:
    pytest.importorskip("velm_kernels._facts")
    done = velm("info", "--peaks")
    assert done.returncode == 0, done.stderr
    number, unit = rows(done.stdout)["fp32 multiply-add"].split()
    assert unit == "GFLOP/s"
    assert float(number) > 1


def test_the_version_and_both_ways_to_run_it() -> None:
    for module in ("velm_kernels", "velm_kernels.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"velm_kernels {velm_kernels.__version__}\n")


def test_an_unknown_command_is_refused() -> None:
    done = velm("frobnicate")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
    assert "Traceback" not in done.stderr
