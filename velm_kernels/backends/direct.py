"""Calls of operators past torch's dispatcher, where nothing could notice.

``torch.ops.velm.<name>`` goes through Python twice on its way to a kernel, for autograd and for the choice of a backend
and that takes longer than many a kernel does. :func:`call` and :data:`ops` do what it does; where nobody listens (no
transform, no mode, no compiler, no trace, no profiler) they ask for gradients and choose the backend at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from velm_kernels import backends
from velm_kernels.backends import Arguments

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_OTHERS = frozenset((bool, int, float, str, torch.dtype, type(None)))

# By operator: the names of its arguments, what sees them before it runs, and how it is called to record a gradient.
_names: dict[str, Sequence[str]] = {}
_checks: dict[str, Callable[[Arguments], None]] = {}
_recording: dict[str, Callable[..., Any]] = {}


def declare(name: str, arguments: Sequence[str], check: Callable[[Arguments], None] | None) -> None:
    _names[name] = arguments
    if check is not None:
        _checks[name] = check


def declare_autograd(name: str, record: Callable[..., Any]) -> None:
    """Makes ``record(arguments, backend, kind)`` the call of ``velm::name`` that records a gradient."""
    _recording[name] = record


def run(name: str, arguments: Arguments, backend: str, kind: list[Any] | None = None) -> Any:
    """``velm::name`` by the backend that serves these arguments, below autograd. ``kind`` is ``backends.kind_of`` them,
    where that is known."""
    check = _checks.get(name)
    if check is not None:
        check(arguments)
    # Of what is made inside, autograd would take a transposed result for a view of a tensor that it has not seen, and
    # the user could not change it in place.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return backends.run(name, arguments, tuple(arguments.values()), backend, kind)


def run_values(name: str, values: Sequence[Any], backend: str) -> Any:
    """:func:`run` for arguments in the order of the schema."""
    return run(name, dict(zip(_names[name], values, strict=True)), backend)


def call(name: str, arguments: Arguments) -> Any:
    """``torch.ops.velm.<name>(*arguments.values(), forced())``: ``arguments`` are in the order of the schema."""
    backend = backends.forced()
    if _unnoticed():
        kind: list[Any] = []
        needed = _gradients_of(arguments.values(), kind)
        if needed is False:
            return run(name, arguments, backend, kind)
        if needed and name in _recording:
            return _recording[name](arguments, backend, kind)
    return getattr(torch.ops.velm, name)(*arguments.values(), backend)


class _Operators:
    """``ops.<name>(*values, backend)`` for ``torch.ops.velm.<name>(*values, backend)``."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operator(*args: Any) -> Any:
            kind: list[Any] = []
            if _unnoticed() and _gradients_of(args, kind) is False:
                *values, backend = args
                return run(name, dict(zip(_names[name], values, strict=True)), backend, kind)
            return getattr(torch.ops.velm, name)(*args)

        setattr(self, name, operator)
        return operator


ops = _Operators()


def _unnoticed() -> bool:
    """Whether no compiler, mode, transform, trace or profiler sees the operators that are called now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _gradients_of(values: Iterable[Any], kind: list[Any]) -> bool | None:
    """Whether a gradient is to be recorded of one of ``values``; None if they are not all scalars and ordinary tensors
    on a CPU or GPU. ``kind`` is extended to ``backends.kind_of(values)``."""
    recording = torch.is_grad_enabled()
    needed = False
    for value in values:
        of = value.__class__
        if of in _OTHERS:
            continue
        if of in _PLAIN:
            kind.append(value.dtype)
            if not value.is_cpu:
                if not value.is_cuda:
                    return None
                kind.append(value.device)
            needed = needed or (recording and value.requires_grad)
        elif of in (list, tuple):
            found = _gradients_of(value, kind)
            if found is None:
                return None
            needed = needed or found
        else:
            return None
    return needed
