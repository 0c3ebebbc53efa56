"""Calls of operators past torch's dispatcher, where nothing could notice.

``torch.ops.velm.<name>`` goes through Python twice on its way to a kernel, for autograd and for the choice of a backend
and that takes longer than many a kernel does. :func:`call` and :data:`ops` do what it does; where nobody listens (no
transform, no mode, no compiler, no trace, no profiler) they ask for gradients and choose the backend at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from velm_kernels import backends
from velm_kernels.backends import Arguments

_OTHERS = frozenset((bool, int, float, str, torch.dtype, type(None)))
# Looking them up in torch's modules takes as long as calling them.
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_profiles = torch._C._autograd._profiler_enabled


class _Calls(threading.local):
    """Whether the operator that runs now was called by a public function, which gives nobody all of its results, though
    by torch's dispatcher: for a profiler."""

    is_public = False


calls = _Calls()
# By operator: what sees its arguments before it runs, and how it is called to record a gradient.
_checks: dict[str, Callable[[Arguments], None]] = {}
_recording: dict[str, Callable[..., Any]] = {}


def declare(name: str, arguments: Sequence[str], check: Callable[[Arguments], None] | None) -> None:
    backends.name_arguments(name, arguments)
    if check is not None:
        _checks[name] = check


def declare_autograd(name: str, record: Callable[..., Any]) -> None:
    """Makes ``record(values, backend, kind, arguments)`` the call of ``velm::name`` that records a gradient."""
    _recording[name] = record


def run(
    name: str,
    values: Sequence[Any],
    backend: str,
    kind: list[Any] | None = None,
    arguments: Arguments | None = None,
) -> Any:
    """``velm::name`` by the backend that serves these arguments, below autograd, with None for results that were not
    asked for. ``kind`` is ``backends.kind_of`` the values and ``arguments`` are these by name, where that is known."""
    check = _checks.get(name)
    if check is not None:
        arguments = arguments or backends.by_name(name, values)
        check(arguments)
    # Of what is made inside, autograd would take a transposed result for a view of a tensor that it has not seen, and
    # the user could not change it in place.
    with _below_autograd():
        return backends.run(name, values, backend, kind, arguments)


def call(name: str, arguments: Arguments) -> Any:
    """``torch.ops.velm.<name>(*arguments.values(), forced())``: ``arguments`` are in the order of the schema. What is
    not asked for among the results may be None."""
    values = tuple(arguments.values())
    if _unnoticed():
        kind: list[Any] = []
        needed = _gradients_of(values, torch.is_grad_enabled(), kind)
        if needed is False:
            return run(name, values, backends.forced(), kind, arguments)
        if needed and name in _recording:
            return _recording[name](values, backends.forced(), kind, arguments)
    elif _untraced() and _profiles():
        calls.is_public = True
        try:
            return getattr(torch.ops.velm, name)(*values, backends.forced())
        finally:
            calls.is_public = False
    return getattr(torch.ops.velm, name)(*values, backends.forced())


class _Operators:
    """``ops.<name>(*values, backend)`` for ``torch.ops.velm.<name>(*values, backend)``; what is not asked for among the
    results may be None."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operator(*args: Any) -> Any:
            kind: list[Any] = []
            if _unnoticed() and _gradients_of(args, torch.is_grad_enabled(), kind) is False:
                return run(name, args[:-1], args[-1], kind)
            return getattr(torch.ops.velm, name)(*args)

        setattr(self, name, operator)
        return operator


ops = _Operators()


def _unnoticed() -> bool:
    """Whether no compiler, mode, transform, trace or profiler sees the operators that are called now."""
    return _untraced() and not _profiles()


def _untraced() -> bool:
    """The same of all but a profiler."""
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _trace() is not None
    )


def _gradients_of(values: Iterable[Any], recording: bool, kind: list[Any]) -> bool | None:
    """Whether a gradient is to be recorded of one of ``values``, where gradients are recorded; None if they are not all
    scalars and ordinary tensors on a CPU or GPU. ``kind`` is extended to ``backends.kind_of(values)``."""
    needed = False
    for value in values:
        if value is None:
            continue
        of = value.__class__
        if of is Tensor or of is Parameter:
            kind.append(value.dtype)
            if not value.is_cpu:
                if not value.is_cuda:
                    return None
                kind.append(value.device)
            if recording and value.requires_grad:
                needed = True
        elif of in _OTHERS:
            continue
        elif of is list or of is tuple:
            found = _gradients_of(value, recording, kind)
            if found is None:
                return None
            needed = needed or found
        else:
            return None
    return needed
