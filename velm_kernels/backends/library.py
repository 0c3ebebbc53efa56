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


def declare(
    name: str,
    arguments: str,
    returns: str,
    *,
    fake: Callable[..., Any],
    check: Callable[[Arguments], None] | None = None,
    kernel: Sequence[object] | None = None,
) -> None:
    """Declares ``velm::name`` with ``arguments`` and a trailing ``str backend``, and its C++ counterparts without.
    These return the same, or, where ``kernel`` lists their arguments, fill the last of them and return nothing.

    What is the size of a tensor among the arguments is a ``SymInt``.

    ``fake`` gives the results' shapes, dtypes and strides. ``check`` sees the arguments before every call and may read
    values: it runs inside the operator, so that torch.compile never traces it.
    """
    schema = f"{name}({arguments}, str backend) -> {returns}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Sizes among the arguments: known by name only to who compiles or exports, numbers by the time a library is called.
    of_library = f"{name}({arguments}) -> {returns}"
    if kernel is not None:
        of_library = f"{name}({', '.join(map(str, kernel))}) -> ()"
    of_library = of_library.replace("SymInt ", "int ")
    cpu.declare(of_library)
    cuda.declare(of_library)
    names = [argument.name for argument in torch._C.parse_schema(f"velm::{schema}").arguments][:-1]
    direct.declare(name, names, check)

    def run(*args: Any) -> Any:
        *values, backend = args
        return direct.run_values(name, values, backend)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"velm::{name}", fake, lib=LIBRARY)
    derivatives.register_vmap(LIBRARY, name)


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    meaning: Callable[..., Any],
    differentiable_backward: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Makes ``backward`` the derivative of ``velm::name``, and ``meaning`` what its other derivatives are those of.

    ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``, and so is what happens; for an
    argument that is a list ``ctx.needs_input_grad`` has an element for each of the list's. Torch's own, in a call that
    records gradients, looks through the schema for defaults that the caller left out: for the twenty arguments of
    attention that takes ten times as long as all the rest, and these operators have none.

    ``meaning`` takes the arguments of the operator without ``backend`` and returns its results, by plain torch alone:
    a pure function, every result new, that torch can differentiate to any order; results without a derivative are
    detached. It serves where a derivative is asked for that no kernel has (:mod:`velm_kernels.backends.derivatives`).
    Gradients that are differentiated again are those of ``meaning`` at the tensors that ``setup_context`` saved, and
    at zeros in place of the others: none of the gradients depends on them, or backward would need them. Where backward
    uses something else in their place, such as a result, ``differentiable_backward`` is what ``backward`` is, in plain
    torch, or returns NotImplemented.
    """
    operator: torch._ops.OpOverload = getattr(torch.ops.velm, name).default
    has_lists = any(isinstance(argument.type, torch.ListType) for argument in operator._schema.arguments)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, lengths, keyset = args
        flat, inputs = inputs, inputs if lengths is None else derivatives.in_lists(inputs, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                # Not called by the dispatcher, because nobody listens to it.
                result = direct.run_values(name, inputs[:-1], inputs[-1])
            else:
                result = operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            setup_context(ctx, tuple(inputs), result)
        derivatives.remember(ctx, flat, lengths)
        return result

    def every_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        why = derivatives.why_not_backward(grads)
        if why is None:
            found = backward(ctx, *grads)
        elif differentiable_backward is None or (found := differentiable_backward(ctx, *grads)) is NotImplemented:
            return (*derivatives.differentiable_gradients(name, meaning, ctx, grads, why), None, None, None)
        else:
            backends.warn_of_plain_torch(name, grads, why, ctx.chosen_backend)
        return (*(found if ctx.lengths is None else derivatives.flat(found)), None, None)

    # Its name is what graphs of autograd and profiles show.
    members = {"forward": staticmethod(forward), "backward": staticmethod(every_backward)}
    function: Any = type(f"velm_{name}_", (torch.autograd.Function,), members)

    def record(*args: Any, keyset: torch._C.DispatchKeySet | None = None) -> Any:
        if not has_lists:
            return function.apply(*args, None, keyset)
        lengths = [len(value) if isinstance(value, (list, tuple)) else None for value in args]
        return function.apply(*derivatives.flat(args), lengths, keyset)

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if derivatives.other_modes():
            why = derivatives.why_meaning(args)
            if why is not None:
                return derivatives.by_meaning(name, meaning, args[:-1], why, args[-1])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return record(*args, keyset=keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)
    direct.declare_autograd(name, record)
