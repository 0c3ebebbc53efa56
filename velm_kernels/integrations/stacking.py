"""Classes that others put on top of a module's own, while it is patched or before.

FSDP2's `fully_shard` and `torch.nn.utils.parametrize` (weight norm, spectral norm, pruning by masks) give a module a
class made on the spot, with the class it had as base. Ours goes below such a class, and comes out from below it: the
class is made again, with the same name and contents, on the other base.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

# What `type()` fills in by itself, and our own note.
_NOT_COPIED = frozenset({"__dict__", "__weakref__", "velm_made_from"})
# Methods of nn.Module through which every call goes.
_CALLED = frozenset({"__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "__getattr__"})


def on_top(cls: type, known: type) -> list[type]:
    """Return the classes of `cls` that stand above `known` and come from it, from the top down."""
    return [layer for layer in cls.__mro__[: cls.__mro__.index(known)] if issubclass(layer, known)]


def why_not_movable(cls: type, known: type, methods: tuple[str, ...]) -> str | None:
    """Return why a module of class `cls`, which stands on top of `known`, cannot have `methods` replaced below it."""
    for layer in on_top(cls, known):
        if not _made_on_the_spot(layer):
            return f"its class {layer.__name__} is a subclass of {known.__name__}"
    own: set[str] = {*methods, *_CALLED}
    for base in known.__mro__[: known.__mro__.index(nn.Module)]:
        own |= {name for name in vars(base) if not name.startswith("__")}
    for layer in cls.__mro__[: cls.__mro__.index(known)]:
        for name in (_contents(layer) if issubclass(layer, known) else vars(layer)).keys() & own:
            return f"its class {cls.__name__} has a {name} of its own"
    return None


def moved(cls: type, base_for: Callable[[type], type | None], made: dict[type, type]) -> type:
    """Return `cls` with each base for which `base_for` gives another one standing on that instead.

    Args:
        base_for: a class to its substitute; None to look at its bases instead.
        made: the classes made so far, which modules that share a class go on sharing.
    """
    found = base_for(cls)
    if found is not None:
        return found
    bases = tuple(moved(base, base_for, made) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    if cls not in made:
        namespace = _contents(cls)
        before = vars(cls).get("velm_made_from")
        if before is not None and before.__bases__ == bases and _contents(before) == namespace:
            made[cls] = before
        else:
            made[cls] = type(cls)(cls.__name__, bases, namespace)
            made[cls].velm_made_from = cls  # type: ignore[attr-defined]
    return made[cls]


def can_move(cls: type, below: type) -> bool:
    """Say whether every class of `cls` above `below` can be made again without anybody missing the class it was."""
    return all(_made_on_the_spot(layer) for layer in on_top(cls, below))


def _contents(cls: type) -> dict[str, Any]:
    """What the maker of `cls` put in it, without what its bases put into every class that comes from them: layers of
    transformers wrap the forward of each."""
    added = vars(type(cls)(cls.__name__, cls.__bases__, {})).keys() - {"__module__", "__doc__"}

    def inherited(name: str, value: Any) -> bool:
        below = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
        return name in added and below is not None and getattr(value, "__wrapped__", None) is below

    return {name: value for name, value in vars(cls).items() if name not in _NOT_COPIED and not inherited(name, value)}


def _made_on_the_spot(cls: type) -> bool:
    """Say whether `cls` is from a call of `type()`: nobody has it by name, and none of its methods refers to it."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is cls or "<locals>" in cls.__qualname__:
        return False
    return not any(_refers_to_class(value) for value in vars(cls).values())


def _refers_to_class(value: Any) -> bool:
    """Say whether a method uses `super()` or `__class__`: its cell holds the class it was written in."""
    parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
    functions = [getattr(part, "__func__", part) for part in parts]
    return any("__class__" in f.__code__.co_freevars for f in functions if isinstance(f, FunctionType))
