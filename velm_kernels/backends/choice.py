"""A choice for the calls made inside of a context, in one thread or asyncio task and in no other."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator

import torch


class _OfThread(threading.local):
    # Not a default of the class: torch.compile would not notice a value that comes to hide it.
    def __init__(self) -> None:
        self.value: str | None = None


class Choice:
    """A name, or None outside of every :meth:`use`. ``name`` is that of the context variable behind it."""

    def __init__(self, name: str) -> None:
        self._variable: contextvars.ContextVar[str | None] = contextvars.ContextVar(name, default=None)
        # The same as :meth:`get` where torch.compile is known not to trace.
        self.get_untraced = self._variable.get
        # torch.compile can neither trace a context variable nor notice that it changed. What is kept for each thread it
        # reads and guards, so that a function compiled for one choice is compiled anew for another.
        self._traced = _OfThread()

    def get(self) -> str | None:
        if torch.compiler.is_compiling():
            return self._traced.value
        return self._variable.get()

    @contextlib.contextmanager
    def use(self, value: str) -> Iterator[None]:
        before, self._traced.value = self._traced.value, value
        token = None if torch.compiler.is_compiling() else self._variable.set(value)
        try:
            yield
        finally:
            if token is None:
                self._traced.value = before
            else:
                # Tasks of one thread may leave in another order than they entered.
                self._variable.reset(token)
                self._traced.value = self._variable.get()
