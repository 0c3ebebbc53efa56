"""Checks of what the constructors of modules are given, by their annotations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch

from velm_kernels import checks

P = ParamSpec("P")


def checked(**least: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A decorator of ``__init__`` that raises TypeError or ValueError for an argument that its annotation rules out.

    Sizes are at least 0, or what ``least`` says of them by name; ``dropout...`` is a probability, ``...eps`` greater
    than 0, other numbers are finite.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)
        kinds = {name: str(parameter.annotation) for name, parameter in signature.parameters.items() if name != "self"}

        @functools.wraps(init)
        def checked_init(*args: P.args, **kwargs: P.kwargs) -> None:
            # A call that does not fit the signature is for Python to refuse, in its own words.
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                given = {}
            for name, value in given.items():
                if name in kinds:
                    _check(name, value, kinds[name], least.get(name, 0))
            init(*args, **kwargs)

        return checked_init

    return decorate


def _check(name: str, value: Any, kind: str, least: int) -> None:
    if value is None and "None" in kind:
        return
    of = kind.removesuffix(" | None")
    if of == "int":
        checks.integer(name, value, least, 2**31 - 1)
    elif of == "bool":
        checks.flag(name, value)
    elif of == "float":
        _check_number(name, value)
    elif of == "str" and not isinstance(value, str):
        expected = "a name or None" if "None" in kind else "a name"
        raise TypeError(f"{name}: expected {expected}, given {checks.describe(value)}")
    elif of.startswith("Sequence["):
        if isinstance(value, str) or not isinstance(value, (Sequence, torch.Size)):
            raise TypeError(f"{name}: expected a sequence of numbers, given {checks.describe(value)}")
        for i, item in enumerate(value):
            _check(f"{name}[{i}]", item, of.removeprefix("Sequence[").removesuffix("]"), least)
    elif of.startswith("torch.device"):
        _check_device(name, value)
    elif of == "torch.dtype" and (not isinstance(value, torch.dtype) or value not in checks.FLOAT_DTYPES):
        given = value if isinstance(value, torch.dtype) else checks.describe(value)
        raise TypeError(f"{name}: expected a floating dtype or None, given {given}")


def _check_number(name: str, value: Any) -> None:
    if name.startswith("dropout"):
        checks.probability(name, value)
    elif name.endswith("eps"):
        checks.number(name, value, 1e-38, 1e30, described="a number greater than 0")
    else:
        checks.number(name, value, -1e30, 1e30, described="a finite number")


def _check_device(name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(f"{name}: expected the name of a device, given {checks.shown(value)}") from None
    elif not isinstance(value, torch.device) and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: expected a device, its name or None, given {checks.describe(value)}")
