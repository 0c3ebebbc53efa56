"""From one declaration of an operator follow its schemas, fake results, autograd, reference backend and dispatch.

An operator is a forward and, where it has gradients, a backward::

    OPERATOR = Operator(
        "film",
        "Tensor x, Tensor gamma, Tensor beta, bool regions_contiguous, float gamma_offset",
        shapes=lambda a: empty_like_rows(a.x, a.regions_contiguous),
        reference=meaning,
        differentiable=("x", "gamma", "beta"),
        saves={"x": ("gamma",), "gamma": ("x",)},
        triton="fusion.film.triton",
    )

declares ``velm::film_forward`` and ``velm::film_backward`` to torch. These are functions: they give new results. The
kernels behind them, in whatever language, fill memory that they are given, which is allocated here and nowhere else::

    film_forward(x, gamma, beta, regions_contiguous, gamma_offset, out)
    film_backward(grad, x, gamma, regions_contiguous, gamma_offset, grad_x, grad_gamma, grad_beta)

A kernel is given None for a gradient that is not wanted, and for what is saved for no gradient that is wanted. For an
argument that is a list of tensors it is given a list: of the saved ones, empty where no gradient needs them, and of the
gradients, with None for those that are not wanted. What torch sees is functional because placements of DTensors,
``torch.vmap`` and compilers that keep mutation (all but inductor) take it as it is; an operator that writes on its
arguments they would copy around or refuse.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from velm_kernels import backends
from velm_kernels.backends import Arguments, direct, flops, library
from velm_kernels.backends.derivatives import flat
from velm_kernels.backends.kernels import Reasons, compositions, givers, kernels, register
from velm_kernels.backends.recording import Declared, Kept, Recording
from velm_kernels.backends.schemas import Parameter, filled_by_kernel, parameters
from velm_kernels.layout import empty_like

Empty = Callable[[Any], Any]


class Operator:
    """Declares ``velm::<name>_forward`` and, with ``differentiable``, ``velm::<name>_backward``.

    Args:
        name: of the operator, in the words of its public function.
        arguments: of forward, as torch writes schemas: tensors in canonical form and settings.
        shapes: the uninitialised results for arguments by name (``a.x``), in memory as every backend leaves them: a
            tensor, or a tuple with None for a result that was not asked for.
        reference: the meaning: from the arguments, floating point in float32 or wider, to the results in whatever
            dtype and memory. Plain torch, differentiable to any order.
        results: their names.
        may_be_absent: results that are not always asked for.
        differentiable: the arguments whose gradient a kernel computes.
        passed_on: arguments whose gradient is that of the only result, as it comes.
        without_gradient: results without one.
        only_again: results that backward reads in place of what they were computed from: nobody but gradients of
            gradients asks for theirs. ``gradients_again`` finds it as ``grad_<result>``, and takes None for the others.
        may_lack: results whose gradient backward takes as None; those of others are zeros where there is none.
        saves: for each differentiable argument, the arguments and results that its gradient is computed from; a tuple
            where that is the same for all.
        saves_only_if: arguments and results that are saved only where this says so of the arguments of forward by name;
            it is asked where a gradient needs them.
        remembers: what backward wants to know beside what is saved: ``{"SymInt tokens": lambda a: a.x.shape[1]}``.
        forward_only: settings that backward does not want to know.
        gradients: ``(values, wanted)`` -> a gradient for each differentiable argument, None where it is not wanted, in
            whatever dtype and memory; ``values`` are those of backward by name, floating point in float32 or wider.
            For a list, ``wanted`` has a list too, and so has what is returned. Without it, autograd of ``reference`` at
            what is saved, and at zeros for a differentiable argument that is not, whose gradient depends on no value of
            it (a bias); the rest that the reference reads has to be saved.
        backward: ``(values, wanted, backend)`` -> the same, made by operators that there are already, called with
            ``backend``; then there is no ``velm::<name>_backward``, and the values are those that it would have.
        gradients_again: ``gradients`` that are differentiated again, by plain torch at what is saved, or NotImplemented
            for those of ``reference``, as without it. Where backward reads a result in place of an argument.
        gradient_shapes: uninitialised gradients of arguments that are not always saved, or whose memory is not
            contiguous, from the values of backward by name; for a list from these and the place in it.
        incoming: brings the gradient of a result into the memory that kernels rely on, without it contiguous memory:
            ``(gradient, a)``, with what backward is called with behind the gradients by name.
        triton: the module with the functions ``<name>_forward`` and ``<name>_backward``.
        cpu, cuda: whether there are such kernels. Where Python stands before them, this is the module with the
            functions ``<name>_forward`` and ``<name>_backward``, whose first argument gives the library's kernel of a
            name.
        torch: the module with the functions ``<name>_forward`` and ``<name>_backward`` by torch's own operators, which
            fill what they are given too. Where it comes first, :mod:`velm_kernels.backends.order` says.
        torch_gives: in its place where torch's operators give results that would have to be copied: the module with the
            functions ``<name>_forward(values)`` and ``<name>_backward(values, wanted)``, which take values by name and
            give results and gradients in the memory of ``shapes`` and ``gradient_shapes``.
        composed: the module with the functions ``<name>_forward`` and ``<name>_backward`` made of other operators: they
            are given the backend to call these with, then the values, backward at last what is wanted, and give
            results and gradients as ``reference`` and ``gradients`` do. ``reasons`` say for which backends.
        torch_alone: there is nothing else, and whoever asks for another backend is served by torch all the same.
        reasons: by backend, why it cannot serve given arguments, beside what holds for all of its kernels.
        check: sees the arguments of forward before every call and may read values.
        flops, backward_flops: multiply-adds times 2, from the shapes of the arguments by name.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        shapes: Empty,
        reference: Callable[..., Any],
        results: tuple[str, ...] = ("out",),
        may_be_absent: tuple[str, ...] = (),
        differentiable: tuple[str, ...] = (),
        passed_on: tuple[str, ...] = (),
        without_gradient: tuple[str, ...] = (),
        only_again: tuple[str, ...] = (),
        may_lack: tuple[str, ...] = (),
        saves: Mapping[str, tuple[str, ...]] | tuple[str, ...] = (),
        saves_only_if: Mapping[str, Callable[[Any], bool]] | None = None,
        remembers: Mapping[str, Callable[[Any], Any]] | None = None,
        forward_only: tuple[str, ...] = (),
        gradients: Callable[[Any, Sequence[Any]], Sequence[Any]] | None = None,
        backward: Callable[[Any, Sequence[Any], str], Sequence[Any]] | None = None,
        gradients_again: Callable[[Any, Sequence[Any]], Any] | None = None,
        gradient_shapes: Mapping[str, Callable[..., Tensor]] | None = None,
        in_place: Callable[[Any, Sequence[Any]], Sequence[Any] | None] | None = None,
        incoming: Callable[[Tensor, Any], Tensor] | None = None,
        triton: str = "",
        cpu: bool | str = True,
        cuda: bool | str = True,
        torch: str = "",
        torch_gives: str = "",
        composed: str = "",
        torch_alone: bool = False,
        reasons: Mapping[str, Reasons] | None = None,
        check: Callable[[Arguments], None] | None = None,
        flops: Callable[[Any], int] | None = None,
        backward_flops: Callable[[Any], int] | None = None,
    ) -> None:
        self.name = name
        self.forward, self.backward = f"{name}_forward", f"{name}_backward"
        self.parameters = parameters(arguments)
        self.names = [parameter.name for parameter in self.parameters]
        self._by_name = _named(self.names)
        self._lists = frozenset(parameter.name for parameter in self.parameters if parameter.is_list)
        self.results, self._may_be_absent = results, may_be_absent
        self.differentiable, self._passed_on = differentiable, passed_on
        self._shapes, self._reference = shapes, reference
        self._without_gradient, self._only_again, self._may_lack = without_gradient, only_again, may_lack
        self._forward_only = forward_only
        self._remembers = {parameters(kind)[0]: value for kind, value in (remembers or {}).items()}
        self._gradients, self._gradient_shapes = gradients, dict(gradient_shapes or {})
        self._gradients_again, self._in_place = gradients_again, in_place
        self._saves_only_if = saves_only_if or {}
        self._saves = saves if isinstance(saves, Mapping) else dict.fromkeys(differentiable, saves)
        self._check_names()
        alone = torch_alone or bool(composed)
        given = {"triton": triton, "cpu": False if alone else cpu, "cuda": False if alone else cuda}
        given |= {"torch": torch, "torch_gives": torch_gives, "torch_alone": torch_alone, "composed": composed}
        self._declare_forward(given, reasons or {}, check, flops)
        if differentiable:
            self._know_backward()
            if backward is None:
                self._declare_backward(given, reasons or {}, backward_flops)
                self._run_backward = getattr(direct.ops, self.backward)
            else:
                self._run_backward = self._composed(backward)
            recording = Recording(self._declared(incoming))
            library.register_autograd(
                self.forward,
                recording.backward,
                setup_context=recording.setup_context,
                meaning=self.meaning,
                leaves=(*differentiable, *passed_on),
                differentiable_backward=None if gradients_again is None else recording.backward_again,
                given=None if self._lists else recording.arguments,
            )

    def _check_names(self) -> None:
        """A name that is misspelt in a declaration would be kept for no gradient, and read by no kernel."""
        tensors = [parameter.name for parameter in self.parameters if parameter.is_tensor]
        saved = self._saved()
        known = {
            "may_be_absent": (self._may_be_absent, self.results),
            "differentiable": (self.differentiable, tensors),
            "passed_on": (self._passed_on, tensors),
            "without_gradient": (self._without_gradient, self.results),
            "only_again": (self._only_again, self.results),
            "may_lack": (self._may_lack, self.results),
            "saves": ((*self._saves, *saved), (*tensors, *self.results)),
            "saves_only_if": (self._saves_only_if, saved),
            "forward_only": (self._forward_only, self.names),
            "gradient_shapes": (self._gradient_shapes, self.differentiable),
        }
        for field, (given, names) in known.items():
            for name in given:
                if name not in names:
                    raise ValueError(f"{field} of {self.name}: expected one of {', '.join(names)}, given {name!r}")

    def __repr__(self) -> str:
        return f"Operator({self.name!r})"

    def __call__(self, arguments: Arguments) -> Any:
        """The results for arguments in the order of the schema: a tensor, or a tuple of them."""
        return direct.call(self.forward, arguments)

    def serves(
        self,
        name: str,
        canonical: Callable[..., Arguments],
        plain: Callable[..., Any] | None = None,
        operator_for: Callable[[Arguments], Operator] | None = None,
    ) -> None:
        """Tells :func:`velm_kernels.explain` of the public function ``name``, which calls ``plain`` for the result of
        torch's own form where that is the faster one, else None, and then this operator, or the one that
        ``operator_for`` them gives, with ``canonical``'s arguments.
        """
        choose = None if operator_for is None else lambda arguments: operator_for(arguments).forward
        backends.register_public(name, self.forward, canonical, plain, choose)

    def named(self, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """The arguments of forward by name, and what stands behind them: what a kernel is to fill."""
        return self._by_name(args[: len(self.names)]), args[len(self.names) :]

    def named_backward(self, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """The values of backward by name, and what stands behind them: what a kernel is to fill, or what is wanted."""
        count = len(self._backward_names)
        return self._backward_by_name(args[:count]), args[count:]

    def empty(self, a: Any) -> tuple[Tensor | None, ...]:
        """Uninitialised results for arguments by name."""
        made = self._shapes(a)
        return made if isinstance(made, tuple) else (made,)

    def empty_gradients(self, a: Any, wanted: Sequence[Any]) -> list[Any]:
        """Uninitialised gradients for the values of backward by name; None where not wanted."""
        return [
            [make(a, i) if one else None for i, one in enumerate(want)]
            if want.__class__ is list
            else (make(a) if want else None)
            for make, want in zip(self._empty_gradients, wanted)
        ]

    def _empty_gradient(self, name: str) -> Callable[..., Tensor]:
        """What makes the uninitialised gradient of an argument."""
        return self._gradient_shapes.get(name) or functools.partial(_empty_like, name)

    # what torch sees

    def _declare_forward(
        self,
        given: Mapping[str, Any],
        reasons: Mapping[str, Reasons],
        check: Callable[[Arguments], None] | None,
        formula: Callable[[Any], int] | None,
    ) -> None:
        returned = "Tensor" if len(self.results) == 1 else f"({', '.join(['Tensor'] * len(self.results))})"
        filled = filled_by_kernel(self.results, optional=self._may_be_absent)
        library.declare(
            self.forward,
            ", ".join(map(str, self.parameters)),
            returned,
            fake=lambda *args: _returned(self.empty(self._by_name(args[:-1])), args),
            check=check,
            kernel=[*self.parameters, *filled],
        )
        for backend, kernel in kernels(self.forward, given):
            register(self.forward, backend, self._filling(kernel), reasons.get(backend), given)
        for backend, giver in givers(self.forward, given):
            register(self.forward, backend, functools.partial(self._giving, giver), reasons.get(backend), given)
        for backend, composed in compositions(self.forward, given):
            run = functools.partial(self._by_composition, composed)
            backends.register(self.forward, backend, run, reasons.get(backend))
        backends.register(self.forward, "reference", self._filling(lambda: self._fill_by_reference))
        if formula is not None:
            flops.register(self.forward, _of_shapes(formula, self.names))

    def _filling(self, kernel: Callable[[], Callable[..., None]]) -> Callable[..., Any]:
        """The implementation of forward by a kernel that fills what it is given."""
        shapes, by_name = self._shapes, self._by_name

        def call(*values: Any) -> Any:
            made = shapes(by_name(values))
            if made.__class__ is tuple:
                kernel()(*values, *made)
            else:
                kernel()(*values, made)
            return made

        return call

    def _by_composition(self, composed: Callable[[], Callable[..., Any]], *values: Any) -> Any:
        return _one_or_more(_tuple(composed()(*values)))

    def _giving(self, giver: Callable[[], Callable[..., Any]], *values: Any) -> Any:
        return _one_or_more(_tuple(giver()(self._by_name(values))))

    def _fill_by_reference(self, *values: Any) -> None:
        given, made = values[: len(self.names)], values[len(self.names) :]
        for to, value in zip(made, _tuple(self._reference(*_promoted(given))), strict=True):
            if to is not None:
                to.copy_(value)

    def meaning(self, *values: Any) -> Any:
        """Forward by plain torch: new results in the dtypes and the memory that :meth:`empty` gives them, which torch
        can differentiate to any order."""
        made = self.empty(self._by_name(values))
        found: list[Tensor | None] = []
        for name, to, value in zip(self.results, made, _tuple(self._reference(*_promoted(values))), strict=True):
            if to is None:
                found.append(None)
                continue
            value = _laid_out(value.to(to.dtype), to)
            found.append(value.detach() if name in self._without_gradient else value)
        return _returned(found, values)

    # backward

    def _know_backward(self) -> None:
        """What backward is called with: gradients, saved arguments, saved results, settings."""
        self._with_gradient = [
            name for name in self.results if name not in (*self._without_gradient, *self._only_again)
        ]
        alone = len(self._with_gradient) == 1
        self._grad_names = ["grad" if alone else f"grad_{name}" for name in self._with_gradient]
        grads = [
            Parameter("Tensor?" if result in self._may_lack else "Tensor", name)
            for result, name in zip(self._with_gradient, self._grad_names)
        ]
        # What every gradient is computed from is always there.
        needed = {name: [of for of in self.differentiable if name in self._saves.get(of, ())] for name in self._saved()}
        tensors = {parameter.name: parameter for parameter in self.parameters if parameter.is_tensor}
        self._kept = [(self.names.index(name), needed[name]) for name in tensors if name in needed]
        self._kept_results = [(i, needed[name]) for i, name in enumerate(self.results) if name in needed]
        saved = [
            parameter
            if len(needed[name]) == len(self.differentiable) and name not in self._saves_only_if
            else parameter.optional()
            for name, parameter in tensors.items()
            if name in needed
        ]
        saved += [
            Parameter("Tensor?" if self.results[i] in self._saves_only_if else "Tensor", self.results[i])
            for i, _ in self._kept_results
        ]
        self._settings = [
            i
            for i, parameter in enumerate(self.parameters)
            if not parameter.is_tensor and parameter.name not in self._forward_only
        ]
        settings = [*self._remembers, *(self.parameters[i] for i in self._settings)]
        self._backward_parameters = [*grads, *saved, *settings]
        self._backward_names = [parameter.name for parameter in self._backward_parameters]
        self._backward_by_name = _named(self._backward_names)
        self._empty_gradients = [self._empty_gradient(name) for name in self.differentiable]
        self._wanted_by_bits: dict[int, list[bool]] = {}

    def _declared(self, incoming: Callable[[Tensor, Any], Tensor] | None) -> Declared:
        """What calls that record a gradient ask of this declaration."""
        kept = [
            Kept(self.names[i], tuple(of), self._saves_only_if.get(self.names[i]), self.parameters[i].is_list)
            for i, of in self._kept
        ]
        for i, of in self._kept_results:
            condition = self._saves_only_if.get(self.results[i])
            kept.append(Kept(self.results[i], None if condition is None else tuple(of), condition, False))
        return Declared(
            names=self.names,
            results=self.results,
            tensors=[i for i, parameter in enumerate(self.parameters) if parameter.is_tensor],
            kept=kept,
            settings=self._settings,
            remembers=list(self._remembers.values()),
            differentiable=self.differentiable,
            passed_on=self._passed_on,
            only_again=self._only_again,
            may_be_absent=self._may_be_absent,
            without_gradient=self._without_gradient,
            may_lack=self._may_lack,
            lists=self._lists,
            incoming=incoming,
            by_name=self._by_name,
            saved_by_name=_named(self._backward_names[len(self._grad_names) :]),
            run=self._run_backward,
            run_again=None if self._gradients_again is None else self._run_again,
            in_place=None if self._in_place is None else self._run_in_place,
        )

    def _declare_backward(
        self, given: Mapping[str, Any], reasons: Mapping[str, Reasons], formula: Callable[[Any], int] | None
    ) -> None:
        arguments = self._backward_parameters
        # A kernel with one gradient is not called for none.
        names = [f"grad_{name}" for name in self.differentiable]
        lists = [name for name in self.differentiable if name in self._lists]
        filled = filled_by_kernel(names, names if len(names) > 1 else (), [f"grad_{name}" for name in lists])
        kinds = ["Tensor[]" if name in lists else "Tensor" for name in self.differentiable]
        returned = kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"
        # Bit i: whether gradient i is, of a list whether any; then which of each list.
        wanted = [Parameter("int", "wanted")] if len(filled) > 1 else []
        wanted += [Parameter("bool[]", f"wanted_{name}") for name in lists]
        library.declare(
            self.backward,
            ", ".join(map(str, [*arguments, *wanted])),
            returned,
            fake=lambda *args: _returned(self._made_gradients(args[:-1])[1], args),
            kernel=[*arguments, *filled],
        )
        for backend, kernel in kernels(self.backward, given):
            register(self.backward, backend, self._filling_gradients(kernel), reasons.get(backend), given)
        for backend, giver in givers(self.backward, given):
            giving = functools.partial(self._giving_gradients, giver)
            register(self.backward, backend, giving, reasons.get(backend), given)
        for backend, composed in compositions(self.backward, given):
            run = functools.partial(self._gradients_by_composition, composed)
            backends.register(self.backward, backend, run, reasons.get(backend))
        by_reference = self._filling_gradients(lambda: self._fill_gradients_by_reference)
        backends.register(self.backward, "reference", by_reference)
        if formula is not None:
            flops.register(self.backward, _of_shapes(formula, [*self._backward_names, "wanted"]))

    def _composed(self, backward: Callable[[Any, Sequence[Any], str], Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        def call(*args: Any) -> Sequence[Any]:
            values, wanted = self._values_and_wanted(args[:-1])
            return backward(self._backward_by_name(values), wanted, args[-1])

        return call

    def _saved(self) -> list[str]:
        return list(dict.fromkeys(name for names in self._saves.values() for name in names))

    def _values_and_wanted(self, args: Sequence[Any]) -> tuple[Sequence[Any], list[Any]]:
        """The values of backward, and for each differentiable argument whether its gradient is wanted, of a list a list
        of these."""
        count = len(self._backward_names)
        if len(self.differentiable) == 1:
            return args[:count], [*args[count:]] or [True]
        bits = args[count]
        wanted = self._wanted_by_bits.get(bits)
        if wanted is None:
            wanted = self._wanted_by_bits[bits] = [bool(bits >> bit & 1) for bit in range(len(self.differentiable))]
        if self._lists:
            lists = iter(args[count + 1 :])
            in_place = zip(self.differentiable, wanted)
            return args[:count], [list(next(lists)) if name in self._lists else want for name, want in in_place]
        return args[:count], wanted

    def _made_gradients(self, args: Sequence[Any]) -> tuple[Sequence[Any], list[Any]]:
        """The values of backward, and its uninitialised results with None for what is not wanted."""
        values, wanted = self._values_and_wanted(args)
        return values, self.empty_gradients(self._backward_by_name(values), wanted)

    def _filling_gradients(self, kernel: Callable[[], Callable[..., None]]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            values, made = self._made_gradients(args)
            kernel()(*values, *made)
            return _one_or_more(made)

        return call

    def _gradients_by_composition(self, composed: Callable[[], Callable[..., Any]], *args: Any) -> Any:
        values, wanted = self._values_and_wanted(args)
        return _one_or_more(_tuple(composed()(*values, wanted)))

    def _giving_gradients(self, giver: Callable[[], Callable[..., Any]], *args: Any) -> Any:
        values, wanted = self._values_and_wanted(args)
        return _one_or_more(_tuple(giver()(self._backward_by_name(values), wanted)))

    def _fill_gradients_by_reference(self, *values: Any) -> None:
        count = len(self._backward_names)
        a, made = self._backward_by_name(_promoted(values[:count])), values[count:]
        wanted = [[one is not None for one in to] if isinstance(to, list) else to is not None for to in made]
        found = self._gradients(a, wanted) if self._gradients is not None else self.differentiated(a, wanted)
        for to, value in zip(flat(made), flat(found), strict=True):
            if to is not None:
                to.copy_(value)

    def differentiated(
        self, a: Any, wanted: Sequence[Any], reference: Callable[..., Any] | None = None
    ) -> Sequence[Any]:
        """The gradients of the reference, or of what stands in for it, by torch."""
        reference = self._reference if reference is None else reference
        leaves: list[Tensor] = []

        def leaf(want: bool, name: str, *place: int) -> Any:
            value: Any = getattr(a, name, None)
            for i in place:
                value = value[i]
            if not want:
                return value
            value = self._empty_gradient(name)(a, *place).zero_() if value is None else value.detach()
            leaves.append(value.requires_grad_())
            return value

        with library.autograd_inside():
            given = {
                name: [leaf(one, name, i) for i, one in enumerate(want)] if isinstance(want, list) else leaf(want, name)
                for name, want in zip(self.differentiable, wanted, strict=True)
            }
            found = _tuple(reference(*(given.get(name, getattr(a, name, None)) for name in self.names)))
            by_result = dict(zip(self.results, found, strict=True))
            pairs = [
                (by_result[result], getattr(a, name))
                for result, name in zip(self._with_gradient, self._grad_names)
                if getattr(a, name) is not None and by_result[result].requires_grad
            ]
            # A result need not depend on what is wanted: a softmax does not on a bias of all scores.
            grads: Sequence[Tensor] = [torch.zeros_like(value) for value in leaves]
            if pairs:
                grads = torch.autograd.grad(
                    [result for result, _ in pairs],
                    leaves,
                    [grad.to(result.dtype).expand(result.shape) for result, grad in pairs],
                    materialize_grads=True,
                )
        left = iter(grads)
        return [
            [next(left) if one else None for one in want] if isinstance(want, list) else next(left) if want else None
            for want in wanted
        ]

    def _run_again(self, more: Mapping[str, Tensor | None], *args: Any) -> Any:
        assert self._gradients_again is not None
        values, wanted = self._values_and_wanted(args[:-1])
        found = self._gradients_again(SimpleNamespace(**self._backward_by_name(values)._asdict(), **more), wanted)
        return found if found is NotImplemented else tuple(found)

    def _run_in_place(self, *args: Any) -> Any:
        assert self._in_place is not None
        values, wanted = self._values_and_wanted(args)
        found = self._in_place(self._backward_by_name(values), wanted)
        return None if found is None else tuple(found)


def _named(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """What makes values by name of values in order: kernels and meanings read ``a.x``."""
    make: Callable[[Sequence[Any]], Any] = namedtuple("Values", names)._make  # type: ignore[attr-defined]
    return make


def _empty_like(name: str, a: Any, *place: int) -> Tensor:
    """Uninitialised and contiguous, in the shape of an argument or of one in a list."""
    like = getattr(a, name)
    for i in place:
        like = like[i]
    return empty_like(like)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _one_or_more(values: Sequence[Any]) -> Any:
    """Results as an operator returns them."""
    return tuple(values) if len(values) > 1 else values[0]


def _returned(made: Sequence[Any], args: Sequence[Any]) -> Any:
    """Results as torch knows them."""
    return library.without_none(_one_or_more(made), args)


def _promoted(values: Sequence[Any]) -> list[Any]:
    """``values`` with what is floating point in float32 or wider."""

    def promoted(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [promoted(one) for one in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, torch.float32))
        return value

    return [promoted(value) for value in values]


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with its dimensions in memory in the order of those of ``like``, which has no gaps."""
    if value.stride() == like.stride():
        return value
    order = sorted(range(like.dim()), key=lambda dim: like.stride(dim), reverse=True)
    back = sorted(range(like.dim()), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def _of_shapes(formula: Callable[[Any], int], names: Sequence[str]) -> Callable[..., int]:
    """A formula as torch's counter calls it, with shapes in place of tensors."""

    def count(*args: Any, **kwargs: Any) -> int:
        return int(formula(SimpleNamespace(**dict(zip(names, args)))))

    return count
