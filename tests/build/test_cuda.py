"""The CUDA library: what decides whether it is built, and what it asks of the torch that loads it. No GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import velm_kernels
from velm_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = cuda.library_path("cuda")

needs_the_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"no CUDA library: {cuda.why_not_built()}")


def symbols(which: str, library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def symbols_of_a_cuda_torch() -> set[str]:
    """What the stable interface declares, for every torch and for one built for CUDA."""
    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    # The second holds the operators that torch/csrc/stable/ops.h is made of.
    names = ("inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h", "stable/c/shim.h")
    headers = [folder / name for name in names]
    text = "".join(re.sub(r"//.*", "", header.read_text()) for header in headers)
    return set(re.findall(r"\b((?:aoti_torch|torch)_\w+)\s*\(", text))


@needs_the_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_needs_only_what_a_cuda_torch_provides() -> None:
    undefined = symbols("--undefined-only", LIBRARY)
    # What the C++ runtime and the C library provide carries a version; the CUDA runtime is linked statically.
    unversioned = {name for name in undefined if "@" not in name}
    start_files = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
    of_torch = unversioned - start_files
    assert of_torch <= symbols_of_a_cuda_torch()
    # Every torch has the rest: that it is in libtorch_cuda is why the library is loaded only where there is one.
    everywhere = symbols("--defined-only", Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    if torch.version.cuda is None:
        assert of_torch - everywhere == {"aoti_torch_get_current_cuda_stream"}


@needs_the_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_exports_nothing_but_its_description() -> None:
    assert symbols("--defined-only", LIBRARY) == {"velm_build_info"}


@needs_the_library
def test_describes_itself() -> None:
    info = cuda.build_info()
    assert info["version"] == velm_kernels.__version__
    assert all(re.fullmatch(r"\d+a?", arch) for arch in info["isa"].split(","))


def test_info_says_whether_it_is_in_use_and_why_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "velm_kernels.cli", "info"], capture_output=True, text=True, check=True
    )
    section = done.stdout.partition("cuda library\n")[2].partition("\nbackends")[0]
    reason = cuda.why_not("cuda")
    assert re.search(r"in use +" + ("yes" if reason is None else re.escape(f"no: {reason}")), section)
    assert ("architectures" in section) == LIBRARY.exists()


def configure(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DVELM_OUTPUT_DIR={tmp_path}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DVELM_CPU_ISAS=baseline"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return done, tmp_path / "_lib" / "cuda_not_built.txt"


def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose path has everything but nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name != "nvcc":
                link = folder / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return {"PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": ""}


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="cmake or ninja is not installed")
class TestGate:
    def test_switched_off(self, tmp_path: Path) -> None:
        done, note = configure(tmp_path, VELM_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert "VELM_BUILD_CUDA=0" in note.read_text()

    def test_no_nvcc(self, tmp_path: Path) -> None:
        environment = without_nvcc(tmp_path)
        done, note = configure(tmp_path, VELM_BUILD_CUDA="", **environment)
        assert done.returncode == 0, done.stderr
        assert "nvcc was found neither" in note.read_text()
        shutil.rmtree(tmp_path / "build")
        done, _ = configure(tmp_path, VELM_BUILD_CUDA="1", **environment)
        assert done.returncode != 0
        assert "nvcc is neither on the path" in " ".join(done.stderr.split())

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
    def test_architectures(self, tmp_path: Path) -> None:
        done, note = configure(tmp_path, VELM_BUILD_CUDA="1", VELM_CUDA_ARCHS="")
        assert done.returncode == 0, done.stderr
        assert not note.exists()
        commands = (tmp_path / "build" / "compile_commands.json").read_text()
        kernel = next(line for line in commands.splitlines() if "gated_residual.cu" in line and "command" in line)
        # Machine code and PTX, all of them from the PTX of sm_80.
        (made,) = re.findall(r"arch=compute_80,code=\[([^\]]*)\]", kernel)
        assert made.split(",") == ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_80"]
