"""What the documents show runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWN = [
    pytest.param(block, id=f"{path.relative_to(ROOT)} {number}")
    for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[!.]*/**/*.md"))
    if not {"build", "out", "node_modules"} & set(path.relative_to(ROOT).parts)
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S), 1)
]


@pytest.mark.parametrize("block", SHOWN)
def test_every_python_example_runs_as_copied(block: str, tmp_path: Path) -> None:
    if "import transformers" in block:
        pytest.importorskip("transformers")
    program = tmp_path / "example.py"
    program.write_text(block)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_there_are_examples() -> None:
    assert len(SHOWN) >= 2
