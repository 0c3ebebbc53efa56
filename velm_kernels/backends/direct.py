"""Calls of operators past torch's dispatcher, where nothing could notice.

``torch.ops.velm.<name>`` goes through Python twice on its way to a kernel, for autograd and for the choice of a backend
and that takes longer than many a kernel does. :func:`call` does what it does; where nobody listens (no gradient, no
transform, no mode, no compiler, no profiler) it chooses the backend at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from velm_kernels import backends
from velm_kernels.backends import Arguments

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_OTHERS = frozenset((bool, int, float, str, type(None)))

_checks: dict[str, Callable[[Arguments], None]] = {}


def declare_check(name: str, check: Callable[[Arguments], None]) -> None:
    """Lets ``check`` see the arguments of ``velm::name`` before it runs."""
    _checks[name] = check


def run(name: str, arguments: Arguments, backend: str) -> Any:
    """``velm::name`` by the backend that serves these arguments, below autograd."""
    check = _checks.get(name)
    if check is not None:
        check(arguments)
    # Of what is made inside, autograd would take a transposed result for a view of a tensor that it has not seen, and
    # the user could not change it in place.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return backends.run(name, arguments, tuple(arguments.values()), backend)


def call(name: str, arguments: Arguments) -> Any:
    """``torch.ops.velm.<name>(*arguments.values(), forced())``: ``arguments`` are in the order of the schema."""
    if _unnoticed() and _needs_nothing(arguments.values()):
        return run(name, arguments, backends.forced())
    return getattr(torch.ops.velm, name)(*arguments.values(), backends.forced())


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


def _needs_nothing(values: Iterable[Any]) -> bool:
    """Whether ``values`` are ordinary tensors on a device that none of which needs a gradient now, and scalars."""
    recording = torch.is_grad_enabled()
    for value in values:
        kind = value.__class__
        if kind in _OTHERS:
            continue
        if kind in _PLAIN:
            if (recording and value.requires_grad) or not (value.is_cpu or value.is_cuda):
                return False
        elif kind not in (list, tuple) or not _needs_nothing(value):
            return False
    return True
