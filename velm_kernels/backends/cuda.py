"""The CUDA kernels: in ``libvelm_cuda.so`` for devices, in ``libvelm_device_on_host.so`` on threads of the host.

Both are compiled from the same sources and register the same operators, each in a namespace of its own. The second one
(backend ``device_on_host``) is built for the tests alone, is slow, and is never chosen by itself.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from velm_kernels.backends import Arguments, failures
from velm_kernels.backends.cpu import DTYPES, compare, define_all, library_directory, open_library

NAMESPACES = {"cuda": "velm_cuda", "device_on_host": "velm_device_on_host"}
# The compute capability from which on the kernels run.
OLDEST = (8, 0)


_schemas: list[str] = []
_opened: list[str] = []


def declare(schema: str) -> None:
    """Declares an operator in the namespaces of the libraries that are opened, which implement it."""
    for backend in _opened:
        compare(library_path(backend), schema)
    _schemas.append(schema)
    for backend in _opened:
        define_all(NAMESPACES[backend], [schema])


def library_path(backend: str) -> Path:
    return library_directory() / f"lib{NAMESPACES[backend]}.so"


def why_not_built() -> str:
    note = library_directory() / "cuda_not_built.txt"
    return note.read_text().strip() if note.exists() else f"{library_path('cuda')} was not built"


def build_info(backend: str = "cuda") -> dict[str, str]:
    """What the library says about its build, among it its architectures as ``isa``; empty if it was not built.

    Read from the file: where torch is not built for CUDA, the library cannot be opened."""
    path = library_path(backend)
    found = re.search(rb"version=[^\0]*\nisa=[^\0]*", path.read_bytes()) if path.exists() else None
    return dict(line.split("=", 1) for line in found.group().decode().splitlines()) if found else {}


@functools.cache
def why_not_open(backend: str) -> str | None:
    """Why the library of ``backend`` does not open in this process, or None if it does. Needs no device."""
    if not library_path(backend).exists():
        return why_not_built() if backend == "cuda" else f"{library_path(backend)} was not built"
    if backend == "cuda" and torch.version.cuda is None:
        # It needs libtorch_cuda.so, which comes with such a torch alone.
        return "this torch is not built for CUDA"
    return open_now(backend)


def open_now(backend: str) -> str | None:
    """Opens the library of ``backend``; returns what went wrong, or None."""
    define_all(NAMESPACES[backend], _schemas)
    reason = open_library(library_path(backend), _schemas)
    if reason is None:
        _opened.append(backend)
    return reason


def faults() -> list[tuple[str, str]]:
    """(backend, reason) if the library was built and does not open under a torch that is built for CUDA."""
    if torch.version.cuda is None or not library_path("cuda").exists():
        return []
    reason = why_not_open("cuda")
    return [("cuda", reason)] if reason is not None else []


@functools.cache
def why_no_gpu() -> str | None:
    """Why torch sees no GPU, or None if it sees one."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    # What is wrong with the driver torch says by a warning, once.
    said = [str(warning.message).partition("(Triggered")[0].strip() for warning in heard]
    return "; ".join(["torch sees no GPU", *said])


def why_not(backend: str) -> str | None:
    """Why the library of ``backend`` cannot be used here, or None if it can. Opens it."""
    return why_not_open(backend) or (why_no_gpu() if backend == "cuda" else None)


@functools.cache
def why_not_on(index: int) -> str | None:
    """Why the library's kernels cannot run on the GPU ``index``, or None if they can: by its age and the driver's."""
    return _why_not_on(torch.cuda.get_device_capability(index), driver_version(), build_info())


def driver_version() -> int | None:
    """The version of CUDA that the driver knows, 12040 for 12.4, or None where it does not say."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def _why_not_on(capability: tuple[int, int], driver: int | None, build: dict[str, str]) -> str | None:
    major, minor = capability
    if capability < OLDEST:
        return f"compute capability {major}.{minor} is older than {OLDEST[0]}.{OLDEST[1]}"
    runtime = _numbers(build.get("cuda", "0.0"))
    known = runtime if driver is None else (driver // 1000, driver % 1000 // 10)
    told = f"the driver knows CUDA {known[0]}.{known[1]}, the library was built with CUDA {runtime[0]}.{runtime[1]}"
    # A driver serves every runtime of its major version, but compiles PTX of no later compiler.
    if known[0] < runtime[0]:
        return f"{told}: a newer driver is needed, or a build with nvcc {known[0]}"
    if any(_serves(arch, capability) for arch in build.get("isa", "").split(",")):
        return None
    if capability < _capability(build.get("ptx", "80")):
        return f"the library has code for {build.get('isa')} and PTX of {build.get('ptx')}, not for {major}.{minor}"
    if known < runtime:
        return f"{told}, and has no machine code for compute capability {major}.{minor}: a newer driver is needed"
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor)


def _capability(arch: str) -> tuple[int, int]:
    """(12, 0) for "120", (9, 0) for "90a"."""
    digits = arch if arch.isdigit() else arch[:-1]
    return int(digits[:-1]), int(digits[-1])


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` runs on a device: on later ones of the same generation, that for "90a" on 9.0
    alone."""
    made_for = _capability(arch)
    if not arch.isdigit():
        return made_for == capability
    return made_for[0] == capability[0] and made_for[1] <= capability[1]


def has(backend: str, operator: str) -> bool:
    """Whether the library of ``backend``, which must be usable, implements ``operator``."""
    key = "CUDA" if backend == "cuda" else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES[backend]}::{operator}", key)


def common_reasons(backend: str, arguments: Arguments) -> list[str]:
    """Why nothing on the devices of ``backend`` can take ``arguments``: devices, dtypes, library, the GPU itself."""
    device = "cuda" if backend == "cuda" else "cpu"
    found, index = [], None
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type != device:
                found.append(f"{name} is on {tensor.device}")
            elif index is None:
                index = tensor.device.index
            if tensor.is_floating_point() and tensor.dtype not in DTYPES:
                found.append(f"{name} is {tensor.dtype}, not float32, bfloat16 or float16")
    # Last, so that calls on other devices neither open a library nor ask for GPUs.
    reason = None if found else why_not(backend)
    if not found and reason is None and index is not None:
        reason = why_not_on(index)
    return list(dict.fromkeys(found)) if reason is None else [reason]


def reasons(backend: str, operator: str, arguments: Arguments) -> list[str]:
    """Why the kernel cannot take ``arguments``: library, devices, dtypes."""
    return common_reasons(backend, arguments) or ([] if has(backend, operator) else [f"has no {operator}"])


def op(backend: str, operator: str) -> Callable[..., Any]:
    """The operator of the library of ``backend``; where a kernel of it does not start, it says so."""
    return functools.partial(_call, backend, operator)


def _call(backend: str, operator: str, *args: Any) -> Any:
    try:
        return getattr(getattr(torch.ops, NAMESPACES[backend]), operator).default(*args)
    except RuntimeError as error:
        # csrc/device/launch.h; everything else is no matter of starting a kernel.
        of_cuda = re.search(r"velm: .*: cudaError", str(error))
        failure = failures.of_launch(error, "the CUDA library") if of_cuda else None
        if failure is None:
            raise
        raise failure from error


def launches() -> list[dict[str, str | int]]:
    """What the launches of backend ``device_on_host`` since the last call counted, oldest first.

    Each with ``kernel``, ``blocks``, ``threads``, ``shared_bytes``, ``global_bytes_read``, ``global_bytes_written``,
    ``matrix_instructions`` and ``bank_conflicts``.
    """
    describe = ctypes.CDLL(str(library_path("device_on_host"))).velm_device_on_host_launches
    describe.restype = ctypes.c_char_p
    found: list[dict[str, str | int]] = []
    for line in describe().decode().splitlines():
        kernel, *numbers = line.split("\t")
        counted: dict[str, str | int] = {"kernel": kernel}
        counted.update((name, int(value)) for name, value in (number.split("=") for number in numbers))
        found.append(counted)
    return found
