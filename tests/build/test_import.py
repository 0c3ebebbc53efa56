"""Importing the library brings torch and the library itself, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_imported() -> None:
    """No triton, no transformers, no rich, and of torch only what ``import torch`` brings by itself."""
    program = """
import sys
import torch
before = set(sys.modules)
import velm_kernels
brought = sorted(set(sys.modules) - before)
print(*(name for name in brought if name.partition(".")[0] != "velm_kernels"))
print(*(name for name in brought if name.partition(".")[0] == "velm_kernels"))
"""
    others, _, own = run(program).rpartition("\n")
    assert others.strip() == ""
    # Of an operator its function, its declaration and its meaning; kernels and cases when they are used.
    names = own.split()
    operators = [name.removesuffix("op") for name in names if name.endswith(".op")]
    assert not {room + file for room in operators for file in ("triton", "triton_kernels", "cases")} & set(names)
    assert len(names) < 60 + 4 * len(operators)


COUNT = """
query = torch.ones(2, 4, 3, 8)
key = torch.ones(2, 4, 5, 8)
x = torch.ones(3, 7, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    velm_kernels.cross_attention(query, key, key)
    velm_kernels.linear(x, torch.ones(11, 7), activation="gelu").sum().backward()
print(counter.get_total_flops())
print(inspect.getsource(FlopCounterMode).splitlines()[0])
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("velm_kernels")])
"""


COUNTER = "from torch.utils.flop_counter import FlopCounterMode"
LOOKED_FOR = "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')"


@pytest.mark.parametrize(
    "imports",
    [
        ("import velm_kernels", COUNTER),
        (COUNTER, "import velm_kernels"),
        ("import velm_kernels", LOOKED_FOR, COUNTER),
    ],
    ids=["before", "after", "looked for"],
)
def test_flops_are_counted_in_either_order(imports: tuple[str, ...]) -> None:
    total, source, finders = run("\n".join(["import inspect, sys, torch", *imports, COUNT])).splitlines()
    attention = 2 * 2 * (2 * 4 * 3 * 5 * 8)
    projection = 2 * (3 * 7 * 11)
    # Forward and the gradient of x.
    assert int(total) == attention + 2 * projection
    # Nothing is left of how the formulas came there.
    assert source.startswith("class FlopCounterMode")
    assert finders == "[]"
