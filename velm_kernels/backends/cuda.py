"""The CUDA kernels: in ``libvelm_cuda.so`` for devices, in ``libvelm_device_on_host.so`` on threads of the host.

Both are compiled from the same sources and register the same operators, each in a namespace of its own. The second one
(backend ``device_on_host``) is built for the tests alone, is slow, and is never chosen by itself.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from velm_kernels.backends import Arguments, register
from velm_kernels.backends.cpu import DTYPES, define_all, library_directory

NAMESPACES = {"cuda": "velm_cuda", "device_on_host": "velm_device_on_host"}


_schemas: list[str] = []
_opened: list[str] = []


def declare(schema: str) -> None:
    """Declares an operator in the namespaces of the libraries that are opened, which implement it."""
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
def why_not(backend: str) -> str | None:
    """Why the library of ``backend`` cannot be used here, or None if it can. Opens it."""
    if not library_path(backend).exists():
        return why_not_built() if backend == "cuda" else f"{library_path(backend)} was not built"
    if backend == "cuda":
        if torch.version.cuda is None:
            return "this torch is not built for CUDA"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    define_all(NAMESPACES[backend], _schemas)
    _opened.append(backend)
    try:
        torch.ops.load_library(str(library_path(backend)))
    except OSError as error:
        return f"{library_path(backend).name} does not load: {error}"
    return None


def has(backend: str, operator: str) -> bool:
    """Whether the library of ``backend``, which must be usable, implements ``operator``."""
    key = "CUDA" if backend == "cuda" else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES[backend]}::{operator}", key)


def common_reasons(backend: str, arguments: Arguments) -> list[str]:
    """Why nothing on the devices of ``backend`` can take ``arguments``: library, devices, dtypes."""
    reason = why_not(backend)
    if reason is not None:
        return [reason]
    device = "cuda" if backend == "cuda" else "cpu"
    found = []
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type != device:
                found.append(f"{name} is on {tensor.device}")
            if tensor.is_floating_point() and tensor.dtype not in DTYPES:
                found.append(f"{name} is {tensor.dtype}, not float32, bfloat16 or float16")
    return list(dict.fromkeys(found))


def reasons(backend: str, operator: str, arguments: Arguments) -> list[str]:
    """Why the kernel cannot take ``arguments``: library, devices, dtypes."""
    if why_not(backend) is None and not has(backend, operator):
        return [f"has no {operator}"]
    return common_reasons(backend, arguments)


def register_cuda(
    operator: str,
    more_reasons: Callable[[Arguments], list[str]] = lambda arguments: [],
    prepare: Callable[[tuple[Any, ...]], Iterable[Any]] = lambda args: args,
) -> None:
    """Registers the kernels of ``operator``, called with what ``prepare`` makes of the arguments, under the backends
    ``cuda`` and ``device_on_host``."""
    for backend, namespace in NAMESPACES.items():

        def call(*args: Any, _namespace: str = namespace) -> Any:
            return getattr(getattr(torch.ops, _namespace), operator).default(*prepare(args))

        def why(arguments: Arguments, _backend: str = backend) -> list[str]:
            return reasons(_backend, operator, arguments) or more_reasons(arguments)

        register(operator, backend, call, why)


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
