"""What becomes of a backend that says it can serve a call and then does not start.

A kernel that does not compile, a compiler that is missing, a GPU or driver that refuses the code: these show at the
first call. They are reasons like those that a backend gives beforehand, remembered for calls of the same kind: the next
backend serves this very call and later ones, and ``explain``, ``velm info`` and ``velm check`` tell.

Wrong arguments, memory that does not suffice, and errors of kernels that ran before are none of this, and are raised.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("velm_kernels")


class NoBackendError(RuntimeError):
    """No backend, or not the one asked for, can serve the arguments; the message lists every reason."""


class StartError(RuntimeError):
    """A backend does not start. ``everywhere``: with no kernel on this device, else with this kind of call."""

    def __init__(self, reason: str, everywhere: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.everywhere = everywhere


# Names by the CUDA runtime, and what the driver says, of errors after which the context is lost (of a kernel that ran
# before, so that a fall back would hide it and fail as well), of memory, and of captures of graphs.
_RAISED = re.compile(
    r"IllegalAddress|illegal memory access|cudaErrorAssert|device-side assert|LaunchFailure|unspecified launch failure"
    r"|LaunchTimeout|launch timed out|MisalignedAddress|misaligned address|IllegalInstruction|illegal instruction"
    r"|InvalidAddressSpace|address space|InvalidPc|invalid program counter|HardwareStackError|hardware stack"
    r"|ECCUncorrectable|uncorrectable|ContextIsDestroyed|MemoryAllocation|out of memory|[Cc]aptur"
)
# What no kernel of a backend gets past on this device.
_EVERYWHERE = re.compile(
    r"NoKernelImageForDevice|no kernel image|InsufficientDriver|driver version is insufficient|UnsupportedPtxVersion"
    r"|unsupported toolchain|JitCompilerNotFound|JIT compiler library not found|SystemDriverMismatch"
    r"|CompatNotSupportedOnDevice|SharedObjectInitFailed|C compiler|active drivers|libcuda|cudaErrorInitializationError"
)

_Key = tuple[Any, ...]
_remembered: dict[_Key, tuple[str, BaseException]] = {}


def some() -> bool:
    """Whether anything did not start so far."""
    return bool(_remembered)


def of_launch(error: Exception, what: str) -> StartError | None:
    """What an error that came out of compiling or launching ``what`` means: None if it is to be raised as it is."""
    if isinstance(error, (StartError, torch.OutOfMemoryError)):
        return None
    text = str(error)
    of_device = bool(_EVERYWHERE.search(text))
    # What torch raises for errors of the device is mostly of a kernel that ran before.
    if not of_device and (_RAISED.search(text) or isinstance(error, getattr(torch, "AcceleratorError", ()))):
        return None
    everywhere = of_device or isinstance(error, (ImportError, OSError, subprocess.SubprocessError))
    return StartError(f"{what} does not start: {_told(error)}", everywhere)


def of_call(error: Exception) -> StartError | None:
    """What an error that came out of an implementation means: None if it is to be raised as it is."""
    if isinstance(error, StartError):
        return error
    if isinstance(error, NoBackendError):
        # Of an operator called inside, which was to run on the same backend.
        failure = StartError(str(error))
        failure.__cause__ = error.__cause__
        return failure
    of_triton = type(error).__module__.split(".")[0] == "triton"
    of_device = isinstance(error, RuntimeError) and _EVERYWHERE.search(str(error))
    return of_launch(error, "a kernel") if of_triton or of_device else None


def remember(operator: str, backend: str, arguments: dict[str, Any], failure: StartError) -> BaseException:
    """-> what was behind the failure, without its traceback: that would keep the tensors of the call alive."""
    cause = failure.__cause__ or failure
    _log.debug("%s on %s: %s", operator, backend, failure.reason, exc_info=cause)
    for error in (failure, *_chain(cause)):
        error.__traceback__ = None
    key = (backend, _device(arguments)) if failure.everywhere else (backend, operator, _kind(arguments))
    _remembered[key] = failure.reason, cause
    return cause


def against(operator: str, backend: str, arguments: dict[str, Any]) -> list[str]:
    """Why ``backend`` did not start with a call like this one; empty if it was not tried or did."""
    found = _found(operator, backend, arguments)
    return [] if found is None else [found[0]]


def cause_of(operator: str, backend: str, arguments: dict[str, Any]) -> BaseException | None:
    found = _found(operator, backend, arguments)
    return None if found is None else found[1]


def listed() -> list[tuple[str, str]]:
    """(backend, reason) of everything that did not start so far."""
    return list(dict.fromkeys((key[0], reason) for key, (reason, _) in _remembered.items()))


def forget() -> None:
    """Lets everything be tried again, for tests."""
    _remembered.clear()


def _found(operator: str, backend: str, arguments: dict[str, Any]) -> tuple[str, BaseException] | None:
    if not any(key[0] == backend for key in _remembered):
        return None
    found = _remembered.get((backend, _device(arguments)))
    return found or _remembered.get((backend, operator, _kind(arguments)))


def _device(arguments: dict[str, Any]) -> str:
    return next((str(tensor.device) for tensor in _tensors(arguments.values())), "")


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _kind(arguments: dict[str, Any]) -> _Key:
    """What calls have in common that compile the same kernels: which arguments are there, dtypes, switches, sizes of
    last dimensions up to the next power of two. What one call of a kind does not start, others are not tried with."""
    return tuple(_kind_of(value) for value in arguments.values())


def _kind_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        last = int(value.shape[-1] - 1).bit_length() if value.dim() else 0
        return str(value.device), value.dtype, value.dim(), last
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind_of, value))
    if isinstance(value, (bool, str)) or value is None:
        return value
    # Masks of bits are small; what is larger counts something.
    return min(int(value), 64) if isinstance(value, int) else value != 0


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found


def _told(error: BaseException) -> str:
    """The one line of an error that says what is wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else str(error.cmd[0])
        return (
            f"{Path(command.split()[0]).name} ends with status {error.returncode} "
            "(Triton builds its launcher with it: it needs a C compiler and the headers of Python)"
        )
    # Triton says first where in the source it stands, a caller's line before that of what it calls.
    inner = error
    while inner.__cause__ is not None and type(inner.__cause__) is type(inner):
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    line = lines[-1 if type(inner).__module__.startswith("triton.compiler") else 0] if lines else ""
    name = type(inner).__name__
    return f"{name}: {line[:300]}" if line and not line.startswith(name) else line or name
