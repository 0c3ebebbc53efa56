"""Which implementations of an operator exist here, what each accepts, and which one is taken.

An operator has up to five implementations: ``cuda``, ``triton``, ``cpu``, ``torch`` (kernels of torch that compute
exactly this) and ``reference`` (its meaning, by torch in steps). One more, ``device_on_host`` (the CUDA kernels on
threads of the host), is for tests and only taken where it is asked for. An implementation answers for given arguments
with a list of reasons why it cannot serve them; the first one whose list is empty is taken, in an order that depends on
operator and device (:mod:`velm_kernels.backends.order`). The choice depends on the arguments alone, never on a timing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from velm_kernels.backends import failures, order
from velm_kernels.backends.choice import Choice
from velm_kernels.backends.failures import NoBackendError

__all__ = [
    "ON_REQUEST",
    "ORDER",
    "Arguments",
    "Implementation",
    "NoBackendError",
    "by_name",
    "explain",
    "forced",
    "forget_kinds",
    "kind_of",
    "kinds_depend_on",
    "name_arguments",
    "reasons_against",
    "register",
    "register_composed",
    "register_public",
    "run",
    "select",
    "tensors_of",
    "use_backend",
    "warn_of_plain_torch",
]

# All that calls are served by; in which order, module `order` says.
ORDER = ("cuda", "triton", "cpu", "torch", "reference")
ON_REQUEST = ("device_on_host",)

# Packages whose lines a warning does not point at: the user wrote the line that called them.
_PASSED_OVER = ("velm_kernels", "torch", "transformers", "open_clip", "accelerate", "peft")

_SCALARS = frozenset((bool, int, float, str))

Arguments = dict[str, Any]
Reasons = Callable[[Arguments], list[str]]


@dataclass(frozen=True)
class Implementation:
    """An operator by one backend.

    Attributes:
        call: takes the operator's arguments in the order of its schema.
        of_kind: why it cannot serve given arguments, by their devices and dtypes alone; asked once for each kind.
        reasons: why it cannot for what else they are; asked at every call. None where there is nothing else.
    """

    backend: str
    call: Callable[..., Any]
    of_kind: Reasons
    reasons: Reasons | None

    def against(self, arguments: Arguments) -> list[str]:
        return self.of_kind(arguments) or ([] if self.reasons is None else self.reasons(arguments))


@dataclass(frozen=True)
class PublicFunction:
    operator: str
    canonical: Callable[..., Arguments]
    small: Callable[..., Any] | None = None
    operator_for: Callable[[Arguments], str] | None = None


_implementations: dict[str, dict[str, Implementation]] = {}
_public_functions: dict[str, PublicFunction] = {}
_composed: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}
_warned: set[tuple[str, str]] = set()
# Those of an operator that can serve one kind of arguments, in the order in which they are tried, each with whether
# users are told that it serves.
_serving: dict[tuple[Any, ...], list[tuple[Implementation, bool]]] = {}
_argument_names: dict[str, Sequence[str]] = {}
# What decides beside the kind of arguments which kinds a backend serves.
_state: Callable[[], Any] = lambda: None  # noqa: E731
_asked_for = Choice("velm_kernels_backend")


def tensors_of(arguments: Arguments) -> list[tuple[str, Any]]:
    """The tensors among ``arguments`` with their names, and the first one of every list of them."""
    found = []
    for name, value in arguments.items():
        # Every call of an operator comes through here, and most arguments are neither.
        if value is None or value.__class__ in _SCALARS:
            continue
        first = value[0] if value.__class__ in (list, tuple) and value else value
        if isinstance(first, torch.Tensor):
            found.append((name, first))
    return found


def _never(arguments: Arguments) -> list[str]:
    return []


def register(
    operator: str,
    backend: str,
    call: Callable[..., Any],
    reasons: Reasons | None = None,
    of_kind: Reasons = _never,
) -> None:
    """Makes ``call`` the implementation of ``operator`` by ``backend``.

    ``call`` takes the operator's arguments in the order of its schema, without the trailing ``backend``.
    ``of_kind`` and ``reasons`` take the same arguments as a dict and return why they cannot be served; empty means they
    can. What ``of_kind`` says may depend on the devices and the dtypes of the tensors alone.
    """
    _checked_name(backend, "backend")
    _implementations.setdefault(operator, {})[backend] = Implementation(backend, call, of_kind, reasons)
    _serving.clear()


def register_public(
    name: str,
    operator: str,
    canonical: Callable[..., Arguments],
    small: Callable[..., Any] | None = None,
    operator_for: Callable[[Arguments], str] | None = None,
) -> None:
    """Lets :func:`explain` turn the arguments of the public function ``name`` into those of its operator. ``small`` is
    what the function asks before: it returns the result of a small call, or None (:mod:`velm_kernels.backends.small`).
    ``operator_for`` is what it asks where some canonical arguments are for another operator.
    """
    _public_functions[name] = PublicFunction(operator, canonical, small, operator_for)


def register_composed(function: Callable[..., Any], small: Callable[..., Any] | None = None) -> None:
    """Lets :func:`explain` tell of the operators that the public ``function`` calls, by following it on tensors without
    values. ``small`` is as of :func:`register_public`."""
    _composed[function.__name__] = function, small


def forced() -> str:
    """The backend that the user asked for (``use_backend``, then ``VELM_BACKEND``), or ``""`` for none."""
    asked = _asked_for.get()
    return _environment_choice if asked is None else asked


def nobody_asked() -> bool:
    """Whether :func:`forced` is ``""``, at once, where torch.compile is known not to trace."""
    return not (_environment_choice if (asked := _asked_for.get_untraced()) is None else asked)


def _checked_name(name: str, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected one of {', '.join(ORDER)}, given {type(name).__name__}")
    if name and name not in ORDER + ON_REQUEST:
        raise ValueError(f"{source}: expected one of {', '.join(ORDER)}, given {name!r}")
    return name


_environment_choice = _checked_name(os.environ.get("VELM_BACKEND", ""), "VELM_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every operator called inside runs on the backend ``name``, and raises if that backend cannot serve it.

    Backward runs on the backend that its forward was asked to use, also outside of the context. Other threads and
    asyncio tasks choose for themselves.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"`` or ``"reference"``.

    Returns:
        A context manager.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is not one of them.
        velm_kernels.backends.NoBackendError: from the operators called inside, where the backend cannot serve a call;
            the message has the reasons.

    Example:
        >>> query, key = torch.randn(1, 2, 10, 16), torch.randn(1, 2, 50, 16)
        >>> with velm_kernels.use_backend("reference"):
        ...     out = velm_kernels.cross_attention(query, key, key)
        >>> torch.allclose(out, velm_kernels.cross_attention(query, key, key), atol=1e-5)
        True
    """
    with _asked_for.use(_checked_name(name, "use_backend")):
        yield


def reasons_against(operator: str, arguments: Arguments, wanted: str = "") -> dict[str, list[str]]:
    """Why each backend cannot serve ``arguments`` (empty: it can); first those that are tried, in their order.

    ``wanted`` is listed too if it is one that is only taken on request."""
    tried = order.of(operator, arguments)
    listed = tried + tuple(
        name for name in ORDER + ON_REQUEST if name not in tried and (name in ORDER or name == wanted)
    )
    return {backend: _reasons(operator, backend, arguments) for backend in listed}


def _reasons(operator: str, backend: str, arguments: Arguments) -> list[str]:
    found = _implementations.get(operator, {})
    if backend not in found:
        return [f"has no {operator}"]
    reasons = found[backend].against(arguments)
    return reasons if reasons or not failures.some() else failures.against(operator, backend, arguments)


def implementation(operator: str, backend: str) -> Implementation:
    """That of ``backend``, whatever the arguments."""
    return _implementations[operator][backend]


def select(operator: str, arguments: Arguments, wanted: str = "") -> Implementation:
    """The implementation that runs ``operator`` on ``arguments``."""
    if wanted:
        reasons = _reasons(operator, wanted, arguments)
        if reasons:
            raise NoBackendError(
                f"{operator}: backend {wanted!r} was asked for, but {'; '.join(reasons)}"
            ) from failures.cause_of(operator, wanted, arguments)
        return _implementations[operator][wanted]
    taken, refused = _first_that_can(operator, arguments)
    if taken.backend == "reference" or (taken.backend == "torch" and "cpu" in refused):
        _warn_of_fallback(operator, arguments, refused)
    return taken


def _first_that_can(operator: str, arguments: Arguments) -> tuple[Implementation, dict[str, list[str]]]:
    """The first implementation that has no reasons against it, and the reasons of those before it."""
    found = _implementations.get(operator, {})
    refused: dict[str, list[str]] = {}
    for backend in order.of(operator, arguments):
        if backend not in found:
            continue
        reasons = _reasons(operator, backend, arguments)
        if not reasons:
            return found[backend], refused
        refused[backend] = reasons
    lines = "".join(f"\n  {backend}: {'; '.join(reasons)}" for backend, reasons in refused.items())
    raise NoBackendError(f"{operator}: no backend can serve these arguments{lines}")


def kind_of(values: Iterable[Any]) -> list[Any]:
    """The devices and dtypes of the tensors among ``values``."""
    kind: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            kind.append(value.dtype)
            if not value.is_cpu:
                kind.append(value.device)
        elif value.__class__ in (list, tuple):
            kind += kind_of(value)
    return kind


def forget_kinds() -> None:
    """Asks every backend again what kinds of arguments it serves, for tests that change the answers."""
    _serving.clear()


def kinds_depend_on(state: Callable[[], Any]) -> None:
    """Tells that what backends say of a kind of arguments holds for one value of ``state()`` alone."""
    global _state
    _state = state


def name_arguments(operator: str, names: Sequence[str]) -> None:
    """Tells the names of an operator's arguments, in the order of its schema."""
    _argument_names[operator] = names


def by_name(operator: str, values: Sequence[Any]) -> Arguments:
    """The arguments of ``operator`` by name."""
    return dict(zip(_argument_names[operator], values, strict=True))


def _select_by_kind(
    operator: str, values: Sequence[Any], wanted: str, kind: Sequence[Any], arguments: Arguments | None
) -> Implementation:
    """What :func:`select` takes, without asking again what holds for all arguments of a kind."""
    tried = None
    if order.asks_arguments(operator):
        arguments = arguments or by_name(operator, values)
        tried = order.of(operator, arguments)
    key = (operator, wanted, tried, _state(), *kind)
    serving = _serving.get(key)
    if serving is None:
        arguments = arguments or by_name(operator, values)
        serving = _serving[key] = _that_serve(operator, wanted, arguments)
    for implementation, told in serving:
        if implementation.reasons is not None:
            arguments = arguments or by_name(operator, values)
            if implementation.reasons(arguments):
                continue
        if told:
            break
        return implementation
    return select(operator, arguments or by_name(operator, values), wanted)


def _that_serve(operator: str, wanted: str, arguments: Arguments) -> list[tuple[Implementation, bool]]:
    found = _implementations.get(operator, {})
    tried = (wanted,) if wanted else order.of(operator, arguments)
    # What runs on plain torch because something else refused is told.
    return [
        (found[backend], backend in ("torch", "reference") and backend != tried[0])
        for backend in tried
        if backend in found and not found[backend].of_kind(arguments)
    ]


def run(
    operator: str,
    values: Sequence[Any],
    wanted: str = "",
    kind: Sequence[Any] | None = None,
    arguments: Arguments | None = None,
) -> Any:
    """``operator`` on ``values`` by the implementation that :func:`select` takes, or if that turns out not to start, by
    the next one. Operators write nothing that a caller sees, so what was half done is dropped.

    ``wanted`` is the backend that was asked for, in whose place no other comes; ``kind`` is :func:`kind_of` the values
    and ``arguments`` are these by name, where that is known.
    """
    if failures.some():
        implementation = select(operator, arguments or by_name(operator, values), wanted)
    else:
        if kind is None:
            kind = kind_of(values)
        implementation = _select_by_kind(operator, values, wanted, kind, arguments)
    while True:
        try:
            return implementation.call(*values)
        except Exception as error:
            failure = failures.of_call(error)
            if failure is None:
                raise
        arguments = arguments or by_name(operator, values)
        cause = failures.remember(operator, implementation.backend, arguments, failure)
        if wanted:
            text = f"{operator}: backend {wanted!r} was asked for, but {failure.reason}"
            del failure
            raise NoBackendError(text) from cause
        failed, (implementation, _) = implementation, _first_that_can(operator, arguments)
        text = f"runs on {implementation.backend}: {failed.backend} can serve it, but {failure.reason}"
        _warn_once((failed.backend, failure.reason), operator, text)
        del failure


def _warn_of_fallback(operator: str, arguments: Arguments, refused: dict[str, list[str]]) -> None:
    """Says once that ``operator`` runs on the reference, in words of the function that the user called, at the line
    that called it."""
    from velm_kernels.backends import cpu

    # float64 is documented to be computed by the reference: nobody is surprised by it.
    given = [value for listed in arguments.values() for value in (listed if isinstance(listed, list) else [listed])]
    given = [value for value in given if isinstance(value, torch.Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in given):
        return
    if any((backend, reason) in _warned for backend, reasons in refused.items() for reason in reasons):
        # The call at which that backend did not start has said so.
        return
    # What a backend for other devices would say is of no use here; `explain` has it.
    on_cpu = all(tensor.is_cpu for tensor in given)
    of_device = {backend: reasons for backend, reasons in refused.items() if (backend == "cpu") == on_cpu} or refused
    text = "; ".join(f"{backend}: {', '.join(reasons)}" for backend, reasons in of_device.items())
    # A library that is not there is said once, not once for each function that misses it.
    key = ("", text) if on_cpu and cpu.unavailable() else (_family(operator), text)
    _warn_once(key, operator, f"runs on plain torch, which is slower ({text})")


def warn_of_plain_torch(operator: str, args: Sequence[Any], why: str, wanted: str = "") -> None:
    """Says once that a derivative of ``operator`` comes from plain torch, unless that is what the user asked for or
    its arguments are float64, which always are computed so."""
    given = [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    if wanted != "reference" and not any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in given):
        _warn_once((_family(operator), why), operator, f"runs on plain torch, which is slower ({why})")


def _family(operator: str) -> str:
    return operator.removesuffix("_forward").removesuffix("_backward")


def _warn_once(key: tuple[str, str], operator: str, text: str) -> None:
    if key in _warned:
        return
    _warned.add(key)
    level, name = _caller()
    name = name or next(
        (name for name, public in _public_functions.items() if _family(public.operator) == _family(operator)), operator
    )
    warnings.warn(f"velm_kernels: {name} {text}", stacklevel=level)


def _caller() -> tuple[int, str]:
    """For the function that calls this one: the ``stacklevel`` of the line outside of this library, torch and the
    libraries whose models are patched, and the public function of this library which that line called, or ``""``."""
    level, name = 1, ""
    frame = sys._getframe(1)
    # What torch.compile generates has no module name.
    while (package := frame.f_globals.get("__name__", "torch").partition(".")[0]) in _PASSED_OVER:
        of = frame.f_code.co_name
        if package == "velm_kernels" and (of in _public_functions or of in _composed):
            name = of
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level, name


def explain(name: str, *args: Any, **kwargs: Any) -> str:
    """Which backend ``velm_kernels.<name>(*args, **kwargs)`` would run on, and why not on the others.

    The call itself asks the same functions. Nothing is computed.

    Args:
        name: of a public operator.
        args, kwargs: its arguments, whose shapes, dtypes and devices decide.

    Returns:
        A line with the name of the backend, and one for each backend with its reasons.

    Raises:
        TypeError: ``name`` is not a string; or as the operator.
        ValueError: ``name`` is not that of an operator with backends; or as the operator.

    Example:
        >>> query, key = torch.randn(1, 8, 100, 64).double(), torch.randn(1, 8, 300, 64).double()
        >>> print(velm_kernels.explain("cross_attention", query, key, key))
        cross_attention -> reference
          ...
          reference yes
          ...
    """
    from velm_kernels.backends import follow

    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of an operator, given {type(name).__name__}")
    known = {**_public_functions, **_composed}
    if name not in known:
        raise ValueError(f"explain: expected one of {', '.join(sorted(known))}, given {name!r}")
    wanted = forced()
    if name in _composed:
        small = _composed[name][1]
        taken, reasons = _explain_composed(name, args, kwargs, wanted)
    else:
        public = _public_functions[name]
        small = public.small
        arguments = public.canonical(*args, **kwargs)
        operator = public.operator if public.operator_for is None else public.operator_for(arguments)
        taken, reasons = _explain_operator(operator, arguments, wanted)
    taken += " (asked for)" if wanted else ""
    if small is not None and follow.computes(small, args, kwargs):
        taken = "torch (its own function, called in place of an operator)"
    return "\n".join([f"{name} -> {taken}", *reasons])


def _explain_operator(operator: str, arguments: Arguments, wanted: str) -> tuple[str, list[str]]:
    """The backend that serves these arguments, and a line for each backend."""
    reasons = reasons_against(operator, arguments, wanted)
    taken = wanted or next(backend for backend in reasons if not reasons[backend])
    width = max(map(len, reasons)) + 1
    told = (f"  {backend:<{width}}{'yes' if not why else 'no: ' + '; '.join(why)}" for backend, why in reasons.items())
    return taken, list(told)


def _explain_composed(name: str, args: Sequence[Any], kwargs: Arguments, wanted: str) -> tuple[str, list[str]]:
    """The backends that serve the operators inside, and of each of these which one, and a line for each backend."""
    from velm_kernels.backends import follow

    taken, lines = [], []
    for operator, arguments in follow.operators_called(_composed[name][0], args, kwargs):
        if operator not in _implementations:
            # By torch on every device.
            continue
        backend, reasons = _explain_operator(operator, arguments, wanted)
        taken.append(backend)
        lines += [f"  {_family(operator)} -> {backend}", *(f"  {line}" for line in reasons)]
    return ", ".join(dict.fromkeys(taken)), lines
