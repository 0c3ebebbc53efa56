"""The C++ libraries for the CPU: one shared library per instruction set, of which the best usable one is opened.

Each library registers its operators in a torch namespace of its own, ``velm_cpu_<instruction set>``, so that several
can live in one process and be compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from velm_kernels.backends import Arguments, kinds_depend_on, tensors_of
from velm_kernels.backends.choice import Choice
from velm_kernels.backends.schemas import parameters

# Best last. The emulated set computes the bf16 dot product of avx512_bf16 with ordinary AVX-512 arithmetic, so that
# its data layouts are tested on processors without the instruction; it is never chosen by itself. Operators that form
# no such product are not in its library: those of avx512 serve for it.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
TEST_ONLY = ("avx512_bf16_emulated",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_schemas: list[str] = []
_defined: set[tuple[str, str]] = set()
_loaded: dict[str, str] = {}
_asked_for = Choice("velm_kernels_isa")
_default: str | None = None


def library_directory() -> Path:
    return Path(os.environ.get("VELM_LIB_DIR") or Path(__file__).parent.parent / "_lib")


def library_path(isa: str) -> Path:
    return library_directory() / f"libvelm_cpu_{isa}.so"


def declare(schema: str) -> None:
    """Declares an operator in the namespace of every instruction set whose library is opened; it implements it."""
    opened = [isa for isa, error in _loaded.items() if not error]
    for isa in opened:
        compare(library_path(isa), schema)
    _schemas.append(schema)
    for isa in opened:
        define_all(f"velm_cpu_{isa}", [schema])


def compare(library: Path, schema: str) -> None:
    """Raises an error where a library that is open already has another kernel than the one that is declared now."""
    if reason := _why_other(library, [schema]):
        raise RuntimeError(reason)


def define_all(namespace: str, schemas: list[str]) -> None:
    """Defines operators in a torch namespace, once. A library wants them when it is opened, nobody does before."""
    for schema in schemas:
        if (namespace, schema) not in _defined:
            _defined.add((namespace, schema))
            torch.library.define(f"{namespace}::{schema.partition('(')[0]}", "(" + schema.partition("(")[2])


@functools.cache
def processor_supports(isa: str) -> bool:
    """Whether this processor and operating system can run code built for ``isa``."""
    if isa == "baseline":
        return True
    try:
        from velm_kernels import _facts
    except ImportError:
        # Built without pybind11 or the headers of Python: torch knows as much, if only by private names.
        pass
    else:
        return ("avx512" if isa in TEST_ONLY else isa) in _facts.cpu()["isas"]
    if isa == "avx2":
        return bool(torch.cpu._is_avx2_supported())
    if isa in ("avx512", "avx512_bf16_emulated"):
        return bool(torch.cpu._is_avx512_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def why_not(isa: str) -> str | None:
    """Why the library for ``isa`` cannot be used here, or None if it can."""
    if isa not in INSTRUCTION_SETS + TEST_ONLY:
        return f"there is no instruction set {isa!r}, only {', '.join(INSTRUCTION_SETS)}"
    if not processor_supports(isa):
        return f"this processor cannot run {isa} code"
    if not library_path(isa).exists():
        return f"{library_path(isa)} was not built"
    return load(isa)


def open_library(path: Path, schemas: list[str]) -> str | None:
    """Opens a library of operators, which are declared by ``schemas``; returns what went wrong, or None."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch names the library alone, and what the loader said stands behind that.
        return f"{path.name} does not load: {error.__cause__ or error}"
    return _why_other(path, schemas)


def _why_other(path: Path, schemas: list[str]) -> str | None:
    """Why the library that is open was not built from these sources, or None if it was.

    Torch compares no types, and a kernel would read what it is given as whatever it was compiled for."""
    again = "build it again (`make lib`, or `pip install .`)"
    try:
        noted = ctypes.CDLL(str(path)).velm_signatures
    except AttributeError:
        return f"{path.name} was built from older sources: {again}"
    noted.restype = ctypes.c_char_p
    compiled = dict(line.rstrip(")").split("(") for line in noted().decode().splitlines())
    for schema in schemas:
        name, _, rest = schema.partition("(")
        declared = _types(rest.rpartition(") -> ")[0])
        if compiled.get(name, declared) != declared:
            return (
                f"{path.name} was built from other sources: its {name} takes ({compiled[name]}), where this package "
                f"gives ({declared}); {again}"
            )
    return None


def _types(arguments: str) -> str:
    """``"Tensor, Tensor?"`` of ``"Tensor x, Tensor(a!)? out"``: what a kernel in C++ knows of them."""
    return ", ".join(re.sub(r"\(\w!\)", "", parameter.kind) for parameter in parameters(arguments))


def load(isa: str) -> str | None:
    """Opens the library for ``isa`` once; returns what went wrong, or None."""
    if isa not in _loaded:
        define_all(f"velm_cpu_{isa}", _schemas)
        _loaded[isa] = open_library(library_path(isa), _schemas) or ""
    return _loaded[isa] or None


def faults() -> list[tuple[str, str]]:
    """(backend, reason) of every library that was built for this processor and does not open."""
    built = (isa for isa in INSTRUCTION_SETS if library_path(isa).exists() and processor_supports(isa))
    return [(f"cpu ({isa})", reason) for isa in built if (reason := load(isa)) is not None]


def usable() -> list[str]:
    """The instruction sets whose library is built and runs here, best last (test-only ones not among them)."""
    return [isa for isa in INSTRUCTION_SETS if why_not(isa) is None]


def in_use() -> str | None:
    """The instruction set whose library serves the operators, or None if no library can be used."""
    global _default
    asked = _asked_for.get()
    if asked is not None:
        return asked
    # Kept here and not by functools.cache, which torch.compile would look behind.
    if _default is None:
        _default = _by_default()
    return _default


kinds_depend_on(in_use)


def _by_default() -> str | None:
    wanted = os.environ.get("VELM_CPU_ISA")
    if not wanted:
        return next((isa for isa in reversed(INSTRUCTION_SETS) if why_not(isa) is None), None)
    reason = why_not(wanted)
    if reason:
        raise RuntimeError(f"VELM_CPU_ISA={wanted}: {reason}")
    return wanted


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """The CPU operators called inside run on the library for ``isa`` (forward and backward alike). Other threads and
    asyncio tasks choose for themselves."""
    reason = why_not(isa)
    if reason:
        raise RuntimeError(f"use_isa: {reason}")
    with _asked_for.use(isa):
        yield


def op(name: str) -> Callable[..., Any]:
    """The operator ``name`` of the library in use."""
    return _operator(in_use(), name)


@functools.cache
def _operator(isa: str | None, name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, f"velm_cpu_{_home(isa, name)}"), name).default


def _home(isa: str | None, operator: str) -> str | None:
    """The set whose library holds ``operator`` for ``isa``."""
    lacks = isa in TEST_ONLY and not _is_registered(isa, operator)
    return "avx512" if lacks and why_not("avx512") is None else isa


def _is_registered(isa: str | None, operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"velm_cpu_{isa}::{operator}", "CPU")


def unavailable() -> list[str]:
    """Why no CPU library can be used here; empty if one can."""
    if in_use() is not None:
        return []
    note = library_directory() / "not_built.txt"
    if note.exists():
        return [note.read_text().strip()]
    return ["; ".join(f"{isa}: {why_not(isa)}" for isa in reversed(INSTRUCTION_SETS))]


def common_reasons(arguments: Arguments) -> list[str]:
    """Why no CPU kernel could take ``arguments``: library, devices, dtypes."""
    reasons = unavailable()
    for name, tensor in tensors_of(arguments):
        if not tensor.is_cpu:
            reasons.append(f"{name} is on {tensor.device}")
        if tensor.dtype not in DTYPES and tensor.is_floating_point():
            reasons.append(f"{name} is {tensor.dtype}, not float32, bfloat16 or float16")
    return reasons


def has(operator: str) -> bool:
    """Whether the library in use implements ``operator``."""
    return _implements(in_use(), operator)


@functools.cache
def _implements(isa: str | None, operator: str) -> bool:
    return _is_registered(_home(isa, operator), operator)


def reasons(operator: str, arguments: Arguments) -> list[str]:
    """Why the kernel cannot take ``arguments``: library, devices, dtypes."""
    found = common_reasons(arguments)
    return found if found or has(operator) else [f"the library for {in_use()} has no {operator}"]
