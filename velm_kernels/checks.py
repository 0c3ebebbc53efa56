"""Checks of arguments: each raises an error that names the argument, what was expected and what was given."""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Values that are compared in Python.
FEW_VALUES = 64
# What a message shows of a string or a number.
LONGEST_TEXT = 40


def shown(value: Any) -> str:
    """A string, number or bool as it is written, cut short."""
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "..."


def describe(value: Any) -> str:
    """What was given, in a few words: never what a list or an array holds."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{kind} of {len(value)}"
    if isinstance(value, (str, bool, int, float, complex)):
        return f"{kind} {shown(value)}"
    return "None" if value is None else kind


# What torch's own compilers and tracers put in a tensor's place; operators know what to do with them.
_STAND_INS = frozenset(
    {
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch._subclasses.functional_tensor", "FunctionalTensor"),
    }
)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a Tensor or Parameter and no subclass, such as a quantised or a distributed one."""
    cls = value.__class__
    return cls is torch.Tensor or cls is torch.nn.Parameter or (cls.__module__, cls.__qualname__) in _STAND_INS


def ordinary(*values: Any, or_none: Any = None) -> bool:
    """Whether all ``values``, and ``or_none`` if it is not None, are tensors of no subclass on the CPU, of one of the
    floating dtypes, without autocast: then nothing is wrong with their types, dtypes and devices.

    Asked once for several arguments it takes a part of the time that the checks of each take."""
    if or_none is not None:
        values = (*values, or_none)
    first = values[0]
    if first.__class__ not in _PLAIN or first.dtype not in FLOAT_DTYPES:
        return False
    dtype = first.dtype
    for value in values:
        if value.__class__ not in _PLAIN or value.dtype != dtype or not value.is_cpu:
            return False
    return not torch.is_autocast_enabled("cpu")


def is_distributed(value: Any) -> bool:
    """Whether ``value`` is a DTensor."""
    cls = value.__class__
    return cls.__qualname__ == "DTensor" and cls.__module__.startswith("torch.distributed.")


def is_wrapped(value: Any) -> bool:
    """Whether ``value`` is a tensor that holds its numbers in a way of its own, as quantised weights do: only what its
    class knows can be computed with it."""
    return isinstance(value, torch.Tensor) and not (is_plain(value) or is_distributed(value)) and _dispatches(value)


def _dispatches(value: torch.Tensor) -> bool:
    return value.__class__.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def tensor(name: str, value: Any, *, dims: int | None = None, layout: str = "") -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, given {describe(value)}")
    if value.__class__ is not torch.Tensor and value.__class__ is not torch.nn.Parameter:
        _admit(name, value)
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected {layout or f'{dims} dimensions'}, given {tuple(value.shape)}")
    return value


def _admit(name: str, value: torch.Tensor) -> None:
    """Prepares for a tensor that is of a subclass, or refuses it."""
    if is_distributed(value):
        from velm_kernels.backends import sharding

        sharding.register()
    elif value.is_nested:
        raise TypeError(
            f"{name}: expected a tensor with one length for every row, given a {type(value).__name__}; sequences of "
            "different lengths go packed one after the other, as in cross_attention_varlen"
        )


def tensors(name: str, value: Any, low: int, high: int | None = None) -> list[torch.Tensor]:
    """The tensors of a list or another sequence, ``low`` to ``high`` of them."""
    if isinstance(value, str) or not isinstance(value, (Sequence, torch.nn.ParameterList)):
        raise TypeError(f"{name}: expected a sequence of tensors, given {describe(value)}")
    if len(value) < low or (high is not None and len(value) > high):
        wanted = f"{low} or more" if high is None else f"{low}" if high == low else f"{low} to {high}"
        raise ValueError(f"{name}: expected {wanted} tensors, given {describe(value)}")
    return [tensor(f"{name}[{i}]", item) for i, item in enumerate(value)]


def features(name: str, value: Any, layout: str, size: int, like: Any = None, dims: int | None = None) -> torch.Tensor:
    """What a module is given: floating point, ``size`` features, on the device of ``like`` if that is a tensor (what a
    quantised layer has under the name of its weight may be none)."""
    dtype_in(name, tensor(name, value, dims=dims, layout=layout), FLOAT_DTYPES)
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{name}: expected {layout} with {size} features, given {tuple(value.shape)}")
    if isinstance(like, torch.Tensor):
        same_device(name, value, "the parameters", like)
    return value


def norm_dtype(name: str, value: torch.Tensor, norm: torch.nn.Module) -> None:
    """What a layer norm is given: torch refuses another dtype than that of its weight, but for 16 bits with float32, in
    words that name neither argument."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or value.dtype == weight.dtype:
        return
    if not (
        (weight.dtype == torch.float32 and value.dtype.itemsize == 2) or torch.is_autocast_enabled(value.device.type)
    ):
        raise TypeError(f"{name}: expected dtype {weight.dtype} like the parameters, given {value.dtype}")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {other_name}, given {value.device}")


def ranges(name: str, value: Any) -> None:
    """A pair of tensors that two more checks are for."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of tensors (start, stop), given {describe(value)}")
    for i, item in enumerate(value):
        dtype_in(f"{name}[{i}]", tensor(f"{name}[{i}]", item), INTEGER_DTYPES)


def dtype_in(name: str, value: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, given {value.dtype}")


def shape(name: str, value: torch.Tensor, layout: str, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {layout} = {tuple(expected)}, given {tuple(value.shape)}")


def broadcastable(name: str, value: torch.Tensor, layout: str, target: Sequence[int]) -> torch.Tensor:
    """``value`` with leading ones up to ``len(target)`` dimensions, each of them 1 or that of ``target``."""
    if value.dim() > len(target) or any(
        size not in (1, wanted) for size, wanted in zip(reversed(value.shape), reversed(target), strict=False)
    ):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {layout} = {tuple(target)}, given {tuple(value.shape)}"
        )
    return value.reshape((1,) * (len(target) - value.dim()) + tuple(value.shape))


def shapes(values: Sequence[torch.Tensor], most: int = 8) -> str:
    """The shapes of the first few of many tensors."""
    listed = ", ".join(str(tuple(value.shape)) for value in values[:most])
    return listed + (f" and {len(values) - most} more" if len(values) > most else "")


def mask(name: str, value: Any, layout: str, target: Sequence[int], like_name: str, like: torch.Tensor) -> torch.Tensor:
    """A bool tensor on the device of ``like``, expanded to ``target``."""
    dtype_in(name, tensor(name, value), (torch.bool,))
    same_device(name, value, like_name, like)
    return broadcastable(name, value, layout, target).expand(tuple(target))


def integers(
    name: str, value: Any, layout: str, expected: Sequence[int], like_name: str, like: torch.Tensor
) -> torch.Tensor:
    """A tensor of integers of the shape ``expected`` on the device of ``like``, as contiguous int32."""
    dtype_in(name, tensor(name, value), INTEGER_DTYPES)
    shape(name, value, layout, expected)
    same_device(name, value, like_name, like)
    return as_int32(value)


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """``torch.broadcast_shapes``, which takes longer than a small product, for shapes that most often are the same."""
    first, *others = map(tuple, shapes)
    return first if all(other == first for other in others) else tuple(torch.broadcast_shapes(first, *others))


def leading(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor, *shapes: Sequence[int]) -> None:
    """``shapes``, the leading dimensions of ``value`` and ``like`` as they stand beside each other, broadcast."""
    try:
        broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions that broadcast with those of {like_name} {tuple(like.shape)}, "
            f"given {tuple(value.shape)}"
        ) from None


def number(name: str, value: Any, low: float, high: float, *, described: str) -> float:
    if value.__class__ is float and low <= value < high:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, given {describe(value)}")
    if not low <= value < high:  # type: ignore[operator]
        raise ValueError(f"{name}: expected {described}, given {shown(value)}")
    return float(value)


def probability(name: str, value: Any) -> float:
    return number(name, value, 0.0, 1.0, described="a probability in [0, 1)")


def integer(name: str, value: Any, low: int, high: int | None = None, *, described: str = "") -> int:
    """An integer from ``low`` to ``high``, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: expected an integer, given {describe(value)}")
    if value < low or (high is not None and value > high):  # type: ignore[operator]
        limits = f"at least {low}" if high is None or high >= 2**31 - 1 > value else f"{low} to {high}"
        raise ValueError(f"{name}: expected {described or limits}, given {shown(value)}")
    return value  # type: ignore[return-value]


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, given {describe(value)}")
    return value


def choice(name: str, value: Any, names: Sequence[str], *, or_none: bool = False) -> Any:
    """One of ``names``."""
    if value is None and or_none:
        return None
    if value.__class__ is str and value in names:
        return value
    expected = f"{name}: expected one of {', '.join(names)}{' or None' if or_none else ''}"
    if not isinstance(value, str):
        raise TypeError(f"{expected}, given {describe(value)}")
    if value not in names:
        raise ValueError(f"{expected}, given {shown(value)}")
    return value


def reads_values(value: torch.Tensor) -> bool:
    """Whether checks may read this tensor: on a GPU that would wait for it, and is done only under VELM_CHECK=1.

    Tensors without values (``meta``, fake), other subclasses, and tensors that a compiler, a tracer or a functional
    transform records are never read.
    """
    if value.device.type != "cpu" and (value.is_meta or os.environ.get("VELM_CHECK") != "1"):
        return False
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )


def values_between(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Every element in ``[low, high]``; silent where the tensor must not be read."""
    if value.numel() and reads_values(value):
        if value.numel() <= FEW_VALUES:
            # Sooner than one operator of torch.
            values = value.reshape(-1).tolist()
            smallest, largest = min(values), max(values)
        else:
            smallest, largest = (int(end) for end in value.aminmax())
        if smallest < low or largest > high:
            raise ValueError(f"{name}: expected values from {low} to {high}, given {smallest} to {largest}")


def as_int32(value: torch.Tensor) -> torch.Tensor:
    """Contiguous int32; what does not fit saturates, so that a check still sees that it is out of range."""
    if value.dtype == torch.int64:
        value = value.clamp(-(2**31), 2**31 - 1)
    return value.to(torch.int32).contiguous()


def autocast_enabled(device: torch.device) -> bool:
    """``torch.is_autocast_enabled``, which raises for the one device without autocast that this library serves."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where torch's own operators take tensors in the dtypes that they have."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast(*values: Any) -> list[Any]:
    """The tensors among ``values`` in the dtype of an enabled autocast for the device of the first of them, or as they
    are. What is no tensor is left to the checks that follow."""
    first = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if first is None or not autocast_enabled(first.device):
        return list(values)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        else value
        for value in values
    ]


def seed_tensor(dropout_p: float, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The int64 scalar that keys dropout, drawn from torch's generator if the user gave none; None without dropout."""
    if seed is None:
        return None if dropout_p == 0.0 else torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype not in INTEGER_DTYPES:
            raise ValueError(f"seed: expected an integer or an integer tensor with one element, given {describe(seed)}")
        if seed.is_meta and device.type != "meta":
            raise ValueError(f"seed: expected a tensor with a value, given {describe(seed)}")
        return None if dropout_p == 0.0 else seed.to(device=device, dtype=torch.int64).reshape(())
    integer("seed", seed, -(2**63), 2**63 - 1)
    return None if dropout_p == 0.0 else torch.full((), seed, dtype=torch.int64, device=device)
