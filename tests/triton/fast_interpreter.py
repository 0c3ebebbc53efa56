"""Makes Triton's interpreter several times faster, for tests. A pytest plugin: `-p tests.triton.fast_interpreter`.

Nearly all time of a small test is Python's, spent around the operations of numpy. What a kernel computes stays the
same:

- The interpreter replaces the functions of `triton.language` anew at every call from one kernel function to another. A
  nested call finds them replaced already, so that this is skipped there. What a launch replaced is put back when it
  ends.
- Every sum, difference and product of integers is computed a second time in 64 bits and compared with the range of its
  type, for an assertion that is made only where `InterpreterOptions.debug` is set.
- Types of blocks, and what belongs to a shape, are made once and not for every value.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_np_dtype = interpreter._get_np_dtype
_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_broadcast = TritonSemantic.broadcast_impl_value
_new_block_type = core.block_type.__init__
_replaced: set[str] = set()
_scopes: list[Any] = []
_modules: dict[int, set[str]] = {}


class _Launch:
    def restore(self) -> None:
        while _scopes:
            _scopes.pop().restore()
        _replaced.clear()


def _patch_once(fn: Any) -> Any:
    # By the dictionary of a module, which stays where it is.
    modules = _modules.get(id(fn.__globals__))
    if modules is None:
        modules = _modules[id(fn.__globals__)] = {
            value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
        }
    if not modules <= _replaced:
        _scopes.append(_patch(fn))
        _replaced.update(modules)
    return _Launch()


_np_dtypes: dict[str, np.dtype] = {}


def _cached_np_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
    if isinstance(scalar, core.pointer_type):
        return np.dtype(np.uint64)
    found = _np_dtypes.get(scalar.name)
    if found is None:
        found = _np_dtypes[scalar.name] = _np_dtype(scalar)
    return found


def _check_overflow_for_an_assertion(self: Any, *arguments: Any) -> None:
    if self.builder.options.debug:
        _check_overflow(self, *arguments)


# By the sizes: as a type has them, as a value has them, their product, and how they are written.
_shapes: dict[tuple[int, ...], tuple[Any, Any, int, str]] = {}
_NO_SIZES = core.tuple([])


def _block_type_of_shape(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    known = _shapes.get(sizes)
    if known is None:
        _new_block_type(self, element_ty, shape)
        _shapes[sizes] = self.shape, core.tuple([core.constexpr(size) for size in sizes]), self.numel, str(self.shape)
        return
    self.element_ty = element_ty
    self.shape, _, self.numel, written = known
    self.name = f"<{written}, {element_ty}>"


def _tensor_of_type(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    if type.is_block():
        _, self.shape, numel, _ = _shapes[tuple(type.shape.values)]
        self.numel = core.constexpr(numel)
    else:
        self.shape, self.numel = _NO_SIZES, core.constexpr(1)


def _broadcast_what_differs(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
    of_left, of_right = left.type, right.type
    if of_left.is_block() and of_right.is_block():
        if of_left.shape.values == of_right.shape.values:
            return left, right
    elif not of_left.is_block() and not of_right.is_block():
        return left, right
    return _broadcast(self, left, right)


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _cached_np_dtype
TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow_for_an_assertion
TritonSemantic.broadcast_impl_value = _broadcast_what_differs
core.block_type.__init__ = _block_type_of_shape
core.tensor.__init__ = _tensor_of_type
