"""Runs the tests of the operators on the Triton kernels, executed by Triton's interpreter.

The interpreter has to be chosen before triton is imported, hence in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def interpreted(*arguments: str, examples: int = 3) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VELM_TEST_EXAMPLES": str(examples),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # xdist describes its worker to its own process only.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.triton.fast_interpreter", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "which"),
    [
        ("test_numbers", "not varlen"),
        # Without those that take longest here and run the kernels of others.
        ("test_values", "not varlen and not ordinary and not bidirectional"),
        ("test_tensors", "(any_size_may_be_0 or arguments_of_any_layout) and not varlen and not ordinary"),
    ],
)
def test_every_operator(file: str, which: str) -> None:
    interpreted(f"tests/every_operator/{file}.py", "-k", f"triton and {which}")


@pytest.mark.slow
def test_what_is_peculiar_to_an_operator() -> None:
    """All but draws: the cases of every operator cross the borders of blocks, in any layout."""
    folders = ("tests/attention", "tests/fusion", "tests/losses", "tests/pooling", "tests/retrieval", "tests/sequence")
    interpreted(*folders, "-k", "triton and not compile and not opcheck", "-m", "not hypothesis")


@pytest.mark.slow
def test_kernels() -> None:
    interpreted("tests/triton/interpreted_cases.py")
