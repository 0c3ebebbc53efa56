"""Where the implementations of a declared operator lie, and their registration."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from velm_kernels import backends
from velm_kernels.backends import Arguments, cpu, cuda, triton

Reasons = Callable[[Arguments], list[str]]


def kernels(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Callable[..., None]]]]:
    """(backend, what gives its kernel), for every backend with one."""
    if given["triton"]:
        yield "triton", lambda: triton.imported(f"velm_kernels.{given['triton']}", name)
    if given["cpu"] is True:
        yield "cpu", lambda: cpu.op(name)
    elif given["cpu"]:
        yield "cpu", lambda: functools.partial(_imported(f"velm_kernels.{given['cpu']}", name), cpu.op)
    if given["cuda"]:
        for backend in cuda.NAMESPACES:
            if given["cuda"] is True:
                yield backend, lambda backend=backend: cuda.op(backend, name)  # type: ignore[misc]
            else:
                yield backend, functools.partial(_before_cuda, backend, f"velm_kernels.{given['cuda']}", name)
    if given["torch"]:
        by_torch = functools.partial(_imported, f"velm_kernels.{given['torch']}", name)
        for backend in ("torch", "triton", "cpu", *cuda.NAMESPACES) if given["torch_alone"] else ("torch",):
            yield backend, by_torch


def givers(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Callable[..., Any]]]]:
    """(backend, what gives its function), for every backend that gives results in place of filling them."""
    if given["torch_gives"]:
        yield "torch", functools.partial(_imported, f"velm_kernels.{given['torch_gives']}", name)


def compositions(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Callable[..., Any]]]]:
    """(backend, what gives the function made of other operators that are called with it)."""
    if given["composed"]:
        module = f"velm_kernels.{given['composed']}"
        for backend in backends.ORDER + backends.ON_REQUEST:
            if backend != "reference":
                yield backend, lambda b=backend: functools.partial(_imported(module, name), b)  # type: ignore[misc]


# Asked for at every call.
_module = functools.cache(importlib.import_module)


def _imported(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(_module(module), name)
    return found


def _before_cuda(backend: str, module: str, name: str) -> Callable[..., None]:
    """The function ``name`` of ``module``, which calls kernels of ``backend``."""
    return functools.partial(_imported(module, name), functools.partial(cuda.op, backend))


def register(name: str, backend: str, call: Callable[..., Any], more: Reasons | None, given: Mapping[str, Any]) -> None:
    of_all: Reasons
    if backend == "torch":
        of_all = _unusual_dtypes
    elif backend == "triton":
        of_all = triton.common_reasons
    elif backend == "cpu" and given["cpu"] is not True:
        of_all = cpu.common_reasons
    elif backend == "cpu":
        of_all = lambda a: cpu.reasons(name, a)  # noqa: E731
    elif given["cuda"] is not True:
        of_all = functools.partial(cuda.common_reasons, backend)
    else:
        of_all = lambda a: cuda.reasons(backend, name, a)  # noqa: E731
    backends.register(name, backend, call, more, of_all)


def _unusual_dtypes(arguments: Arguments) -> list[str]:
    """Why torch's operators do not serve: what is computed in float64 is the reference's."""
    return [
        f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        for name, tensor in backends.tensors_of(arguments)
        if tensor.is_floating_point() and tensor.dtype not in cpu.DTYPES
    ]
