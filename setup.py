"""Drives CMake and Ninja; what is built, and with which flags, is in CMakeLists.txt."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
MIN_CMAKE = (3, 25)
MIN_TORCH = (2, 10)
# Reads the license expression of pyproject.toml.
MIN_SETUPTOOLS = 77
# What one compiler process needs at most.
JOB_MEMORY = 1.5e9


def cmake_version() -> tuple[int, ...]:
    program = shutil.which("cmake")
    if program is None:
        return ()
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", shown)
    return tuple(int(number) for number in found.groups()) if found else ()


def build_tools() -> list[str]:
    """Return what pip has to bring into its build environment because the system does not have it."""
    tools = []
    if cmake_version() < MIN_CMAKE:
        tools.append("cmake>=" + ".".join(map(str, MIN_CMAKE)))
    if shutil.which("ninja") is None:
        tools.append("ninja")
    return tools


def require_torch() -> None:
    torch = runpy.run_path(str(ROOT / "cmake" / "locate_torch.py"))
    location = torch["locate"]()
    if location is None:
        raise SystemExit(torch["MISSING"])
    version = location[1]
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise SystemExit(
            f"velm_kernels needs torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}, and this environment has {version}."
        )


def find_compiler() -> tuple[str | None, str]:
    """Return (compiler, "") or (None, a sentence that says why there will be no compiled operators)."""
    without = (
        "so velm_kernels is installed without its compiled CPU operators and works through Triton and plain PyTorch"
    )
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"The CPU operators are written for x86-64 and this is {platform.machine()}, {without}."
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    advice = "install g++ 11 or newer and reinstall velm_kernels"
    for name in wanted:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            continue
        probe = subprocess.run(
            [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input="#include <experimental/simd>\nstd::experimental::native_simd<float> x;\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if probe.returncode == 0:
            return name, ""
    tried = ", ".join(wanted)
    return None, (
        f"No C++ compiler with C++20 and <experimental/simd> was found (tried {tried}), {without}: "
        f"to have them, {advice}."
    )


def jobs() -> int:
    """Return MAX_JOBS, or as many compiler processes as cores and free memory allow."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise SystemExit(f"MAX_JOBS must be a positive number, got {asked!r}.")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return max(1, min(cores, int(int(found.group(1)) * 1024 / JOB_MEMORY))) if found else cores


class CheckedDistInfo(dist_info):
    """Stops before pip resolves dependencies: there it would fetch a torch, which may not be the one that is wanted."""

    def run(self) -> None:
        require_torch()
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        require_torch()
        parallel = str(jobs())
        package = ROOT / "velm_kernels" if self.inplace else Path(self.build_lib).resolve() / "velm_kernels"
        libraries = package / "_lib"
        libraries.mkdir(parents=True, exist_ok=True)
        compiler, sentence = find_compiler()
        # A wheel takes everything it finds. In the source tree, what is up to date need not be linked again.
        if compiler is None or not self.inplace:
            for stale in [*libraries.glob("*"), *package.glob("_facts.*.so")]:
                stale.unlink()
        (libraries / "not_built.txt").unlink(missing_ok=True)
        if compiler is None:
            # pip shows what a build prints only where it fails, so the package keeps the sentence for `velm info`.
            (libraries / "not_built.txt").write_text(sentence + "\n")
            print(f"warning: {sentence}", file=sys.stderr)
            return
        missing = build_tools()
        if missing:
            raise SystemExit(f"Building velm_kernels needs {' and '.join(missing)}: pip install {shlex.join(missing)}")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # What an earlier build remembers of pip's build environment is gone by now. Its objects are kept.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (build / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(found, ignore_errors=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DVELM_OUTPUT_DIR={package}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        environment = {**os.environ, "CXX": compiler}
        for step in (configure, ["cmake", "--build", str(build), "--parallel", parallel]):
            if subprocess.run(step, env=environment, check=False).returncode:
                raise SystemExit(f"Building velm_kernels failed, as shown above, in: {shlex.join(step)}")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "velm_kernels"
        return [str(file) for file in [*(package / "_lib").glob("*"), *package.glob("_facts.*.so")]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# Only without pip's build isolation; the setuptools of a new environment may be years old.
if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    raise SystemExit(
        f"Building velm_kernels needs setuptools>={MIN_SETUPTOOLS}, and this environment has {setuptools.__version__}: "
        f"pip install 'setuptools>={MIN_SETUPTOOLS}'"
    )

setup(
    # Makes the wheel one for this platform and lets setuptools run build_ext.
    ext_modules=[Extension("velm_kernels._facts", [])],
    cmdclass={"build_ext": CMakeBuild, "dist_info": CheckedDistInfo},
    setup_requires=build_tools(),
)
