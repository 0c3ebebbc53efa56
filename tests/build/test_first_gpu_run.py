"""`make gpu` as far as it can be tried without a GPU: its order, its limits, what it says of failures; and the numbers
of a small run on the CPU."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from velm_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TOOLS / script)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@bash
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("9.0", "90a"),
        ("8.0\n9.0\n8.0", "80;90a"),
        ("12.0\n8.6", "86;120"),
        ("10.0\n7.5", "100"),
        ("7.5", ""),
        ("[N/A]", ""),
        ("Failed to initialize NVML: Driver/library version mismatch", ""),
    ],
)
def test_architectures_of_the_gpus_here(said: str, expected: str, tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", f"printf '%s\\n' {said!r}" if "\n" not in said else f"printf '{said}\\n'")
    done = run("gpu_architectures.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")


# Stands in for an interpreter on a machine with a GPU: what is asked of it, it answers at once.
PYTHON = """
case "$*" in
  "-c import torch") ;;
  "-c import "*) exit 1 ;;
  *carried_library*) echo "there is a library for sm_90a" ;;
  "- cuda triton torch") echo "cuda merge_attention"; echo "triton merge_attention"; echo "triton linear" ;;
  *"--backend cuda"*) echo "FAILED merge_attention, planted"; echo "2 of 3 checks passed, 1 failed"; exit 1 ;;
  *"--operator linear"*) echo $$ > "$OUT/hangs"; exec sleep 30 ;;
  *"velm_kernels check"*) echo "3 of 3 checks passed" ;;
  *"-m benchmarks"*) echo "q-former 1.0 ms" ;;
  *one_call*large*) echo "profiled" ;;
  *one_call*masked_pool*) echo "Invalid __global__ read of size 16"; exit 3 ;;
  *one_call*) echo "passed" ;;
  -) echo "summary: a device" ;;
  *) exit 0 ;;
esac
"""


@bash
def test_what_fails_comes_first_and_stops_nothing(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = program(tools, "fake-python", PYTHON)
    for name in ("compute-sanitizer", "ncu"):
        program(tools, name, 'while [ "${1##*/}" != fake-python ]; do shift; done; exec "$@"')
    out = tmp_path / "out"
    done = run(
        "first_gpu_run.sh",
        PATH=f"{tools}:{os.environ['PATH']}",
        PYTHON=str(fake),
        DEVICE="cuda",
        OUT=str(out),
        JOBS="2",
        LIMIT_ONE_CHECK="1",
        STEPS="environment build check sanitizer benchmark ncu tests",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    steps = {line.split("\t")[0]: line.split("\t")[1:] for line in (out / "steps.tsv").read_text().splitlines()}
    assert {name: state for name, (state, *_) in steps.items()} == {
        "environment": "ok",
        "build": "skipped",
        "check": "failed",
        "sanitizer-gated_residual": "ok",
        "sanitizer-masked_pool": "failed",
        "sanitizer-cross_attention": "ok",
        "benchmark": "ok",
        "ncu": "ok",
        "tests": "skipped",
    }
    summary = (out / "summary.txt").read_text()
    states = re.findall(r"^(failed|skipped|ok) ", summary, re.M)
    assert states == sorted(states, key=["failed", "skipped", "ok"].index)
    assert "summary: a device".removeprefix("summary: ") in summary
    # The kernel that was wrong, the one that hung, and what the others said.
    assert "FAILED merge_attention, planted" in summary
    assert "FAILED stopped after 1 s" in (out / "check" / "triton-linear.txt").read_text()
    assert "3 of 3 checks passed" in (out / "check" / "triton-merge_attention.txt").read_text()
    assert "3 of 3 ran, 2 with failures" in (out / "check.txt").read_text()
    assert "Invalid __global__ read" in summary
    assert "q-former 1.0 ms" in summary


@bash
def test_nothing_goes_on_after_its_time(tmp_path: Path) -> None:
    fake = program(tmp_path, "fake-python", PYTHON.replace("one_call*", "sleeps*"))
    program(tmp_path, "ncu", "sleep 60")
    out = tmp_path / "out"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(fake), "OUT": str(out), "DEVICE": "cuda"}
    done = run("first_gpu_run.sh", **environment, STEPS="ncu benchmark", LIMIT_NCU="1")
    assert "stopped after 1 s" in done.stdout
    assert done.returncode == 1
    # Nor what it began.
    done = run("first_gpu_run.sh", **environment, STEPS="check", LIMIT_CHECK="2", JOBS="3")
    assert "stopped after 2 s" in done.stdout
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "hangs").read_text()), 0)
    done = run("first_gpu_run.sh", **environment, STEPS="benchmark", LIMIT="4")
    assert done.returncode == 0
    assert "the 4 s of LIMIT are over" in (out / "summary.txt").read_text()


@bash
def test_without_a_gpu_nothing_else_is_tried(tmp_path: Path) -> None:
    fake = program(tmp_path, "fake-python", PYTHON.replace('-) echo "summary: a device"', "-) echo 'no GPU'; exit 1"))
    done = run("first_gpu_run.sh", PYTHON=str(fake), OUT=str(tmp_path / "out"), DEVICE="cuda")
    assert done.returncode == 1
    assert not (tmp_path / "out" / "benchmark.txt").exists()
    assert "nothing else is tried" in done.stderr


@bash
@pytest.mark.skipif(not cpu.usable(), reason="no CPU library")
def test_a_small_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    done = run(
        "first_gpu_run.sh",
        PYTHON=sys.executable,
        DEVICE="cpu",
        OUT=str(tmp_path),
        STEPS="build check ncu",
        CHECK_OPERATORS="gated_residual",
    )
    assert done.returncode == 0, (tmp_path / "summary.txt").read_text()
    assert re.search(r"cpu +gated_residual +\d+ of \d+ checks passed", (tmp_path / "summary.txt").read_text())


def flags(command: list[str]) -> tuple[set[str], list[str]]:
    """Definitions, and what decides which code is made."""
    definitions = {part for part in command if re.match(r"-D(?!velm_cuda_EXPORTS|VELM_ONLY_SMALL)", part)}
    return definitions, [part for part in command if re.match(r"-O|-std=|--generate-code", part)]


def test_without_cmake_the_same_is_compiled() -> None:
    """tools/build_cuda.py beside what CMake wrote down in a build folder of this checkout."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda path: path.stat().st_mtime):
        entries = [entry for entry in json.loads(path.read_text()) if "velm_cuda.dir" in entry["command"]]
        if entries:
            found = {
                str(Path(entry["file"]).relative_to(ROOT)): entry["command"].replace("\\", "").split()
                for entry in entries
            }
    if not found:
        pytest.skip("no build folder with the CUDA library")
    builder = runpy.run_path(str(TOOLS / "build_cuda.py"))
    compiled = " ".join(found["csrc/build_info.cpp"])
    said = {name: re.search(rf'{name}="([^"]*)"', compiled) for name in ("VELM_ISA", "VELM_CUDA_VERSION")}
    torch_version = re.search(r'VELM_TORCH_VERSION="([^"]*)"', compiled)
    assert torch_version is not None and said["VELM_ISA"] is not None and said["VELM_CUDA_VERSION"] is not None
    ours = builder["commands"](
        "nvcc",
        said["VELM_ISA"].group(1).split(","),
        (Path("/torch"), torch_version.group(1)),
        said["VELM_CUDA_VERSION"].group(1),
    )
    assert set(ours) == set(found)
    for source, command in ours.items():
        assert flags(command) == flags(found[source]), source
