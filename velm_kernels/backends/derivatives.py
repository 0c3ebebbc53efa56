"""The derivatives that no kernel computes, from the written meaning of the operators.

Kernels compute an operator and its gradients. Gradients that are to be differentiated again (``create_graph=True``),
forward-mode derivatives (``torch.func.jvp``, dual tensors) and gradients under the transforms of ``torch.func`` are
those of the operator's meaning instead: a pure function in plain torch, which torch differentiates to any order and in
any mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from velm_kernels import checks
from velm_kernels.backends import warn_of_plain_torch

in_functorch = torch._C._functorch.peek_interpreter_stack

# From the arguments of an operator without ``backend`` to its results.
Meaning = Callable[..., Any]

AGAIN = "a gradient that is differentiated again, as with create_graph=True, has no kernel"
FORWARD = "a forward-mode derivative has no kernel"
TRANSFORMED = "a gradient under the transforms of torch.func has no kernel"
BATCHED = "a batch of gradients, as with is_grads_batched=True, has no kernel"


class Absent(NamedTuple):
    """An argument that backward did not keep. No gradient that is wanted depends on its values, only on these."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """Zeros that take no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


class Kept(NamedTuple):
    """An argument that backward kept: its place among the saved tensors."""

    place: int


def flat(args: Sequence[Any]) -> list[Any]:
    """``args`` with the elements of lists in their place."""
    return [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def in_lists(args: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Undoes :func:`flat`; ``lengths`` has None for what is no list."""
    left = iter(args)
    return [next(left) if length is None else [next(left) for _ in range(length)] for length in lengths]


def other_modes() -> bool:
    """Whether derivatives may be asked for that kernels do not have, beside second ones. Every call asks this first.

    What torch.compile made of a function enters a level of forward mode without saying so in ``forward_ad``; then a
    transform is active, or a mode that traces."""
    return in_functorch() is not None or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether a forward-mode derivative is asked for with respect to one of ``args``."""
    if not other_modes():
        return False
    tensors = (value for value in flat(args) if isinstance(value, Tensor) and value.is_floating_point())
    # Levels do not nest: there is none but the first.
    return any(torch._VF._unpack_dual(tensor, level=0).tangent is not None for tensor in tensors)


def wanted(*tensors: Tensor) -> bool:
    """Whether any derivative may be asked for with respect to one of ``tensors``, of whatever kind."""
    if other_modes():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_meaning(args: Sequence[Any]) -> str | None:
    """Why a call with ``args`` is computed by the meaning: a derivative is asked for that no kernel has. Else None.

    What torch registers for an operator sees neither: it would give zeros, or stop."""
    if in_functorch() is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return TRANSFORMED
    return FORWARD if has_tangent(args) else None


def why_not_backward(grads: Sequence[Tensor | None]) -> str | None:
    """Why the kernels of backward cannot serve the gradients ``grads`` of the results, or None."""
    # Recording gradients is on in backward only where they are to be differentiated.
    if torch.is_grad_enabled():
        return AGAIN
    if has_tangent(grads):
        return FORWARD
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    return BATCHED if any(grad is not None and is_batch(grad) for grad in grads) else None


def by_meaning(operator: str, meaning: Meaning, args: Sequence[Any], why: str, backend: str) -> Any:
    """The results of ``operator``, differentiable by torch."""
    warn_of_plain_torch(operator, args, why, backend)
    with _no_autocast(args):
        return meaning(*args)


def _no_autocast(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Arithmetic in float32 at least, also where the caller has switched autocast on."""
    return checks.without_autocast(next(value.device for value in flat(args) if isinstance(value, Tensor)))


def remember(ctx: Any, args: Sequence[Any]) -> None:
    """Keeps with ``ctx`` what :func:`remembered` makes the arguments from, but no tensor that is not saved for backward
    already. ``args`` are those of the operator, the elements of lists in their place."""
    places = {id(tensor): place for place, tensor in enumerate(ctx.to_save or ())}
    arguments = list(args)
    for at, value in enumerate(arguments):
        # Most are none, and every call that records a gradient comes through here.
        if value.__class__ not in _SCALARS and isinstance(value, Tensor):
            arguments[at] = _remembered(value, places)
    ctx.arguments = arguments


_SCALARS = frozenset((bool, int, float, str, type(None)))
# Made beforehand, since every call that records a gradient needs some.
_KEPT = tuple(map(Kept, range(32)))


def _remembered(value: Tensor, places: dict[int, int]) -> Kept | Absent:
    place = places.get(id(value))
    if place is None:
        return Absent(value.shape, value.dtype, value.device)
    return _KEPT[place] if place < len(_KEPT) else Kept(place)


def remembered(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """The arguments that :func:`remember` was given, with zeros in place of those that are not among the tensors
    ``saved``."""
    args: list[Any] = []
    for value in ctx.arguments:
        if isinstance(value, Kept):
            value = saved[value.place]
        elif isinstance(value, Absent):
            value = value.stand_in()
        args.append(value)
    return args


def differentiable_gradients(
    operator: str, meaning: Meaning, ctx: Any, args: list[Any], grads: Sequence[Tensor | None], why: str
) -> list[Tensor | None]:
    """The gradients of the arguments, in a list, from those of the results. Where gradients are recorded, they are
    connected to both: to what was saved and to ``grads``. ``args``, the elements of lists in their place, are changed.
    """
    connected = torch.is_grad_enabled()
    wanted = [place for place, want in enumerate(ctx.needs) if want]
    with torch.enable_grad(), _no_autocast(args):
        for place in wanted:
            # One tensor may be several arguments, and each has a gradient of its own.
            tensor = args[place] if args[place].requires_grad else args[place].detach().requires_grad_()
            args[place] = tensor.view_as(tensor)
        given = args if ctx.lengths is None else in_lists(args, ctx.lengths)
        results = by_meaning(operator, meaning, given, why, ctx.backend)
        results = flat(results if isinstance(results, (tuple, list)) else (results,))
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                [args[place] for place in wanted],
                [grad for _, grad in pairs],
                create_graph=connected,
                materialize_grads=True,
            )
    gradients: list[Tensor | None] = [None] * len(args)
    for place, gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return gradients


def register_vmap(library: torch.library.Library, name: str) -> None:
    """Makes ``torch.vmap`` call ``velm::name`` once for every entry, on whichever backend serves that call."""
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def loop(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        values, spec = pytree.tree_flatten(args)
        dims = pytree.tree_flatten(in_dims)[0]
        calls = []
        # Of no entries at all, the shapes of one tell those of the result.
        for entry in range(max(info.batch_size, 1)):
            taken = [
                value if dim is None else value.select(dim, entry) if info.batch_size else _one_of(value, dim)
                for value, dim in zip(values, dims, strict=True)
            ]
            calls.append(pytree.tree_flatten(operator(*pytree.tree_unflatten(taken, spec))))
        stacked = [
            torch.stack(parts)[: info.batch_size] for parts in zip(*(results for results, _ in calls), strict=True)
        ]
        return pytree.tree_unflatten(stacked, calls[0][1]), pytree.tree_unflatten([0] * len(stacked), calls[0][1])

    torch.library.register_vmap(f"{library.ns}::{name}", loop, lib=library)


def _one_of(value: Tensor, dim: int) -> Tensor:
    return value.new_zeros([size for place, size in enumerate(value.shape) if place != dim % value.dim()])


def readable(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` may decide what is computed: they are there, and one set of numbers, not another
    for each entry of a ``torch.vmap``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    # Subclasses and modes are what compilers trace with.
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    return plain and torch._C._len_torch_dispatch_stack() == 0
