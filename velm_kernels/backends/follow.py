"""What a function would do, found out without computing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from velm_kernels.backends import Arguments


class Follower(TorchDispatchMode):
    """Keeps what operators of ``velm`` are called with inside, in order: (name, arguments by name)."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, Arguments]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "velm":
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args)) | (kwargs or {})
            arguments.pop("backend", None)
            self.called.append((func._schema.name.partition("::")[2], arguments))
        return func(*args, **(kwargs or {}))


def operators_called(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Arguments]]:
    """(operator, its arguments by name) of every call of an operator of ``velm`` in ``function(*args, **kwargs)``, in
    order. Nothing is computed: shapes, dtypes, devices and strides are all that these tensors have."""
    mode = detect_fake_mode(tree_leaves((args, kwargs))) or FakeTensorMode()
    args, kwargs = tree_map_only(
        torch.Tensor, lambda value: value if mode.is_our_fake(value) else mode.from_tensor(value), (args, dict(kwargs))
    )
    follower = Follower()
    with mode, follower:
        function(*args, **kwargs)
    return follower.called


# What only asks a tensor, and what gives a view of it.
_ASKS = frozenset(("__get__", "__len__", "dim", "element_size", "is_contiguous", "item", "numel", "size", "stride"))
_VIEWS = frozenset(
    ("__getitem__", "detach", "expand", "narrow", "squeeze", "transpose", "unflatten", "unsqueeze", "view")
)


class _ComputesError(Exception):
    pass


class _UntilItComputes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in _ASKS and func.__name__ not in _VIEWS:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    raise _ComputesError
        return func(*args, **kwargs)


def computes(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a form of a small call (:mod:`velm_kernels.backends.small`) gives a result, known as soon as it begins to
    compute one."""
    try:
        with _UntilItComputes():
            return function(*args, **kwargs) is not None
    except _ComputesError:
        return True
