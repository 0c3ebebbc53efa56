"""The CPU libraries under AddressSanitizer: small calls of every operator, and a planted fault that must be caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "asan"

# One set, since the sources are the same: the sanitized code of the wider ones takes ten times as long to compile. What
# they do at the edges of tensors is seen by test_guarded.py.
ISA = "baseline"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake") and shutil.which("ninja")), reason="no g++"),
]


@pytest.fixture(scope="module")
def libraries() -> Path:
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DVELM_SANITIZE=address", "-DVELM_TESTING=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DVELM_OUTPUT_DIR={BUILD}", f"-DVELM_CPU_ISAS={ISA}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    # Parallel test processes take turns; those that come later find everything built.
    with FileLock(BUILD / "lock"):
        for step in (configure, ["cmake", "--build", BUILD]):
            done = subprocess.run(step, env={**os.environ, "CXX": "g++"}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "_lib"


def sanitized(libraries: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The runtime looks for the exceptions of C++ when it starts, and Python itself does not bring them.
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment |= {
        "LD_PRELOAD": " ".join(runtime),
        # Python and torch keep what they allocated until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "VELM_LIB_DIR": str(libraries),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("index", [9, 10, -1])
def test_catches_a_planted_fault(libraries: Path, index: int) -> None:
    program = (
        "import ctypes, torch; values = torch.ones(10); "
        f"read = ctypes.CDLL({str(libraries / 'libvelm_planted_fault.so')!r}).planted_read; "
        "read.restype, read.argtypes = ctypes.c_float, (ctypes.c_void_p, ctypes.c_long); "
        f"print('read', read(values.data_ptr(), {index}))"
    )
    done = sanitized(libraries, "-c", program)
    if 0 <= index < 10:
        assert done.returncode == 0, done.stderr
        assert "read 1.0" in done.stdout
    else:
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert "planted_read" in done.stderr


def test_operators(libraries: Path) -> None:
    """The cases of every operator: small sizes and those at which work is divided, no elements, any layout."""
    done = sanitized(
        libraries,
        # -s: what the sanitizer writes when it ends the process must not be left in a captured file.
        "-m", "pytest", "-s", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "tests/every_operator/test_numbers.py", "tests/every_operator/test_tensors.py",
        "-k", f"cpu-{ISA} and (test_numbers or any_size_may_be_0 or arguments_of_any_layout)",
        VELM_CPU_ISA=ISA,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
