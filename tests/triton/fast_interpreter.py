"""Makes Triton's interpreter several times faster, for tests. A pytest plugin: `-p tests.triton.fast_interpreter`.

Nearly all time of a small test is Python's, spent around the operations of numpy. What a kernel computes stays the
same:

- The interpreter replaces the functions of `triton.language` anew at every call from one kernel function to another. A
  nested call finds them replaced already, so that this is skipped there. What a launch replaced is put back when it
  ends.
- Every sum, difference and product of integers is computed a second time in 64 bits and compared with the range of its
  type, for an assertion that is made only where `InterpreterOptions.debug` is set.
- Types of blocks and of results, and what belongs to a shape, are made once and not for every value.
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
_computation_type = TritonSemantic.computation_type_impl
_new_block_type = core.block_type.__init__
_equal = core.dtype.__eq__
_unwrap = core._unwrap_if_constexpr
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


# By the sizes: as a type has them, their product, how they are written, and what a value has of them.
_shapes: dict[tuple[int, ...], tuple[Any, int, str, tuple[Any, Any]]] = {}
_OF_SCALAR = core.tuple([]), core.constexpr(1)


def _block_type_of_shape(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    known = _shapes.get(sizes)
    if known is None:
        _new_block_type(self, element_ty, shape)
        of_value = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(self.numel)
        known = _shapes[sizes] = self.shape, self.numel, str(self.shape), of_value
    self.element_ty = element_ty
    self.shape, self.numel, written, self.of_value = known
    self.name = f"<{written}, {element_ty}>"


def _tensor_of_type(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = type.of_value if type.is_block() else _OF_SCALAR


def _broadcast_what_differs(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
    of_left, of_right = left.type, right.type
    if not of_left.is_block() and not of_right.is_block():
        return left, right
    if not of_left.is_block() or not of_right.is_block() or len(of_left.shape) != len(of_right.shape):
        return _broadcast(self, left, right)
    a, b = of_left.shape.values, of_right.shape.values
    if a == b:
        return left, right
    sizes = [y if x == 1 else x for x, y in zip(a, b, strict=True)]
    if any(y not in (1, size) for y, size in zip(b, sizes, strict=True)):
        return _broadcast(self, left, right)
    if a != sizes:
        left = self.make_tensor(
            self.builder.create_broadcast(left.handle, sizes), core.block_type(of_left.scalar, sizes)
        )
    if b != sizes:
        right = self.make_tensor(
            self.builder.create_broadcast(right.handle, sizes), core.block_type(of_right.scalar, sizes)
        )
    return left, right


def _same_type(self: Any, other: Any) -> bool:
    return self is other or _equal(self, other)


_WRAPS_NOTHING = frozenset([core.tensor, int, float, bool, str, type(None), np.ndarray])


def _unwrap_at_once(o: Any) -> Any:
    kind = type(o)
    if kind is core.constexpr:
        return o.value
    return o if kind in _WRAPS_NOTHING else _unwrap(o)


_types: dict[tuple[Any, ...], Any] = {}


def _known_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
    key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
    found = _types.get(key)
    if found is None:
        found = _types[key] = _computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
    return found


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _cached_np_dtype
TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow_for_an_assertion
TritonSemantic.broadcast_impl_value = _broadcast_what_differs
TritonSemantic.computation_type_impl = _known_type
core.block_type.__init__ = _block_type_of_shape
core.tensor.__init__ = _tensor_of_type
core.dtype.__eq__ = _same_type
core._unwrap_if_constexpr = _unwrap_at_once
