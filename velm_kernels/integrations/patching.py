"""Replacing modules of a model in place, and taking the replacements out again.

How a family is written
-----------------------
A module of `velm_kernels.integrations.families` declares, for exact class names of the library it serves, what replaces
them. Every module in that package is imported on the first `patch`; none of them may import the model library::

    @replaces("transformers.models.vilt.modeling_vilt", "ViltSelfAttention", family="vilt", by="cross_attention")
    class SelfAttention(Replacement):
        @classmethod
        def why_not(cls, module):                  # optional: a reason to leave this instance alone, or None
            return None

        def forward(self, hidden_states, attention_mask=None, output_attentions=False):
            if output_attentions:                  # the original serves what the kernel cannot, and the report says so
                return self.velm_original("output_attentions=True", hidden_states, attention_mask, output_attentions)
            ...

    plain_linears("transformers.models.vilt.modeling_vilt", "ViltLayer", family="vilt")

- The replaced instance keeps its parameters, buffers, hooks and attributes; only its `__class__` changes, to a subclass
  of its own class whose methods come first from the `Replacement`. `__init__` never runs.
- `forward` must take the parameters of the original (same names, same order). This is compared when `patch` runs, so
  that another version of the library with another signature is left alone instead of called wrongly. A replacement
  that keeps the original's `forward` and replaces other methods names them in `velm_methods`.
- `plain_linears` names a layer class inside which every exact `torch.nn.Linear` may be replaced too.
- Projections are called as modules (`self.query(x)`), never through their `.weight`: what stands there may be a LoRA
  layer, a quantised layer or carry hooks.
- `velm_kernels.integrations.calls` has what most replacements share: `attend`, `weights_wanted`, `project`.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .report import Report

Key = tuple[str, str]

_REPLACEMENTS: dict[Key, type[Replacement]] = {}
_FAMILY: dict[Key, str] = {}
_KERNEL: dict[Key, str] = {}
_LINEAR_SCOPES: dict[Key, str] = {}
_SUBCLASSES: dict[type, type] = {}
# Where calls served by the original are recorded. Kept outside the modules, so that nothing of it is copied or pickled.
_RECORDED_IN: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Report], str]] = weakref.WeakKeyDictionary()
LINEAR: Key = ("torch.nn.modules.linear", "Linear")


class Replacement(nn.Module):
    """What a replaced module's class inherits from before its original class."""

    velm_original_class: type[nn.Module]
    # The methods that take the place of the original's.
    velm_methods: tuple[str, ...] = ("forward",)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Return why `module` should be left as it is, or None."""
        return None

    def velm_original(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward, and record `reason` in the report that `patch` returned."""
        return self.velm_original_method("forward", reason, *args, **kwargs)

    def velm_original_method(self, method: str, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The same for a method of `velm_methods`."""
        if not torch.compiler.is_compiling():
            found = _RECORDED_IN.get(self)
            report = found[0]() if found else None
            if found and report is not None:
                report.record_fallback(found[1], self.velm_original_class.__name__, reason)
        return getattr(self.velm_original_class, method)(self, *args, **kwargs)

    def _get_name(self) -> str:
        return f"Velm{self.velm_original_class.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass carries the name of the original, because model libraries look classes up by name, so it cannot
        # be pickled by reference. Copies and unpickled modules are patched again.
        original = self.velm_original_class
        reduced = super().__reduce_ex__(protocol)
        return (_rebuild, (original.__module__, original.__qualname__), *reduced[2:])


Kind = TypeVar("Kind", bound=type[Replacement])


def replaces(module: str, name: str, *, family: str, by: str) -> Callable[[Kind], Kind]:
    """Declare what replaces the class `name` of `module` (both exact). `by` names the operator, for the report."""

    def declare(replacement: Kind) -> Kind:
        _REPLACEMENTS[module, name] = replacement
        _FAMILY[module, name] = family
        _KERNEL[module, name] = by
        return replacement

    return declare


def plain_linears(module: str, name: str, *, family: str) -> None:
    """Declare that exact `torch.nn.Linear` modules inside instances of the class `name` of `module` may be replaced."""
    _LINEAR_SCOPES[module, name] = family


def supported_families() -> list[str]:
    """Return the names of the families that `patch` knows."""
    _load_families()
    return sorted({*_FAMILY.values(), *_LINEAR_SCOPES.values()} - {""})


def patch(model: nn.Module, only: str | Iterable[str] | None = None, strict: bool = False) -> Report:
    """Replace the modules of `model` that have a faster equivalent here, in place.

    Each replaced module becomes an instance of a subclass of its own class and keeps its parameters, so `isinstance`,
    `state_dict`, hooks, adapters and the model's own output recorders go on working. Outputs and gradients are those of
    the original up to rounding; calls that the kernels cannot serve (for example `output_attentions=True`) run the
    original forward. Either everything planned is replaced, or, when an error is raised, nothing.

    Args:
        model: any module; its submodules are searched.
        only: family names (`supported_families()`) or shell patterns on module paths (`"vilt.encoder.*"`), one or
            several; what they do not select is left alone.
        strict: raise when a selected module of a known class has to be left as it is.

    Returns:
        A report whose text is a table: module path, class, and what replaced it or why it was left.

    Raises:
        TypeError: `model` is not a module, or `only` is not made of strings.
        ValueError: a pattern of `only` selects nothing.
        RuntimeError: `strict` and something known was left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _load_families()
    report = Report(type(model).__name__)
    plan: list[tuple[str, nn.Module, type]] = []
    for path, module, key, family in _selected(model, only):
        original = getattr(type(module), "velm_original_class", None)
        if original is not None:
            report.add(path, original.__name__, family, "already", _KERNEL[key])
            continue
        reason = _why_not(module, key)
        if reason is None:
            plan.append((path, module, _subclass(type(module))))
            report.add(path, type(module).__name__, family, "replaced", _KERNEL[key])
        else:
            report.add(path, type(module).__name__, family, "left", reason)
    if strict and report.left:
        raise RuntimeError("patch(strict=True): these modules could not be replaced, so none was:\n" + str(report))
    _swap([(module, new) for _, module, new in plan])
    for path, module, _ in plan:
        _RECORDED_IN[module] = (weakref.ref(report), path)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every replaced module of `model` its original class back; return how many there were."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    patched = [module for module in model.modules() if isinstance(module, Replacement)]
    _swap([(module, module.velm_original_class) for module in patched])
    for module in patched:
        _RECORDED_IN.pop(module, None)
        for name in [name for name in vars(module) if name.startswith("velm_")]:
            delattr(module, name)
    return len(patched)


def _load_families() -> None:
    importlib.import_module("velm_kernels.integrations.projections")
    package = importlib.import_module("velm_kernels.integrations.families")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")


def _key(module: nn.Module) -> Key:
    cls = getattr(type(module), "velm_original_class", type(module))
    return (cls.__module__, cls.__qualname__)


def _known(model: nn.Module) -> list[tuple[str, nn.Module, Key, str]]:
    """Return (path, module, key, family) of every module that has a replacement, in the order of `named_modules`."""
    scoped: dict[nn.Module, str] = {}
    for module in model.modules():
        family = _LINEAR_SCOPES.get(_key(module))
        if family is not None:
            scoped.update((inner, family) for inner in module.modules() if _key(inner) == LINEAR)
    found = []
    for path, module in model.named_modules():
        key = _key(module)
        if key == LINEAR:
            if module in scoped and LINEAR in _REPLACEMENTS:
                found.append((path, module, key, scoped[module]))
        elif key in _REPLACEMENTS:
            found.append((path, module, key, _FAMILY[key]))
    return found


def _selected(model: nn.Module, only: str | Iterable[str] | None) -> list[tuple[str, nn.Module, Key, str]]:
    known = _known(model)
    if only is None:
        return known
    patterns = [only] if isinstance(only, str) else list(only)
    selected: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"only: expected strings, got {type(pattern).__name__}")
        hits = {path for path, _, _, family in known if family == pattern or fnmatch.fnmatchcase(path, pattern)}
        if not hits:
            present = sorted({family for _, _, _, family in known})
            raise ValueError(f"only: {pattern!r} selects no module that could be replaced; families here: {present}")
        selected |= hits
    return [entry for entry in known if entry[0] in selected]


def _why_not(module: nn.Module, key: Key) -> str | None:
    replacement = _REPLACEMENTS[key]
    for method in replacement.velm_methods:
        if method in vars(module):
            return f"its {method} was replaced on the instance (for example by offloading hooks)"
        if not hasattr(module, method):
            return f"it has no method {method}"
        expected, found = (_parameters(getattr(cls, method)) for cls in (replacement, type(module)))
        if expected != found:
            return f"its {method} takes ({', '.join(found)}), the replacement is written for ({', '.join(expected)})"
    return replacement.why_not(module)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [
        "**" if parameter.kind is parameter.VAR_KEYWORD else name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]


def _subclass(original: type) -> type:
    if original not in _SUBCLASSES:
        replacement = _REPLACEMENTS[original.__module__, original.__qualname__]
        body = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "velm_original_class": original,
        }
        _SUBCLASSES[original] = type(original.__name__, (replacement, original), body)
    return _SUBCLASSES[original]


def _swap(plan: list[tuple[nn.Module, type]]) -> None:
    done: list[tuple[nn.Module, type]] = []
    try:
        for module, new in plan:
            old = type(module)
            module.__class__ = new
            done.append((module, old))
    except BaseException:
        for module, old in reversed(done):
            module.__class__ = old
        raise


def _rebuild(module: str, qualname: str) -> nn.Module:
    _load_families()
    original: Any = importlib.import_module(module)
    for part in qualname.split("."):
        original = getattr(original, part)
    cls: Any = _subclass(original)
    return cls.__new__(cls)
