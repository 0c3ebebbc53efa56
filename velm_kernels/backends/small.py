"""Small calls on the CPU: torch's own form has finished before a call of an operator has begun.

Checks, the choice of a backend and, under autograd, a node of the graph take some ten microseconds whatever the sizes.
A public function whose meaning is a few operators of torch asks :func:`takes_torch` first and computes by those; such a
call is differentiable in every way that torch is. It rounds as often as a user's own code in torch does, no more; NaN
and infinity, empty rows and what is masked are as everywhere. Only where nobody asked for a backend, compiles, or
counts operators. What is unusual about the arguments, and every error, is left to the operator: a form returns None and
raises nothing. ``explain`` says so.

What is left over a user's own code is the looking at arguments, two to four microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from velm_kernels import backends, checks, processors
from velm_kernels.backends import triton

# Tests of operators at small sizes switch the rule off.
enabled = True

PLAIN = (torch.Tensor, torch.nn.Parameter)
_INTEGERS = frozenset(checks.INTEGER_DTYPES)
# A node of autograd's graph, and gradients one by one, cost an operator's call several times as much.
WITH_GRADIENT = 4


# What a form that takes 16 bits too passes as dtype.
ANY = frozenset((torch.float32, torch.bfloat16, torch.float16))


def takes_torch(
    limit: int,
    *tensors: Any,
    dtype: torch.dtype | frozenset[torch.dtype] = torch.float32,
    recorded: int | None = None,
) -> bool:
    """Whether a call with ``tensors`` is small: all of them ``dtype`` (or one of them, the same) on the CPU, none with
    more than ``limit`` elements; where a gradient is recorded ``recorded``, by default four times as many."""
    if not enabled or torch.compiler.is_compiling():
        return False
    if dtype.__class__ is frozenset:
        given = getattr(tensors[0], "dtype", None)
        if given not in dtype:
            return False
        dtype = given
    if recorded is None:
        recorded = WITH_GRADIENT * limit
    if limit >= processors.NEVER:
        for tensor in tensors:
            if tensor.__class__ not in PLAIN or tensor.dtype is not dtype or not tensor.is_cpu:
                return False
        return _nobody_notices()
    most, records = 0, False
    for tensor in tensors:
        if tensor.__class__ not in PLAIN or tensor.dtype is not dtype or not tensor.is_cpu:
            return False
        if (elements := tensor.numel()) > most:
            if elements > recorded and elements > limit:
                return False
            most = elements
        records = records or tensor.requires_grad
    return most <= (recorded if records and torch.is_grad_enabled() else limit) and _nobody_notices()


def _nobody_notices(
    # Looking names up in modules takes half of its time.
    nobody_asked: Callable[[], bool] = backends.nobody_asked,
    modes: Callable[[], int] = torch._C._len_torch_dispatch_stack,
    autocast: Callable[[str], bool] = torch.is_autocast_enabled,
) -> bool:
    # Whoever switched Triton's interpreter on wants to see kernels run.
    return nobody_asked() and not (modes() or autocast("cpu") or triton.is_interpreted())


def values_of(tensor: Any, limit: int = 64) -> list[int] | None:
    """The values of a tensor of at most ``limit`` integers on the CPU, where nobody traces or transforms what is
    computed now; else None."""
    if tensor.__class__ not in PLAIN or tensor.dtype not in _INTEGERS or not tensor.is_cpu or tensor.numel() > limit:
        return None
    return tensor.reshape(-1).tolist() if may_read() else None


def value_of(tensor: torch.Tensor) -> float:
    """The value of a tensor of one element on the CPU; NaN where there are more, or somebody traces or transforms what
    is computed now."""
    return float(tensor.item()) if tensor.numel() == 1 and may_read() else math.nan


def may_read() -> bool:
    """Whether nobody traces or transforms what is computed now, so that values may decide."""
    return torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_tracing_state() is None


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32, itself where it is."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()
