"""Installing where something is missing: one clear sentence, no stack trace, and a package that works without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "/nowhere/g++"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, as it would be in a fresh clone."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_lib")
    for name in ("csrc", "cmake", "velm_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def run(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": "", "VELM_CPU_ISA": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture
def only_setuptools(tmp_path: Path) -> str:
    """A directory from which an isolated interpreter imports setuptools and nothing else."""
    folder = tmp_path / "site"
    folder.mkdir()
    site_packages = Path(setuptools.__file__).parents[1]
    for path in [site_packages / "_distutils_hack", *site_packages.glob("setuptools*")]:
        (folder / path.name).symlink_to(path)
    return str(folder)


def without_site_packages(folder: str, command: str) -> str:
    """A program that sees the modules of ``folder`` alone, then runs ``setup.py command``."""
    return (
        "import runpy, site, sys, sysconfig; "
        f"paths = dict.fromkeys(sysconfig.get_paths(), {folder!r}); "
        "sysconfig.get_paths = lambda *args, **kwargs: paths; site.ENABLE_USER_SITE = False; "
        f"sys.prefix = sys.base_prefix; sys.path.insert(0, {folder!r}); sys.argv = ['setup.py', {command!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )


def test_without_a_compiler(source: Path) -> None:
    done = run(source, "setup.py", "build", "--build-lib", "built", CXX=NOWHERE)
    assert done.returncode == 0, done.stderr
    sentences = [line for line in done.stderr.splitlines() if "No C++ compiler" in line]
    assert len(sentences) == 1
    assert NOWHERE in sentences[0]

    installed = source / "built"
    assert not list(installed.rglob("*.so"))
    program = (
        "import torch, velm_kernels; query = torch.randn(1, 2, 3, 4); "
        "print(tuple(velm_kernels.cross_attention(query, query, query).shape)); "
        "print(velm_kernels.explain('cross_attention', query, query, query))"
    )
    done = run(installed, "-c", program, VELM_LIB_DIR="")
    assert done.returncode == 0, done.stderr
    assert "(1, 2, 3, 4)" in done.stdout
    assert "No C++ compiler" in done.stdout
    # pip hides what a build prints, so the package says it: once, at the line that called it, whichever way.
    program = """
import torch, velm_kernels
def of_user(query):
    module = velm_kernels.CrossAttention(64, 2)
    module(query, query).sum().backward()  # the line
    velm_kernels.linear(query, torch.ones(64, 64))
of_user(torch.randn(16, 256, 64, requires_grad=True))
"""
    (installed / "program.py").write_text(program)
    done = run(installed, "program.py", VELM_LIB_DIR="")
    assert done.returncode == 0, done.stderr
    line = program[: program.index("# the line")].count("\n") + 1
    said = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(said) == 1, done.stderr
    assert f"program.py:{line}: UserWarning: velm_kernels: " in said[0]
    assert re.search(r"velm_kernels: (linear|cross_attention) runs on plain torch, .*No C\+\+ compiler", said[0])
    done = run(installed, "-m", "velm_kernels.cli", "info", VELM_LIB_DIR="")
    assert done.returncode == 0, done.stderr
    assert "No C++ compiler" in done.stdout


@pytest.mark.parametrize("command", ["dist_info", "build_ext"])
def test_without_torch(source: Path, only_setuptools: str, command: str) -> None:
    # -S: no site-packages, as in an environment where nothing is installed yet.
    done = run(source, "-S", "-c", without_site_packages(only_setuptools, command))
    assert done.returncode == 1
    assert "install torch>=2.10 first" in done.stderr
    assert not list(source.glob("*.dist-info"))


def test_with_a_torch_that_is_too_old(source: Path, only_setuptools: str) -> None:
    torch = Path(only_setuptools) / "torch"
    (torch / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.9.1'\n")
    done = run(source, "-S", "-c", without_site_packages(only_setuptools, "dist_info"))
    assert done.returncode == 1
    assert "needs torch>=2.10, and this environment has 2.9.1" in done.stderr


def test_a_failing_build_says_so(source: Path) -> None:
    done = run(source, "setup.py", "build_ext", CMAKE_ARGS="-DVELM_CPU_ISAS=pentium")
    assert done.returncode == 1
    assert "there is no instruction set pentium" in done.stderr
    assert "Building velm_kernels failed" in done.stderr


@pytest.mark.parametrize("jobs", ["0", "many"])
def test_max_jobs_is_a_positive_number(source: Path, jobs: str) -> None:
    done = run(source, "setup.py", "build_ext", MAX_JOBS=jobs)
    assert done.returncode == 1
    assert f"MAX_JOBS must be a positive number, got {jobs!r}" in done.stderr
