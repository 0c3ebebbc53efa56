"""Declares the operators of namespace ``velm``: one schema each, implemented by whichever backend is selected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from velm_kernels import backends
from velm_kernels.backends import Arguments, cpu, cuda

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
) -> None:
    """Declares ``velm::name`` with ``arguments`` and a trailing ``str backend``, and its C++ counterparts without.

    ``fake`` gives the results' shapes, dtypes and strides. ``check`` sees the arguments before every call and may read
    values: it runs inside the operator, so that torch.compile never traces it.
    """
    schema = f"{name}({arguments}, str backend) -> {returns}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    cpu.declare(f"{name}({arguments}) -> {returns}")
    cuda.declare(f"{name}({arguments}) -> {returns}")
    names = [argument.name for argument in torch._C.parse_schema(f"velm::{schema}").arguments][:-1]

    def run(*args: Any) -> Any:
        *values, backend = args
        bound = dict(zip(names, values, strict=True))
        if check is not None:
            check(bound)
        # Of what is made inside, autograd would take a transposed result for a view of a tensor that it has not seen,
        # and the user could not change it in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return backends.run(name, bound, values, backend)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"velm::{name}", fake, lib=LIBRARY)


def register_autograd(
    name: str, backward: Callable[..., tuple[Any, ...]], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """Makes ``backward`` the derivative of ``velm::name``, whose arguments are tensors and scalars, no lists.

    ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``, and so is what happens.
    Torch's own, in a call that records gradients, looks through the schema for defaults that the caller left out: for
    the twenty arguments of attention that takes ten times as long as all the rest, and these operators have none.
    """
    operator: torch._ops.OpOverload = getattr(torch.ops.velm, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            result = operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            setup_context(ctx, tuple(inputs), result)
        return result

    def backward_and_keyset(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return (*backward(ctx, *grads), None)

    # Its name is what graphs of autograd and profiles show.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_keyset)}
    function: Any = type(f"velm_{name}_", (torch.autograd.Function,), members)

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)
