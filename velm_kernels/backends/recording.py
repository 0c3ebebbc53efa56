"""What a call that records a gradient keeps, and how backward is called with it.

On small tensors such a call costs little but this. What follows from the declaration, and from which gradients are
wanted, is found out at the first call that wants these and kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels.backends.derivatives import Absent, flat, in_lists

Condition = Callable[[Any], bool]
# Whether backward may be called again with what was saved: what torch's compiler asks before it reuses that.
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_hooks_of_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


class Kept(NamedTuple):
    """An argument or a result that backward reads.

    Attributes:
        name: of it.
        of: the arguments whose gradient is computed from it; None for a result that is kept whichever are wanted.
        condition: whether it is kept, from the arguments of forward by name; asked where one of these is wanted.
        is_list: of tensors.
    """

    name: str
    of: tuple[str, ...] | None
    condition: Condition | None
    is_list: bool


class Declared(NamedTuple):
    """What :class:`Recording` knows of an operator.

    Attributes:
        names: of the arguments.
        results: names of the results.
        tensors: places of the arguments that are tensors or lists of them.
        kept: arguments and results that backward reads, in its order.
        settings: places of those that are no tensors and that backward is called with.
        remembers: from the arguments by name, what backward is called with before the settings.
        differentiable, passed_on, only_again, may_be_absent, without_gradient, may_lack: as of ``Operator``.
        lists: names of arguments that are lists of tensors.
        incoming: brings the gradient of a result into the memory that kernels rely on; None for a contiguous one.
        by_name: the arguments of forward by name.
        saved_by_name: what backward is called with behind the gradients, by name.
        run: backward, called with gradients, what was kept, what is remembered, settings, which gradients are wanted
            and the backend.
        run_again: the same with the gradients of ``only_again`` before all others, in plain torch; None where there is
            no such form.
        in_place: the same as ``run`` without the backend, on the memory of results that were kept; gives None where it
            cannot. None where there is no such form.
    """

    names: Sequence[str]
    results: Sequence[str]
    tensors: Sequence[int]
    kept: Sequence[Kept]
    settings: Sequence[int]
    remembers: Sequence[Callable[[Any], Any]]
    differentiable: Sequence[str]
    passed_on: Sequence[str]
    only_again: Sequence[str]
    may_be_absent: Sequence[str]
    without_gradient: Sequence[str]
    may_lack: Sequence[str]
    lists: frozenset[str]
    incoming: Callable[[Tensor, Any], Tensor] | None
    by_name: Callable[[Sequence[Any]], Any]
    saved_by_name: Callable[[Sequence[Any]], Any]
    run: Callable[..., Any]
    run_again: Callable[..., Any] | None
    in_place: Callable[..., Any] | None


class Plan(NamedTuple):
    """What follows from which gradients are wanted.

    Attributes:
        none: a gradient of None for every argument and the backend, of a list for each of its tensors.
        places: of what is kept among arguments, backend and results; None for what no wanted gradient needs.
        keep: takes what is kept from these.
        conditions: (place in what is kept, condition) where there is one.
        wanted: how backward is told which gradients to compute; empty where it has one alone.
        any: whether it is to compute one.
        absent: places of the tensors among the arguments that are not kept.
        passed_on: places of the arguments whose gradient is that of the result.
        gradients: (place in what backward returns, place of the argument, which of a list or None).
    """

    none: Sequence[Any]
    places: Sequence[int | None]
    keep: Callable[[Sequence[Any]], Sequence[Any]]
    conditions: Sequence[tuple[int, Condition]]
    wanted: Sequence[Any]
    any: bool
    absent: Sequence[int | None]
    passed_on: Sequence[int]
    gradients: Sequence[tuple[int, int, Sequence[bool] | None]]


class Recording:
    """``setup_context`` and ``backward`` of :func:`velm_kernels.backends.library.register_autograd`."""

    def __init__(self, declared: Declared) -> None:
        self._of = of = declared
        no_gradient = (*of.without_gradient, *of.only_again)
        self._with_gradient = [place for place, name in enumerate(of.results) if name not in no_gradient]
        # Of those with a gradient, which backward takes zeros of in place of None.
        self._filled = [of.results[place] not in of.may_lack for place in self._with_gradient]
        self._fills = any(self._filled)
        self._settings = _those_at(of.settings)
        self._one_result = len(of.results) == 1
        # Kept ones that backward takes whether or not they were asked for.
        self._may_be_absent = [
            place for place, kept in enumerate(of.kept) if kept.of is None and kept.name in of.may_be_absent
        ]
        self._asks = bool(of.remembers) or any(kept.condition is not None for kept in of.kept)
        self._without_gradient = tuple(of.results.index(name) for name in of.without_gradient)
        self._conditions = {kept.name: kept.condition for kept in of.kept if kept.condition is not None}
        self._plans: dict[Any, Plan] = {}

    def _plan(self, ctx: Any) -> Plan:
        key = ctx.needs if ctx.lengths is None else (ctx.needs, ctx.lengths)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planned(ctx.needs, ctx.lengths)
        return plan

    def _planned(self, needs: Sequence[bool], lengths: Sequence[int | None] | None) -> Plan:
        of = self._of
        wanted = dict(zip(of.names, needs if lengths is None else in_lists(needs, lengths), strict=True))
        needed = {name: any(want) if isinstance(want, list) else want for name, want in wanted.items()}
        places: list[int | None] = []
        conditions = []
        for kept in of.kept:
            is_needed = kept.of is None or any(needed[name] for name in kept.of)
            # Results stand behind the arguments and the backend.
            place = of.names.index(kept.name) if kept.name in of.names else self._place_of_result(kept.name)
            if is_needed and kept.condition is not None:
                conditions.append((len(places), kept.condition))
            places.append(place if is_needed else None)
        bits = sum(1 << bit for bit, name in enumerate(of.differentiable) if needed[name])
        lists = [wanted[name] for name in of.differentiable if name in of.lists]
        return Plan(
            none=[
                None if length is None else [None] * length for length in (*(lengths or (None,) * len(of.names)), None)
            ],
            places=places,
            keep=_those_at(places),
            conditions=conditions,
            wanted=[*([bits] if len(of.differentiable) > 1 else []), *lists],
            any=bits != 0,
            absent=[place for place in of.tensors if place not in places],
            passed_on=[of.names.index(name) for name in of.passed_on if needed[name]],
            gradients=[
                (place, of.names.index(name), wanted[name] if name in of.lists else None)
                for place, name in enumerate(of.differentiable)
                if needed[name]
            ],
        )

    def _place_of_result(self, name: str) -> int:
        return len(self._of.names) + 1 + self._of.results.index(name)

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        of = self._of
        ctx.plan = plan = self._plan(ctx)
        made = output if output.__class__ is tuple else (output,)
        everything = (*inputs, *made)
        saved, settings, absent, a = plan.keep(everything), self._settings(inputs), plan.absent, None
        if self._asks:
            a = of.by_name(inputs[:-1])
            for place, condition in plan.conditions:
                if not condition(a):
                    saved = [*saved[:place], None, *saved[place + 1 :]]
                    absent = (*absent, plan.places[place])
            if of.remembers:
                settings = [*[value(a) for value in of.remembers], *settings]
        ctx.settings = settings
        if of.in_place is not None:
            # Hooks of saved tensors may give what others hold.
            ctx.is_alone = ctx.is_direct and _hooks_of_saved_tensors(True) is None
        for place in self._may_be_absent:
            if saved[place] is None:
                saved = [*saved[:place], made[0].new_empty((0,)), *saved[place + 1 :]]
        if of.lists:
            saved = [[] if value is None and kept.is_list else value for kept, value in zip(of.kept, saved)]
            ctx.saved_lengths = [len(value) if isinstance(value, (list, tuple)) else None for value in saved]
            saved = flat(saved)
        elif absent:
            ctx.absent = {
                place: Absent(value.shape, value.dtype, value.device)
                for place in absent
                if place is not None and (value := everything[place]) is not None
            }
        ctx.save_for_backward(*saved)
        if not self._one_result:
            self._setup_results(ctx, made, a)

    def _setup_results(self, ctx: Any, made: Sequence[Any], a: Any) -> None:
        ctx.set_materialize_grads(False)
        without = self._without_gradient
        for name in self._of.only_again:
            # What nothing was saved in has none either.
            if name in self._conditions and not self._conditions[name](a):
                without = (*without, self._of.results.index(name))
        if without and (given := [made[place] for place in without if made[place] is not None]):
            ctx.mark_non_differentiable(*given)
        if self._fills:
            ctx.made = [
                (made[place].shape, made[place].dtype) if filled else None
                for place, filled in zip(self._with_gradient, self._filled)
            ]

    def arguments(self, ctx: Any, saved: Sequence[Any]) -> list[Any]:
        """The arguments of a recorded call, none of which is a list, with zeros for those that are not ``saved``."""
        of = self._of
        args: list[Any] = [None] * len(of.names)
        for place, value in zip(ctx.plan.places, saved):
            if place is not None and place < len(args):
                args[place] = value
        for place, value in zip(of.settings, ctx.settings[len(of.remembers) :], strict=True):
            args[place] = value
        for place, absent in getattr(ctx, "absent", {}).items():
            args[place] = absent.stand_in()
        return args

    def backward(self, ctx: Any, *grads: Tensor | None) -> Any:
        return self._differentiate(ctx, grads)

    def backward_again(self, ctx: Any, saved: Sequence[Any], *grads: Tensor | None) -> Any:
        """The same in plain torch from the tensors ``saved``, or NotImplemented."""
        return self._differentiate(ctx, grads, saved)

    def _differentiate(self, ctx: Any, grads: Sequence[Tensor | None], again: Sequence[Any] | None = None) -> Any:
        of, plan = self._of, ctx.plan
        gradients = list(plan.none)
        chosen = list(grads) if self._one_result else [grads[place] for place in self._with_gradient]
        for place in plan.passed_on:
            gradients[place] = chosen[0]
        only_again: dict[str, Tensor | None] = {}
        of_kept = False
        if of.only_again:
            only_again = {f"grad_{name}": grads[of.results.index(name)] for name in of.only_again}
            of_kept = any(grad is not None for grad in only_again.values())
        like = next((grad for grad in chosen if grad is not None), None)
        if not plan.any or (like is None and not of_kept):
            return gradients
        saved = ctx.saved_tensors if again is None else again
        if of.lists:
            saved = in_lists(saved, ctx.saved_lengths)
        settings = ctx.settings
        a = None if of.incoming is None else of.saved_by_name((*saved, *settings))
        for place, grad in enumerate(chosen):
            if grad is None:
                if of_kept or not self._filled[place]:
                    continue
                assert like is not None
                shape, dtype = ctx.made[place]
                grad = like.new_zeros(shape, dtype=dtype)
            chosen[place] = grad.contiguous() if of.incoming is None else of.incoming(grad, a)
        if again is not None or of_kept:
            assert of.run_again is not None
            found = of.run_again(only_again, *chosen, *saved, *settings, *plan.wanted, ctx.backend)
            if found is NotImplemented:
                return found
        else:
            found = None
            # The reference computes from the arguments, whatever was made of them.
            in_place = of.in_place
            if in_place is not None and ctx.is_alone and ctx.backend != "reference" and not _graph_is_kept():
                found = in_place(*chosen, *saved, *settings, *plan.wanted)
            if found is None:
                found = of.run(*chosen, *saved, *settings, *plan.wanted, ctx.backend)
        if found.__class__ is not tuple:
            found = (found,)
        for place, of_argument, which in plan.gradients:
            gradient = found[place]
            if which is not None:
                gradient = [value if one else None for one, value in zip(which, gradient, strict=True)]
            gradients[of_argument] = gradient
        return gradients


def _those_at(places: Sequence[int | None]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the values at ``places`` from a sequence, and None for a place that is None."""
    if len(places) > 1 and None not in places:
        return operator.itemgetter(*places)
    return lambda values: [None if place is None else values[place] for place in places]
