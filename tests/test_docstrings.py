"""What the docstrings of public names hold, and that their examples give what stands there."""

from __future__ import annotations

import doctest
import inspect
import re
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import velm_kernels

from .modules import MODULES, ModuleCall, call_module

PUBLIC = [name for name in velm_kernels.__all__ if not name.startswith("__")]
FUNCTIONS = [name for name in PUBLIC if not inspect.isclass(getattr(velm_kernels, name))]
MODULE_NAMES = [call.name for call in MODULES]
RESULTS = sorted(name for name in PUBLIC if hasattr(getattr(velm_kernels, name), "_fields"))
# Classes that are neither modules nor results.
OBJECTS = sorted(set(PUBLIC) - set(FUNCTIONS) - set(MODULE_NAMES) - set(RESULTS))
# They compute nothing that has a shape or a formula.
TOOLS = ("explain", "make_sketch", "patch", "unpatch", "use_backend")
SHAPE = re.compile(r"``\(.*?\)``", re.S)


def told(name: str) -> str:
    return inspect.getdoc(getattr(velm_kernels, name)) or ""


def section(text: str, title: str) -> str:
    """The lines of a section, without its title."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    return found[1] if found else ""


def arguments_told(name: str, doc: str) -> set[str]:
    """The names that ``Args`` of a docstring explains; all of them where it refers to another one's."""
    names = {
        one
        for line in section(doc, "Args").splitlines()
        for before in re.findall(r"^    ([\w, ]+):", line)
        for one in re.split(r",\s*", before)
    }
    parameters = set(inspect.signature(getattr(velm_kernels, name)).parameters)
    return parameters if "others" in names or "The other arguments are those of" in doc else names


@pytest.mark.quick
@pytest.mark.parametrize("name", FUNCTIONS + MODULE_NAMES + OBJECTS)
def test_examples_give_what_they_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, doc = getattr(velm_kernels, name), told(name)
    if "import transformers" in doc:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    examples = doctest.DocTestParser().get_examples(doc)
    assert examples, f"{name} has no example"
    assert any(example.want for example in examples), f"the example of {name} shows no result"
    test = doctest.DocTest(
        examples, {"torch": torch, "velm_kernels": velm_kernels}, name, inspect.getsourcefile(value), 0, doc
    )
    output: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=output.append)
    assert not output, "".join(output)


@pytest.mark.parametrize("name", FUNCTIONS + MODULE_NAMES + OBJECTS)
def test_docstrings_have_arguments_shapes_and_errors(name: str) -> None:
    value, doc = getattr(velm_kernels, name), told(name)
    missing = []
    if not section(doc, "Raises"):
        missing.append("Raises")
    if not section(doc, "Example"):
        missing.append("Example")
    if name in FUNCTIONS and not section(doc, "Returns"):
        missing.append("Returns")
    if name not in TOOLS and not SHAPE.search(doc):
        missing.append("a shape")
    if name in MODULE_NAMES + OBJECTS and not section(doc, "Shape"):
        missing.append("Shape")
    missing += sorted(set(inspect.signature(value).parameters) - arguments_told(name, doc))
    assert not missing, f"{name}: {', '.join(missing)}"


@pytest.mark.parametrize("name", RESULTS)
def test_results_say_what_their_fields_are(name: str) -> None:
    fields = section(told(name), "Attributes")
    for field in getattr(velm_kernels, name)._fields:
        assert re.search(rf"^    {field}: ``\(", fields, re.M), f"{name}.{field} has no shape"


@pytest.mark.parametrize("name", OBJECTS)
def test_methods_say_what_they_take(name: str) -> None:
    missing = []
    for method, value in vars(getattr(velm_kernels, name)).items():
        if method.startswith("_") or not callable(value := getattr(value, "__func__", value)):
            continue
        doc = inspect.getdoc(value) or ""
        taken = list(inspect.signature(value).parameters)[1:]
        missing += [f"{method}: {one}" for one in taken if not re.search(rf"\b{one}\b", doc)]
        missing += [] if doc else [method]
    assert not missing, f"{name}: {', '.join(missing)}"


def _floats(call: ModuleCall) -> list[int]:
    flat, _ = tree_flatten(call.arguments())
    return [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("call", MODULES, ids=str)
def test_modules_refuse_another_dtype_than_that_of_their_parameters(call: ModuleCall) -> None:
    module = call.module()
    flat, spec = tree_flatten(call.arguments())
    if not list(module.parameters()):
        pytest.skip("has no parameters")

    def with_another(place: int, dtype: torch.dtype) -> Any:
        changed = list(flat)
        changed[place] = changed[place].to(dtype)
        return tree_unflatten(changed, spec)

    # A residual may have another one.
    places = [i for i in _floats(call) if not (call.name in ("Linear", "MLP") and i == 1)]
    assert places
    for place in places:
        # Latents in float32 go with tokens in 16 bits, as in the published module.
        for dtype in (torch.float64, torch.bfloat16)[: 1 if call.name == "PerceiverResampler" else 2]:
            with pytest.raises(TypeError, match="expected dtype"):
                call_module(module, with_another(place, dtype))
        with torch.autocast("cpu", torch.bfloat16):
            call_module(module, with_another(place, torch.bfloat16))
