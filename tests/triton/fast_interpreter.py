"""Makes Triton's interpreter several times faster, for tests. A pytest plugin: `-p tests.triton.fast_interpreter`.

The interpreter replaces the functions of `triton.language` anew at every call from one kernel function to another. A
nested call finds them replaced already, so that the work (most of the time of a small test) is skipped there. What a
launch replaced is put back when it ends.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_replaced: set[str] = set()
_scopes: list[Any] = []


class _Launch:
    def restore(self) -> None:
        while _scopes:
            _scopes.pop().restore()
        _replaced.clear()


def _patch_once(fn: Any) -> Any:
    modules = {
        value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
    }
    if not modules <= _replaced:
        _scopes.append(_patch(fn))
        _replaced.update(modules)
    return _Launch()


interpreter._patch_lang = _patch_once
