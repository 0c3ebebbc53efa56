"""Wrong arguments of every public function: each error is a TypeError or a ValueError of one short sentence that names
the argument, what was expected and what was given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.modules import MODULES, ModuleCall
from tests.operators import CALLS, Arguments, Call

LONGEST = 300
# Integers of which every one is valid.
OF_ANY_VALUE = {"labels", "ids", "indices"}


def wrong_kinds(annotation: str) -> Iterator[tuple[str, Any]]:
    """Values that no argument of this annotation takes, with what an error must say of each."""
    tensors = torch.randn(2, 3)
    if "None" not in annotation:
        yield "None", None
    if "bool" not in annotation:
        yield "bool", True
    if "str" not in annotation:
        yield "str", "text"
    if "float" not in annotation:
        yield "float", 0.5
    if "Tensor" not in annotation:
        yield r"\(2, 3\)", tensors
        yield r"\(\)", torch.tensor(1.0)
    # Also of a sequence of tensors the first one is named.
    yield r"list of 40000|float 0\.25", [0.25] * 40_000
    if "Tensor" not in annotation or not re.search("Sequence|tuple|Sketch", annotation):
        yield r"list|\(2, 3\)", [tensors] * 3
    yield "ndarray", numpy.ones((2, 3))
    yield "object", object()
    yield "dict", {"x": tensors}
    yield "complex", 1j


def wrong_numbers(annotation: str) -> Iterator[tuple[str, Any]]:
    """Numbers that may be wrong; what is not may pass."""
    if annotation.startswith(("int", "float")):
        yield "-1", -1
        yield "-3", -3
        yield str(10**30), 10**30
    if annotation.startswith("float"):
        yield "nan", float("nan")
        yield "inf", float("inf")
        yield "-inf", float("-inf")
    if annotation.startswith("str"):
        yield "nothing_like_it", "nothing_like_it"


def wrong_tensors(x: Tensor, is_alone: bool) -> Iterator[tuple[bool, Tensor]]:
    """Tensors of other shapes, which may fit by chance, and of other types and devices, which must not: (must, x)."""
    yield False, x.reshape(-1)[0] if x.numel() else x.new_zeros(())
    yield False, x[None]
    yield False, x[None, None]
    if x.dim():
        yield False, x[0]
    for dim in range(x.dim()):
        yield False, torch.cat([x, x.narrow(dim, 0, 1)], dim)
    floating, integer = x.is_floating_point(), not x.is_floating_point() and x.dtype != torch.bool
    yield not is_alone, x.to("meta")
    yield True, x.to(torch.complex64)
    if not floating:
        yield True, x.float()
    if not integer:
        yield True, x.int()
    elif x.numel():
        # Lengths, bounds and indices lie between what there is.
        yield True, x + 10**6
        yield True, x - 10**6
    if x.dtype != torch.bool:
        yield True, x.bool()


def complaint(call: Callable[[], Any], names: list[str], given: str | None, must: bool) -> str | None:
    """What is wrong with how ``call`` refuses its arguments, or None."""
    try:
        call()
    except (TypeError, ValueError) as error:
        text = str(error)
        if len(text) > LONGEST or "\n" in text:
            return f"{len(text)} characters: {text[:200]}"
        if not any(re.match(rf"{re.escape(name)}(\[\d+\]|\.\w+)*: ", text) for name in names):
            return f"names none of {', '.join(names)}: {text}"
        if "expected" not in text or "given" not in text:
            return f"does not say what was expected and given: {text}"
        if given is not None and not re.search(given, text.rpartition("given")[2]):
            return f"does not say that {given} was given: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if must:
            return "was accepted"
    return None


def pieces(value: Any) -> Iterator[tuple[Tensor, Callable[[Tensor], Any]]]:
    """The tensors of an argument, and the argument with another in the place of each."""
    if isinstance(value, Tensor):
        yield value, lambda other: other
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        for n, piece in enumerate(value):

            def replaced(other: Any, n: int = n) -> Any:
                items = [*value[:n], other, *value[n + 1 :]]
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

            yield piece, replaced


def complaints(
    function: Callable[..., Any], arguments: Arguments, name: str, annotation: str, others: list[str]
) -> Iterator[str]:
    """How ``function`` fails to refuse values of its argument ``name``."""

    def check(what: str, value: Any, names: list[str], given: str | None, must: bool) -> Iterator[str]:
        found = complaint(lambda: function(**{**arguments, name: value}), names, given, must)
        if found:
            yield f"{name} = {what}: {found}"

    for given, value in wrong_kinds(annotation):
        yield from check(given, value, [name], given, True)
    for given, value in wrong_numbers(annotation):
        yield from check(given, value, others, None, False)
    is_alone = sum(1 for value in arguments.values() for _ in pieces(value)) == 1
    for piece, replaced in pieces(arguments.get(name)):
        for must, other in wrong_tensors(piece, is_alone):
            what = f"{tuple(other.shape)} {other.dtype} {other.device}"
            # The signs of a sketch may be integers too.
            must = must and not (annotation == "Sketch" and other.dtype == torch.int32)
            # Of another shape: a size was given.
            same_kind = other.dtype == piece.dtype and other.device == piece.device
            must = must and not (name in OF_ANY_VALUE and same_kind)
            yield from check(what, replaced(other), others, r"\d|\(\)" if same_kind else None, must)
        if not isinstance(arguments[name], Tensor):
            for wrong in (None, 1.5, "text", [piece]):
                kind = type(wrong).__name__.replace("NoneType", "None")
                yield from check(f"a piece of {kind}", replaced(wrong), [name], kind, True)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_functions_refuse_wrong_arguments(call: Call) -> None:
    parameters = inspect.signature(call.function).parameters
    found: list[str] = []
    for name, parameter in parameters.items():
        found += complaints(call.function, call.arguments(), name, str(parameter.annotation), list(parameters))
    assert not found, "\n".join(found)


def test_other_functions_refuse_wrong_arguments() -> None:
    model, tensors = torch.nn.Linear(2, 2), torch.randn(2, 3)
    found: list[str] = []
    for name in ("features", "dim", "seed", "generator"):
        annotation = "int | None" if name == "seed" else "int" if name != "generator" else "torch.Generator | None"
        given = {"features": 4, "dim": 8}
        found += complaints(velm_kernels.make_sketch, given, name, annotation, ["features", "dim", "seed"])
    for wrong, kind in ((3, "int"), (0.5, "float"), (tensors, r"\(2, 3\)"), ([3], "int"), (object(), "object")):
        found += filter(None, [complaint(lambda w=wrong: velm_kernels.patch(model, only=w), ["only"], kind, True)])
    for function in (velm_kernels.patch, velm_kernels.unpatch):
        for wrong in (None, "text", [model], tensors):
            kind = r"\(2, 3\)" if wrong is tensors else type(wrong).__name__.replace("NoneType", "None")
            found += filter(None, [complaint(lambda w=wrong, f=function: f(w), ["model"], kind, True)])
    found += filter(None, [complaint(lambda: velm_kernels.patch(model, strict=1), ["strict"], "int", True)])
    for wrong in (None, 3, [1.0] * 1000):
        found += filter(None, [complaint(lambda w=wrong: velm_kernels.explain(w), ["name"], None, True)])

        def use(wrong: Any = wrong) -> None:
            with velm_kernels.use_backend(wrong):
                pass

        found += filter(None, [complaint(use, ["use_backend"], None, True)])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("call", MODULES, ids=str)
def test_constructors_refuse_wrong_arguments(call: ModuleCall) -> None:
    parameters = inspect.signature(call.type).parameters
    names = list(parameters)
    found: list[str] = []
    for name, parameter in parameters.items():
        annotation = str(parameter.annotation)
        if annotation != "Any" and annotation != "Parameter" and parameter.annotation is not inspect.Parameter.empty:
            found += complaints(call.type, call.constructor, name, annotation, names)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("call", MODULES, ids=str)
def test_modules_refuse_wrong_arguments(call: ModuleCall) -> None:
    module, arguments = call.module(), call.arguments()
    parameters = inspect.signature(call.type.forward).parameters
    found: list[str] = []
    if isinstance(arguments, tuple):
        for n, given in enumerate(arguments):
            for of in (lambda value, n=n: module(*arguments[:n], value, *arguments[n + 1 :]),):
                names = ["inputs", "weight", "bias"]
                found += complaints(lambda inputs, of=of: of(inputs), {"inputs": given}, "inputs", "Tensor", names)
    else:
        # What is wrong beside parameters may be said of these.
        names = [*parameters, "weight", "key_weight", "value_weight", "key", "value"]
        for name, parameter in parameters.items():
            if name != "self":
                found += complaints(module, arguments, name, str(parameter.annotation), names)
    assert not found, "\n".join(found)
