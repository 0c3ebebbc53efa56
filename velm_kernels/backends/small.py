"""Small calls on the CPU: torch's own form has finished before a call of an operator has begun.

Checks, the choice of a backend and, under autograd, a node of the graph take some ten microseconds whatever the sizes.
A public function whose meaning is one or two operators of torch asks :func:`takes_torch` first and computes by those;
such a call is differentiable in every way that torch is. Only float32, whose plain form rounds no more often than the
kernels do, and only where nobody asked for a backend, compiles, or counts operators. ``explain`` says so.
"""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels import backends
from velm_kernels.backends import triton

# Tests of operators at small sizes switch the rule off.
enabled = True

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# A node of autograd's graph, and gradients one by one, cost an operator's call several times as much.
WITH_GRADIENT = 4


def takes_torch(limit: int, *tensors: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a call with ``tensors`` is small: all of them ``dtype`` on the CPU, none with more than ``limit``
    elements, four times as many where a gradient is recorded."""
    if not enabled or torch.compiler.is_compiling():
        return False
    recording = torch.is_grad_enabled()
    if recording:
        recording = False
        for tensor in tensors:
            if tensor.__class__ in _PLAIN and tensor.requires_grad:
                recording = True
                limit *= WITH_GRADIENT
                break
    for tensor in tensors:
        if tensor.__class__ not in _PLAIN or tensor.dtype is not dtype or not tensor.is_cpu or tensor.numel() > limit:
            return False
    return not (
        backends.forced()
        # Whoever switched it on wants to see kernels run.
        or triton.is_interpreted()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )
