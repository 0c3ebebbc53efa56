"""What a replacement may do itself instead of calling it: submodules that nobody listens to, tensors that are no more
than tensors, values that may be read.

Every replaced forward asks here, at each call, because all of it can change after `patch`: somebody registers a hook,
quantises weights, distributes them, puts another module in a dropout's place, moves the model to the meta device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from velm_kernels.checks import is_plain
from velm_kernels.listeners import has_listeners as has_listeners
from velm_kernels.listeners import is_bare as is_bare

_CALL = nn.Module.__call__
# Names of submodules, each with the classes that are known in its place.
Absorbs = tuple[tuple[str, tuple[type[nn.Module], ...]], ...]
DROPOUTS = (nn.Dropout, nn.Identity)


def are_plain(*values: Any) -> bool:
    """Say so of every one of `values` that is not None."""
    return all(x is None or is_plain(x) for x in values)


def under_autocast(x: Tensor) -> bool:
    """Say whether autocast is on for the device of `x`; there is none for some, such as meta."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def may_read(x: Tensor) -> bool:
    """Say whether values of `x` can decide what is computed: they are at hand, and every later run sees the same code.

    On a device it would mean waiting. What is traced or compiled is run again with other values, fake and meta tensors
    have none, and under `torch.func.vmap` there is one for each sample.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return is_plain(x) and type(x) in (Tensor, nn.Parameter) and not _transformed()


def _transformed() -> bool:
    """A transform of `torch.func`, or a mode such as `FakeTensorMode` or that of `make_fx`, is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0


def why_called(name: str, module: nn.Module) -> str:
    """Say why the submodule `module`, named `name`, has to be called as what it is."""
    if has_listeners(module):
        return f"somebody listens to {name} (a hook, or a forward of its own)"
    return f"{name} is a {type(module).__name__}"


def why_aside(module: nn.Module, absorbs: Absorbs, args: Any, kwargs: Any) -> str | None:
    """Return why this call of a replaced module belongs to its original, or None.

    Args:
        absorbs: the submodules that the replacement does not call although the original does.
        args, kwargs: of the call.
    """
    children = module._modules
    for name, classes in absorbs:
        child = children.get(name)
        if child is not None and not is_bare(child, *classes):
            return why_called(name, child)
    if "parametrizations" in children:
        return "its parameters are parametrised"
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter and not is_plain(parameter):
            return f"its parameters are {type(parameter).__name__}s"
    for value in (*args, *kwargs.values()):
        if value.__class__ is Tensor:
            if value.is_meta:
                return "meta tensors"
        elif value is not None:
            reason = _why_not_value(value)
            if reason is not None:
                return reason
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an export to ONNX" if torch.onnx.is_in_onnx_export() else None
    if torch.compiler.is_compiling():
        return None
    if nn.Module.__call__ is not _CALL:
        return "calls of modules are being recorded"
    return "a transform of torch.func" if torch._C._functorch.peek_interpreter_stack() is not None else None


def _why_not_value(value: Any) -> str | None:
    if isinstance(value, Tensor):
        if not is_plain(value):
            return f"an input is a {type(value).__name__}"
        return "meta tensors" if value.is_meta else None
    if isinstance(value, (tuple, list)):
        return next((reason for reason in map(_why_not_value, value) if reason is not None), None)
    return "symbolic tracing" if isinstance(value, torch.fx.Proxy) else None


Result = TypeVar("Result")


class _Kept(NamedTuple):
    of: weakref.ref[Tensor]
    copy: Tensor
    asked: tuple[Any, ...]
    result: Any


class _Memory(threading.local):
    def __init__(self) -> None:
        self.entries: list[_Kept] = []


_memory = _Memory()
# A forward goes through its layers with one or two masks at a time.
_ENTRIES = 4


def remembered(function: Callable[..., Result], x: Tensor, *args: Any) -> Result:
    """Return `function(x, *args)`, from memory where `x` still holds what it held then.

    Whether it does is seen by its values, compared with a copy: a change through numpy, `.data` or another framework's
    view leaves no other trace. Only tensors whose values may be read are remembered, and only while they live. Nothing
    is written on them.
    """
    if not may_read(x) or x.requires_grad:
        return function(x, *args)
    asked = (function, torch.is_inference_mode_enabled(), x.shape, x.dtype, *args)
    seen = _once(x)
    entries = _memory.entries
    for place, kept in enumerate(entries):
        if kept.of() is x and kept.asked == asked and kept.copy.shape == seen.shape and torch.equal(kept.copy, seen):
            entries.append(entries.pop(place))
            return kept.result
    result = function(x, *args)
    entries[:] = [kept for kept in entries if kept.of() is not None and (kept.of() is not x or kept.asked != asked)]
    entries.append(_Kept(weakref.ref(x, _forget(entries)), seen.clone(), asked, result))
    del entries[:-_ENTRIES]
    return result


def _once(x: Tensor) -> Tensor:
    """`x` without what `expand` repeated."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _forget(entries: list[_Kept]) -> Callable[[Any], None]:
    def forget(reference: Any) -> None:
        entries[:] = [kept for kept in entries if kept.of is not reference]

    return forget
