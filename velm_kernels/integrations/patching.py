"""Replacing modules of a model in place, and taking the replacements out again.

How a family is written
-----------------------
A module of `velm_kernels.integrations.families` declares, for exact class names of the library it serves, what replaces
them. Every module in that package is imported on the first `patch`; none of them may import the model library::

    @replaces("transformers.models.vilt.modeling_vilt", "ViltSelfAttention", family="vilt", by="cross_attention")
    class SelfAttention(Replacement):
        velm_absorbs = (("dropout", DROPOUTS),)       # what the original calls and the kernel does instead

        @classmethod
        def why_not(cls, module):                  # optional: a reason to leave this instance alone, or None
            return None

        def forward(self, hidden_states, attention_mask=None, output_attentions=False):
            if output_attentions:                  # the original serves what the kernel cannot, and the report says so
                return self.velm_original("output_attentions=True", hidden_states, attention_mask, output_attentions)
            ...

    plain_linears("transformers.models.vilt.modeling_vilt", "ViltLayer", family="vilt")

- The replaced instance keeps its parameters, buffers, hooks and attributes; only its `__class__` changes, to a subclass
  of its own class whose methods come first from the `Replacement`. `__init__` never runs. A class that somebody put on
  top (`fully_shard`, a parametrization) stays on top. A `torch.nn.Linear` keeps its class, because tools look for
  exactly it, and has a forward of its own instead (`projections.LinearForward`).
- Before every call `plain.why_aside` looks whether somebody could notice the replacement: the original serves a call
  with inputs that are more than tensors, on the meta device, under `torch.func`, and one with a listener on a submodule
  that the replacement does not call. `velm_absorbs` names those submodules, and the classes known in their place.
- `forward` must take the parameters of the original (same names, same order). This is compared when `patch` runs, so
  that another version of the library with another signature is left alone instead of called wrongly. A replacement
  that keeps the original's `forward` and replaces other methods names them in `velm_methods`.
- `plain_linears` names a layer class inside which every exact `torch.nn.Linear` may be replaced too.
- Projections are called as modules (`self.query(x)`), never through their `.weight`: what stands there may be a LoRA
  layer, a quantised layer or carry hooks. Where a weight has to be read, `plain.is_bare` and `plain.are_plain` are
  asked first.
- Values of tensors decide nothing unless `plain.may_read` allows it, and nothing is kept on a user's tensor.
- `velm_kernels.integrations.calls` has what most replacements share: `merged_attention`, `weights_wanted`, `project`.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import pkgutil
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from velm_kernels import checks
from velm_kernels.checks import is_distributed, is_plain

from . import stacking
from .plain import Absorbs, why_aside
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
    # Submodules that the original calls and the replacement does not, with the classes known in their place.
    velm_absorbs: Absorbs = ()

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Return why `module` should be left as it is, or None."""
        return None

    def velm_original(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward, and record `reason` in the report that `patch` returned."""
        return self.velm_original_method("forward", reason, *args, **kwargs)

    def velm_original_method(self, method: str, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The same for a method of `velm_methods`."""
        record_fallback(self, reason)
        return getattr(self.velm_original_class, method)(self, *args, **kwargs)

    def _get_name(self) -> str:
        return f"Velm{self.velm_original_class.__name__}" if is_replaced(self) else super()._get_name()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass carries the name of the original, because model libraries look classes up by name, so it cannot
        # be pickled by reference. Copies and unpickled modules are patched again. A class on top is left to its maker.
        reduced = super().__reduce_ex__(protocol)
        if not _is_ours(type(self)):
            return reduced
        original = self.velm_original_class
        return (_rebuild, (original.__module__, original.__qualname__), *reduced[2:])


def record_fallback(module: nn.Module, reason: str) -> None:
    """Count a call of `module` that its original serves in the report that `patch` returned."""
    if torch.compiler.is_compiling():
        return
    found = _RECORDED_IN.get(module)
    report = found[0]() if found else None
    if found and report is not None:
        cls = getattr(type(module), "velm_original_class", type(module))
        report.record_fallback(found[1], cls.__name__, reason)


def _guarded(method: Callable[..., Any], name: str, original: type[nn.Module]) -> Callable[..., Any]:
    """Return `method` of a replacement, which steps aside for the original's where that could be noticed."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Somebody may have kept the bound method (as offloading hooks do) until after `unpatch`.
        if not is_replaced(self):
            return getattr(original, name)(self, *args, **kwargs)
        reason = why_aside(self, self.velm_absorbs, args, kwargs)
        if reason is None:
            return method(self, *args, **kwargs)
        # What replaced layers tell each other is not for the originals.
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("velm_")}
        return self.velm_original_method(name, reason, *args, **kwargs)

    return guarded


def is_replaced(module: nn.Module) -> bool:
    """Say whether `module` is replaced at present."""
    if isinstance(module, Replacement):
        return "velm_off" not in vars(module)
    return "velm_forward" in vars(module)


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

    Each replaced module becomes an instance of a subclass of its own class (a `torch.nn.Linear` stays exactly that) and
    keeps its parameters, so `isinstance`, `state_dict`, hooks, adapters, quantisation, sharding and the model's own
    output recorders go on working. Outputs and gradients are those of the original up to rounding; calls that the
    kernels cannot serve (for example `output_attentions=True`), or that somebody listens to inside of a replaced module
    (a hook on the dropout of attention weights), run the original forward, see `Report.fallbacks`. Either everything
    planned is replaced, or, when an error is raised, nothing.

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

    Example:
        >>> import transformers
        >>> config = transformers.ViltConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> report = velm_kernels.patch(transformers.ViltModel(config), only="*.attention.attention")
        >>> print(report)
        ViltModel: 1 modules replaced, 0 left
          module                               class              replaced by
          encoder.layer.0.attention.attention  ViltSelfAttention  cross_attention
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, given {checks.describe(model)}")
    checks.flag("strict", strict)
    _load_families()
    report = Report(type(model).__name__)
    plan: list[tuple[str, nn.Module]] = []
    for path, module, known, family in _selected(model, only):
        key = _key(known)
        name = known.__name__
        if is_replaced(module):
            report.add(path, name, family, "already", _KERNEL[key])
            continue
        reason = _why_not(module, known)
        if reason is None:
            plan.append((path, module))
            report.add(path, name, family, "replaced", _KERNEL[key])
        else:
            report.add(path, name, family, "left", reason)
    if strict and report.left:
        raise RuntimeError("patch(strict=True): these modules could not be replaced, so none was:\n" + str(report))
    made: dict[type, type] = {}
    linears = [module for _, module in plan if isinstance(module, nn.Linear)]
    others = [module for _, module in plan if not isinstance(module, nn.Linear)]
    new = [module for module in others if not isinstance(module, Replacement)]
    _swap([(module, stacking.moved(type(module), _patched, made)) for module in new])
    for module in others:
        vars(module).pop("velm_off", None)
    projections = importlib.import_module("velm_kernels.integrations.projections")
    for module in linears:
        projections.LinearForward.install(module)
    for path, module in plan:
        _RECORDED_IN[module] = (weakref.ref(report), path)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every replaced module of `model` its original class and forward back; return how many there were.

    A class that was put on top of a replaced one stays on top. Where that class cannot be made again on the original
    (it was written as a subclass of the replaced module's class), the module keeps both, computes as the original does,
    and a warning says so.

    Args:
        model: any module; its submodules are searched.

    Returns:
        The number of modules that `patch` had replaced.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> velm_kernels.unpatch(torch.nn.Linear(4, 4))  # nothing here was patched
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, given {checks.describe(model)}")
    projections = importlib.import_module("velm_kernels.integrations.projections")
    replaced = [(path, module) for path, module in model.named_modules() if is_replaced(module)]
    made: dict[type, type] = {}
    kept: list[tuple[str, nn.Module]] = []
    plan: list[tuple[nn.Module, type]] = []
    for path, module in replaced:
        if isinstance(module, Replacement):
            ours = next(cls for cls in type(module).__mro__ if _is_ours(cls))
            if stacking.can_move(type(module), ours):
                plan.append((module, stacking.moved(type(module), _unpatched, made)))
            else:
                kept.append((path, module))
    _swap(plan)
    for _, module in replaced:
        _RECORDED_IN.pop(module, None)
        if isinstance(module, nn.Linear):
            projections.LinearForward.remove(module)
        for name in [name for name in vars(module) if name.startswith("velm_")]:
            delattr(module, name)
    for path, module in kept:
        module.velm_off = True  # type: ignore[assignment]
        warnings.warn(
            f"unpatch: {path or 'the model'} keeps its class {type(module).__name__}, which is a subclass of the "
            "replaced one; its forward is the original's",
            stacklevel=2,
        )
    return len(replaced)


def _load_families() -> None:
    importlib.import_module("velm_kernels.integrations.projections")
    package = importlib.import_module("velm_kernels.integrations.families")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")


def _key(cls: type) -> Key:
    return (cls.__module__, cls.__qualname__)


def _is_ours(cls: type) -> bool:
    return "velm_original_class" in vars(cls)


def _patched(cls: type) -> type | None:
    return _subclass(cls) if _key(cls) in _REPLACEMENTS and not _is_ours(cls) else None


def _unpatched(cls: type) -> type | None:
    return vars(cls)["velm_original_class"] if _is_ours(cls) else None


def _of(cls: type, keys: Iterable[Key]) -> type | None:
    """Return the first class among `cls` and its bases that is declared in `keys`, or ours in its place."""
    return next((base for base in cls.__mro__ if _key(base) in keys), None)


def _known(model: nn.Module) -> list[tuple[str, nn.Module, type, str]]:
    """Return (path, module, known class, family) of every module that has a replacement, in the order of
    `named_modules`. Its class is the known one, or comes from it."""
    scoped: dict[nn.Module, str] = {}
    for module in model.modules():
        layer = _of(type(module), _LINEAR_SCOPES)
        if layer is not None and stacking.why_not_movable(type(module), layer, ()) is None:
            family = _LINEAR_SCOPES[_key(layer)]
            scoped.update((inner, family) for inner in module.modules() if isinstance(inner, nn.Linear))
    found: list[tuple[str, nn.Module, type, str]] = []
    for path, module in model.named_modules():
        known = _of(type(module), _REPLACEMENTS)
        known = getattr(known, "velm_original_class", known)
        if known is nn.Linear:
            # The output projection of a MultiheadAttention, which is never called.
            if module in scoped and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
                found.append((path, module, known, scoped[module]))
        elif known is not None:
            found.append((path, module, known, _FAMILY[_key(known)]))
    return found


def _selected(model: nn.Module, only: str | Iterable[str] | None) -> list[tuple[str, nn.Module, type, str]]:
    known = _known(model)
    if only is None:
        return known
    if not isinstance(only, Iterable) or isinstance(only, torch.Tensor):
        raise TypeError(f"only: expected a string, several or None, given {checks.describe(only)}")
    patterns = [only] if isinstance(only, str) else list(only)
    selected: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"only: expected strings, given {checks.describe(pattern)} among them")
        hits = {path for path, _, _, family in known if family == pattern or fnmatch.fnmatchcase(path, pattern)}
        if not hits:
            present = sorted({family for _, _, _, family in known})
            raise ValueError(
                f"only: expected family names ({', '.join(present) or 'none is known here'}) or patterns of module "
                f"paths, given {checks.shown(pattern)}, which selects no module that could be replaced"
            )
        selected |= hits
    return [entry for entry in known if entry[0] in selected]


def _why_not(module: nn.Module, known: type) -> str | None:
    replacement = _REPLACEMENTS[_key(known)]
    if isinstance(module, Replacement):  # switched off by `unpatch`, which could not take its class apart
        return replacement.why_not(module)
    reason = stacking.why_not_movable(type(module), known, replacement.velm_methods)
    if reason is not None:
        return reason
    for method in replacement.velm_methods:
        if method in vars(module):
            return f"its {method} was replaced on the instance (for example by offloading hooks)"
        if not hasattr(module, method):
            return f"it has no method {method}"
        expected, found = (_parameters(getattr(cls, method)) for cls in (replacement, known))
        if expected != found:
            return f"its {method} takes ({', '.join(found)}), the replacement is written for ({', '.join(expected)})"
    for name, parameter in module._parameters.items():
        # A distributed one may be whole in the forward, as under `fully_shard`: each call looks again.
        if parameter is not None and not is_plain(parameter) and not is_distributed(parameter):
            return f"its {name} is a {type(parameter).__name__}"
    return replacement.why_not(module)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [
        "**" if parameter.kind is parameter.VAR_KEYWORD else name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]


def _subclass(original: type) -> type:
    if original not in _SUBCLASSES:
        replacement = _REPLACEMENTS[_key(original)]
        body: dict[str, Any] = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "velm_original_class": original,
        }
        for name in replacement.velm_methods:
            body[name] = _guarded(getattr(replacement, name), name, original)
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
