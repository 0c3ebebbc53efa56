"""Formulas for torch's flop counter, given to it when it is imported.

``torch.utils.flop_counter`` imports triton, which takes as long as this whole library and which few programs need. It
copies its registry whenever a ``FlopCounterMode`` is made, so the formulas have to be there as soon as it is imported,
in whichever order a program imports the two.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"

_formulas: dict[str, Callable[..., int]] = {}


def register(operator: str, formula: Callable[..., int]) -> None:
    """Makes ``formula`` the one of ``velm::operator``; it takes what torch's ``register_flop_formula`` says."""
    if COUNTER in sys.modules:
        _give(sys.modules[COUNTER], operator, formula)
    else:
        _formulas[operator] = formula


def _give(counter: ModuleType, operator: str, formula: Callable[..., int]) -> None:
    counter.register_flop_formula(getattr(torch.ops.velm, operator))(formula)


class _AfterImport(MetaPathFinder, Loader):
    """Finds and loads the flop counter as the other finders do, then gives it the formulas."""

    def __init__(self) -> None:
        self._searching = False
        self._loader: Loader

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Everything but this import sees the module as it would be without us, its source among it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        while _formulas:
            _give(module, *_formulas.popitem())
        sys.meta_path.remove(self)


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
