"""Declares the operators of namespace ``velm``: one schema each, implemented by whichever backend is selected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from velm_kernels import backends
from velm_kernels.backends import Arguments, cpu, cuda, derivatives, direct

LIBRARY = torch.library.Library("velm", "DEF")


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Records gradients inside the implementation of an operator, where torch may have switched that off.

    Under a dispatch mode (a flop counter, a profiler) operators run below autograd, and ``torch.enable_grad`` alone
    would change nothing.
    """
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


def without_none(found: Any, args: Sequence[Any]) -> Any:
    """Results of an operator as torch knows them: empty tensors in place of those that were not asked for."""
    if isinstance(found, (list, tuple)):
        if all(value.__class__ is torch.Tensor for value in found):
            return found
        return type(found)(without_none(value, args) for value in found)
    if found is not None:
        return found
    first = next(arg for arg in derivatives.flat(args) if isinstance(arg, torch.Tensor))
    return first.new_empty((0,))


def declare(
    name: str,
    arguments: str,
    returns: str,
    *,
    kernel: Sequence[object],
    fake: Callable[..., Any],
    check: Callable[[Arguments], None] | None = None,
) -> None:
    """Declares ``velm::name`` with ``arguments`` and a trailing ``str backend``, and its C++ counterparts, which take
    the arguments ``kernel``, fill the last of them and return nothing.

    What is the size of a tensor among the arguments is a ``SymInt``.

    ``fake`` gives the results' shapes, dtypes and strides. ``check`` sees the arguments before every call and may read
    values: it runs inside the operator, so that torch.compile never traces it.
    """
    schema = f"{name}({arguments}, str backend) -> {returns}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Sizes among the arguments: known by name only to who compiles or exports, numbers by the time a library is called.
    of_library = f"{name}({', '.join(map(str, kernel))}) -> ()".replace("SymInt ", "int ")
    cpu.declare(of_library)
    cuda.declare(of_library)
    names = [argument.name for argument in torch._C.parse_schema(f"velm::{schema}").arguments][:-1]
    direct.declare(name, names, check)

    def run(*args: Any) -> Any:
        return without_none(direct.run(name, args[:-1], args[-1]), args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"velm::{name}", fake, lib=LIBRARY)
    derivatives.register_vmap(LIBRARY, name)


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    meaning: Callable[..., Any],
    leaves: Sequence[str],
    differentiable_backward: Callable[..., Any] | None = None,
    given: Callable[[Any, Sequence[Any]], list[Any]] | None = None,
) -> None:
    """Makes ``backward`` the derivative of ``velm::name``, and ``meaning`` what its other derivatives are those of.

    ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``, and so is what happens, but
    that ``ctx.needs`` stands for ``ctx.needs_input_grad``: a flag for each argument, of a list for each of its tensors;
    and that ``ctx.is_direct`` says whether nobody but the public function has seen the results.
    ``leaves`` are the arguments that may have a gradient. Torch's own, in a call that records
    gradients, looks through the schema for defaults that the caller left out: for the twenty arguments of attention
    that takes ten times as long as all the rest, and these operators have none. ``given`` makes the arguments of
    ``meaning`` from ``ctx`` and its saved tensors; without it they are noted in every call.

    ``meaning`` takes the arguments of the operator without ``backend`` and returns its results, by plain torch alone:
    a pure function, every result new, that torch can differentiate to any order; results without a derivative are
    detached. It serves where a derivative is asked for that no kernel has (:mod:`velm_kernels.backends.derivatives`).
    Gradients that are differentiated again are those of ``meaning`` at the tensors that ``setup_context`` saved, and
    at zeros in place of the others: none of the gradients depends on them, or backward would need them. Where backward
    uses something else in their place, such as a result, ``differentiable_backward`` is what ``backward`` is, in plain
    torch, with the saved tensors behind ``ctx``, or returns NotImplemented.
    """
    operator: torch._ops.OpOverload = getattr(torch.ops.velm, name).default
    names = [argument.name for argument in operator._schema.arguments][:-1]
    # In the order of the schema.
    places = [place for place, of in enumerate(names) if of in leaves]
    has_lists = any(isinstance(argument.type, torch.ListType) for argument in operator._schema.arguments)
    # By what autograd says of the leaves, where none is a list.
    known_needs: dict[tuple[bool, ...], tuple[bool, ...]] = {}

    def needs_of(flags: tuple[bool, ...]) -> tuple[bool, ...]:
        by_place = dict(zip(places, flags))
        known_needs[flags] = found = tuple(by_place.get(place, False) for place in range(len(names)))
        return found

    def needs_in_lists(flags: Sequence[bool], lengths: Sequence[int | None]) -> tuple[bool, ...]:
        left = iter(flags)
        return tuple(
            next(left) if place in places else False
            for place, length in enumerate(lengths)
            for _ in range(1 if length is None else length)
        )

    def forward(ctx: Any, *args: Any) -> Any:
        values, backend, kind, arguments, keyset = args[-1]
        flags = ctx.needs_input_grad
        if has_lists:
            ctx.lengths = tuple(len(value) if isinstance(value, (list, tuple)) else None for value in values)
            ctx.needs = needs_in_lists(flags, ctx.lengths)
        else:
            ctx.lengths = None
            ctx.needs = known_needs.get(flags) or needs_of(flags)
        if keyset is None:
            # Not called by the dispatcher, because nobody listens to it.
            result = direct.run(name, values, backend, kind, arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result = operator.redispatch(keyset & torch._C._after_autograd_keyset, *values, backend)
        ctx.backend, ctx.is_direct = backend, keyset is None or direct.calls.is_public
        setup_context(ctx, (*values, backend), result)
        if given is None:
            derivatives.remember(ctx, derivatives.flat(values) if has_lists else values)
        return result

    def every_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        why = derivatives.why_not_backward(grads)
        found: Sequence[Any]
        if why is None:
            found = backward(ctx, *grads)
        else:
            # Read once: where a checkpoint computes them anew, torch refuses to do so a second time.
            saved = ctx.saved_tensors
            found = NotImplemented if differentiable_backward is None else differentiable_backward(ctx, saved, *grads)
            if found is NotImplemented:
                args = derivatives.remembered(ctx, saved) if given is None else given(ctx, saved)
                found = derivatives.differentiable_gradients(name, meaning, ctx, args, grads, why)
                if ctx.lengths is not None:
                    found = derivatives.in_lists(found, ctx.lengths)
            else:
                backends.warn_of_plain_torch(name, grads, why, ctx.backend)
        chosen = [found[place] for place in places]
        if has_lists:
            # No gradient of a list is one of each of its tensors.
            lengths = [ctx.lengths[place] for place in places]
            chosen = [
                [None] * length if length is not None and value is None else value
                for value, length in zip(chosen, lengths)
            ]
            chosen = derivatives.flat(chosen)
        return (*chosen, None)

    # Its name is what graphs of autograd and profiles show.
    members = {"forward": staticmethod(forward), "backward": staticmethod(every_backward)}
    function: Any = type(f"velm_{name}_", (torch.autograd.Function,), members)
    # Without the search for tensors that have outlived a transform, in Python.
    apply_plain = super(torch.autograd.Function, function).apply
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

    def record(
        values: Sequence[Any],
        backend: str,
        kind: list[Any] | None = None,
        arguments: Arguments | None = None,
        keyset: torch._C.DispatchKeySet | None = None,
    ) -> Any:
        chosen = [values[place] for place in places]
        if has_lists:
            chosen = derivatives.flat(chosen)
        # What the function need not look at: autograd passes on what is no tensor.
        call = values, backend, kind, arguments, keyset
        if keyset is not None:
            return function.apply(*chosen, call)
        for value in chosen:
            if value is not None and isinstance(value, torch.Tensor) and is_wrapped(value):
                return function.apply(*chosen, call)
        return apply_plain(*chosen, call)

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if derivatives.other_modes():
            why = derivatives.why_meaning(args)
            if why is not None:
                return derivatives.by_meaning(name, meaning, args[:-1], why, args[-1])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return record(args[:-1], args[-1], keyset=keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)
    direct.declare_autograd(name, record)
