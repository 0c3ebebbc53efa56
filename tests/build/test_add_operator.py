"""CONTRIBUTING.md, "Adding an operator", followed: the operator of tests/build/add_operator in a copy of the tree.

The room of the operator, its C++ source and its public name are all that is added. Its library is compiled alone, which
takes seconds; `make` finds the source by its place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from velm_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
ADDED = Path(__file__).with_name("add_operator")
ISA = "baseline"
# A name beside which the public name of the example is written.
BESIDE = "film"

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def run(arguments: Sequence[str | Path], tree: Path, **environment: str) -> str:
    # What the tests were told of libraries and backends holds for other trees.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VELM_")}
    given = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "VELM_CPU_ISA": ISA, "VELM_TEST_EXAMPLES": "3"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=tree,
        env={**inherited, **given, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def add_public_name(path: Path, name: str, imported: str) -> None:
    """The entry in the public names: an import and a line of ``__all__``."""
    text = path.read_text()
    text, lists = re.subn(rf'^    "{BESIDE}",\n', f'    "{BESIDE}",\n    "{name}",\n', text, flags=re.M)
    text, imports = re.subn(rf"^(from \S+ import {BESIDE}|    {BESIDE},)\n", rf"\1\n{imported}\n", text, flags=re.M)
    assert (lists, imports) == (1, 1), path
    path.write_text(text)


def compile_alone(tree: Path, operator: str) -> None:
    """The CPU library with this operator and no other."""
    package = Path(torch.__file__).parent
    library = tree / "velm_kernels" / "_lib" / f"libvelm_cpu_{ISA}.so"
    library.parent.mkdir()
    defined = {
        "VELM_NAMESPACE": f"velm_cpu_{ISA}",
        "VELM_ISA": f'"{ISA}"',
        "VELM_VERSION": f'"{__version__}"',
        "VELM_TORCH_VERSION": f'"{torch.__version__}"',
        "TORCH_TARGET_VERSION": "0x020a000000000000",
    }
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-psabi", "-fno-math-errno"]
    command += [f"-D{name}={value}" for name, value in defined.items()]
    command += ["-I", tree / "csrc", "-isystem", package / "include", "-L", package / "lib"]
    sources = [*sorted((tree / "csrc" / operator).glob("cpu*.cpp")), tree / "csrc" / "build_info.cpp"]
    run([*command, *sources, "-o", library, "-ltorch_cpu"], tree)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the example added."""
    folder = tmp_path_factory.mktemp("added")
    unwanted = shutil.ignore_patterns("_lib", "__pycache__", "*.pyc", "add_operator")
    for name in ("velm_kernels", "csrc", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("velm_kernels", "csrc"):
        shutil.copytree(ADDED / name, folder / name, dirs_exist_ok=True)
    family = folder / "velm_kernels" / "fusion"
    add_public_name(family / "__init__.py", "glu", "from velm_kernels.fusion.glu import glu")
    add_public_name(folder / "velm_kernels" / "__init__.py", "glu", "    glu,")
    compile_alone(folder, "fusion/glu")
    return folder


def test_eight_files_or_fewer_are_touched() -> None:
    files = [path for path in ADDED.rglob("*") if path.suffix in (".py", ".cpp")]
    # And the two with public names.
    assert len(files) + 2 <= 9, files


def test_its_numbers_are_right_on_every_backend(tree: Path) -> None:
    told = run(
        [sys.executable, "-m", "velm_kernels", "check", "--operator", "glu", "--why"], tree, TRITON_INTERPRET="1"
    )
    for backend in ("reference", f"cpu ({ISA})", "triton"):
        assert backend in told, told


def test_the_tests_over_every_operator_find_it(tree: Path) -> None:
    tests = [f"tests/every_operator/test_{name}.py" for name in ("tensors", "arguments", "derivatives", "numbers")]
    told = run(
        [
            sys.executable,
            "-m",
            "pytest",
            *tests,
            "tests/test_docstrings.py",
            "-k",
            "glu",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        tree,
        VELM_CPU_ISA=ISA,
    )
    passed = re.search(r"(\d+) passed", told)
    assert passed and int(passed[1]) >= 20, told


def test_it_has_a_page_in_the_reference(tree: Path) -> None:
    program = "import conf; pages = conf.reference(); print(pages['glu']); assert 'glu>' in pages['index']"
    told = run([sys.executable, "-c", program], tree / "docs", PYTHONPATH=f"{tree / 'docs'}{os.pathsep}{tree}")
    assert ".. autofunction:: velm_kernels.glu" in told


def test_the_guide_shows_what_the_files_hold() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    told = guide[guide.index("### Adding an operator") : guide.index("### Adding a model family")]
    files = "\n".join(path.read_text() for path in ADDED.rglob("*") if path.is_file())
    held = {line.strip() for line in files.splitlines()}
    blocks = re.findall(r"^ +```\n(.*?)^ +```$", told, re.M | re.S)
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        assert line.strip() in held | {"..."}, line
