"""Declares the operators of namespace ``velm``: one schema each, implemented by whichever backend is selected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from velm_kernels.backends import Arguments, cpu, select

LIBRARY = torch.library.Library("velm", "DEF")


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Records gradients inside the implementation of an operator, where torch may have switched that off.

    Under a dispatch mode (a flop counter, a profiler) operators run below autograd, and ``torch.enable_grad`` alone
    would change nothing.
    """
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality, False)
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
    names = [argument.name for argument in torch._C.parse_schema(f"velm::{schema}").arguments][:-1]

    def run(*args: Any) -> Any:
        *values, backend = args
        bound = dict(zip(names, values, strict=True))
        if check is not None:
            check(bound)
        return select(name, bound, backend).call(*values)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"velm::{name}", fake, lib=LIBRARY)
