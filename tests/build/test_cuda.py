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
from velm_kernels.backends import cpu, cuda
from velm_kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = cuda.library_path("cuda")

needs_the_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"no CUDA library: {cuda.why_not_built()}")


needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils are not installed"
)
OF_TORCH_CUDA = "aoti_torch_get_current_cuda_stream"


def symbols(which: str, library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def needed(library: Path) -> dict[str, list[str]]:
    """What the library names as NEEDED, and its RPATH and RUNPATH."""
    shown = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {"NEEDED": [], "RPATH": [], "RUNPATH": []}
    for kind, name in re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", shown):
        found[kind].append(name)
    return found


@needs_the_library
@needs_binutils
def test_every_symbol_comes_from_a_library_that_it_names() -> None:
    undefined = symbols("--undefined-only", LIBRARY)
    # What the C++ runtime and the C library provide carries a version; the CUDA runtime is linked statically.
    unversioned = {name for name in undefined if "@" not in name}
    start_files = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
    named = needed(LIBRARY)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(named["NEEDED"])
    assert {name.split(".")[0] for name in named["NEEDED"]} <= {
        *("libtorch_cpu", "libtorch_cuda", "libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt"),
        *("ld-linux-x86-64", "ld-linux-aarch64"),
    }
    # They are in the process before this library, wherever torch lies.
    assert not named["RPATH"] and not named["RUNPATH"]
    provided = symbols("--defined-only", Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    assert unversioned - start_files - provided == {OF_TORCH_CUDA}
    if torch.version.cuda is not None:
        assert OF_TORCH_CUDA in symbols("--defined-only", Path(torch.__file__).parent / "lib" / "libtorch_cuda.so")


OPEN = """
import ctypes, os, sys
import torch
import velm_kernels
from velm_kernels.backends import cuda
# As torch opens its own: nobody finds its symbols who does not name it as needed.
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW | os.RTLD_LOCAL)
    try:
        ctypes.CDLL(None).aoti_torch_get_current_cuda_stream
    except AttributeError:
        pass
    else:
        sys.exit("the stand-in is visible to everybody")
reason = cuda.open_now("cuda")
if reason:
    sys.exit(reason)
missing = [name for name in ("attention_forward", "pool_forward", "bilinear_forward") if not cuda.has("cuda", name)]
sys.exit(f"not registered: {missing}" if missing else 0)
"""


def opened(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OPEN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "LD_BIND_NOW": "1"}, capture_output=True, text=True)


@needs_the_library
def test_opens_beside_a_libtorch_cuda_that_keeps_its_symbols_to_itself(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        done = opened()
    elif shutil.which("g++") is None:
        pytest.skip("there is no g++")
    else:
        stand_in = tmp_path / "libtorch_cuda.so"
        source = f'extern "C" int {OF_TORCH_CUDA}(int, void**) {{ return 1; }}\n'
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libtorch_cuda.so", "-o", stand_in]
        subprocess.run(command, input=source, text=True, check=True)
        done = opened(stand_in)
    assert done.returncode == 0, done.stderr


@needs_the_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings libtorch_cuda.so")
def test_the_stand_in_that_it_was_linked_with_is_found_by_nobody() -> None:
    done = opened()
    assert done.returncode != 0
    assert "libtorch_cuda.so: cannot open shared object file" in done.stderr
    assert not list(LIBRARY.parent.glob("libtorch*"))


@needs_the_library
@needs_binutils
def test_exports_nothing_but_its_description() -> None:
    assert symbols("--defined-only", LIBRARY) == {"velm_build_info", "velm_signatures"}


@needs_the_library
def test_describes_itself() -> None:
    info = cuda.build_info()
    assert info["version"] == velm_kernels.__version__
    assert all(re.fullmatch(r"\d+a?", arch) for arch in info["isa"].split(","))
    assert info["ptx"] == "80"
    assert re.fullmatch(r"\d+\.\d+", info["cuda"])


BUILD = {"isa": "80,90a,100,120", "ptx": "80", "cuda": "12.8"}


@pytest.mark.parametrize(
    ("capability", "driver", "build", "expected"),
    [
        ((8, 0), 12080, BUILD, None),
        ((8, 9), 12000, BUILD, None),  # machine code of sm_80, and any driver of CUDA 12
        ((9, 0), 13000, BUILD, None),
        ((12, 1), 12080, BUILD, None),
        ((11, 0), 12080, BUILD, None),  # by PTX
        ((11, 0), 12040, BUILD, "no machine code for compute capability 11.0"),
        ((9, 0), 12040, {**BUILD, "isa": "80"}, "no machine code for compute capability 9.0"),
        ((9, 1), 12040, BUILD, "no machine code for compute capability 9.1"),  # 90a is for 9.0 alone
        ((8, 0), 11080, BUILD, "the driver knows CUDA 11.8, the library was built with CUDA 12.8"),
        ((7, 5), 13000, BUILD, "compute capability 7.5 is older than 8.0"),
    ],
)
def test_which_devices_and_drivers_it_is_for(capability, driver, build, expected) -> None:
    reason = cuda._why_not_on(capability, driver, build)
    assert reason is None if expected is None else expected in str(reason)


def test_the_words_of_the_loader_are_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "libvelm_cuda.so"
    broken.write_bytes(b"not a library")
    reason = cpu.open_library(broken, [])
    assert reason is not None
    assert reason.startswith("libvelm_cuda.so does not load: ")
    assert "file too short" in reason or "invalid ELF header" in reason


def test_a_library_that_was_built_and_does_not_open_fails_the_check(tmp_path, monkeypatch, capsys) -> None:
    """Under a torch that is built for CUDA; under one for CPUs it cannot open, and that is no failure."""
    (tmp_path / "libvelm_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "library_path", lambda backend: tmp_path / "libvelm_cuda.so")
    try:
        small = ["check", "--operator", "gated_residual"]
        for version, expected in ((None, 0), ("13.0", 1)):
            monkeypatch.setattr(torch.version, "cuda", version)
            cuda.why_not_open.cache_clear()
            assert main(small) == expected, version
            assert ("FAILED cuda: libvelm_cuda.so does not load" in capsys.readouterr().out) == bool(expected)
    finally:
        cuda.why_not_open.cache_clear()


def test_info_says_whether_it_is_in_use_and_why_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "velm_kernels.cli", "info"], capture_output=True, text=True, check=True
    )
    section = done.stdout.partition("cuda library\n")[2].partition("\nbackends")[0]
    reason = cuda.why_not("cuda")
    assert re.search(r"in use +" + ("yes" if reason is None else re.escape(f"no: {reason}")), section)
    closed = cuda.why_not_open("cuda")
    assert re.search(r"opens +" + ("yes" if closed is None else re.escape(f"no: {closed}")), section)
    assert ("machine code" in section) == LIBRARY.exists()
    if LIBRARY.exists():
        codes = ", ".join(f"sm_{arch}" for arch in cuda.build_info()["isa"].split(","))
        assert f"{codes}; PTX of sm_80" in section


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
    @pytest.mark.parametrize(("version", "warns"), [("11.4", True), ("99.0", False)])
    def test_a_driver_too_old_for_this_nvcc(self, tmp_path: Path, version: str, warns: bool) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '| Driver Version: 1.2  CUDA Version: {version}  |'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done, _ = configure(tmp_path, VELM_BUILD_CUDA="1", VELM_CUDA_ARCHS="80", PATH=path)
        assert done.returncode == 0, done.stderr
        assert ("driver of this machine serves CUDA 11" in " ".join(done.stderr.split())) == warns

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
    def test_architectures(self, tmp_path: Path) -> None:
        done, note = configure(tmp_path, VELM_BUILD_CUDA="1", VELM_CUDA_ARCHS="")
        assert done.returncode == 0, done.stderr
        assert not note.exists()
        commands = (tmp_path / "build" / "compile_commands.json").read_text()
        kernel = next(line for line in commands.splitlines() if "gated_residual/cuda.cu" in line and "command" in line)
        # Machine code and PTX, all of them from the PTX of sm_80.
        (made,) = re.findall(r"arch=compute_80,code=\[([^\]]*)\]", kernel)
        assert made.split(",") == ["sm_80", "sm_90a", "sm_100", "sm_120", "compute_80"]
