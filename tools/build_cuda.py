"""Builds ``libvelm_cuda.so`` with nvcc alone, for machines without CMake. What is compiled is found as by
``cmake/cuda.cmake``; a test compares sources and flags with those that CMake gives."""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As ``cmake/cuda.cmake`` finds them.
SOURCES = ("*/cuda*.cu", "*/*/cuda*.cu", "*/*/cuda*.cpp")


def sources() -> list[str]:
    found = [path for pattern in SOURCES for path in sorted((ROOT / "csrc").glob(pattern))]
    return ["csrc/build_info.cpp", *(str(path.relative_to(ROOT)) for path in found)]


def commands(nvcc: str, archs: list[str], torch: tuple[Path, str], cuda: str) -> dict[str, list[str]]:
    """What compiles each source, without its ``-o``."""
    directory, torch_version = torch
    version = runpy.run_path(str(ROOT / "velm_kernels" / "_version.py"))["__version__"]
    shared = [
        "-O3", "-std=c++20", "-c", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc", "-isystem", f"{directory}/include",
        "-DNDEBUG", "-DVELM_NAMESPACE=velm_cuda", f'-DVELM_ISA="{",".join(archs)}"', '-DVELM_PTX="80"',
        f'-DVELM_CUDA_VERSION="{cuda}"', "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]  # fmt: skip
    code = ",".join([*(f"sm_{arch}" for arch in archs), "compute_80"])
    found = {}
    for source in sources():
        own = [f"--generate-code=arch=compute_80,code=[{code}]"] if source.endswith(".cu") else []
        if source.endswith("build_info.cpp"):
            own = [f'-DVELM_VERSION="{version}"', f'-DVELM_TORCH_VERSION="{torch_version}"']
        found[source] = [nvcc, *shared, *own, source]
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", default="80", help="e.g. 80;90a (default 80)")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "nvcc")
    parser.add_argument("--out", type=Path, default=ROOT / "velm_kernels" / "_lib")
    args = parser.parse_args()
    torch = runpy.run_path(str(ROOT / "cmake" / "locate_torch.py"))
    location = torch["locate"]()
    if location is None:
        raise SystemExit(torch["MISSING"])
    shown = subprocess.run([args.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([0-9]+\.[0-9]+)", shown)
    assert release is not None, shown
    args.build.mkdir(parents=True, exist_ok=True)
    objects = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = []
        for source, command in commands(args.nvcc, args.archs.split(";"), location, release.group(1)).items():
            objects[source] = args.build / (source.replace("/", "_") + ".o")
            waiting.append((source, pool.submit(run, [*command, "-o", str(objects[source])])))
        for source, done in waiting:
            done.result()
            print(f"compiled {source}", flush=True)
    # See cmake/cuda.cmake: only its name counts.
    stand_in = args.build / "libtorch_cuda.so"
    run([args.nvcc, "-shared", "-Xcompiler=-fPIC", "-Xlinker=-soname,libtorch_cuda.so", "cmake/torch_cuda.cpp",
         "-cudart=none", "-o", str(stand_in)])  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    library = args.out / "libvelm_cuda.so"
    run([args.nvcc, "-shared", "-cudart=static", *map(str, objects.values()), f"-L{args.build}", f"-L{location[0]}/lib",
         "-Xlinker=--as-needed,--no-undefined,--version-script=cmake/exports.map", "-ltorch_cuda", "-ltorch_cpu",
         "-o", str(library)])  # fmt: skip
    (args.out / "cuda_not_built.txt").unlink(missing_ok=True)
    print(f"built {library} for {args.archs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
