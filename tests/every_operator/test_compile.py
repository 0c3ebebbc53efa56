"""Every operator under torch.compile(fullgraph=True) and torch.export, with sizes that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map, tree_map_only

from tests.operators import CALLS, Arguments, Call, differentiable_results, results

every_call = pytest.mark.parametrize("call", CALLS, ids=str)


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()
    counters.clear()


def check(call: Call, function: Callable[..., Any], sizes: dict[str, int]) -> None:
    """Results and gradients of ``function`` are those of the operator."""
    found = []
    for of in (call.function, function):
        arguments = call.requiring_gradients(call.arguments(**sizes))
        outs = results(of(**arguments))
        sums = [out.sum() for out in differentiable_results(outs)]
        found.append((outs, torch.autograd.grad(sums, call.leaves(arguments))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@every_call
def test_another_batch_is_compiled_once_more(call: Call) -> None:
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    first = next(iter(call.sizes))
    for more in range(3):
        check(call, compiled, {first: call.sizes[first] + more})
    assert counters["stats"]["unique_graphs"] <= 2, "one graph for the first batch, one for all others"


# Modes of which backward keeps the same are one graph but for a number.
@pytest.mark.parametrize("call", [call for call in CALLS if call.name not in ("sum", "logsumexp")], ids=str)
def test_all_sizes_dynamic(call: Call) -> None:
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=True)
    for more in (0, 2):
        check(call, compiled, {name: size + more for name, size in call.sizes.items()})


@pytest.mark.parametrize("call", [call for call in CALLS if str(call) in ("weighted_sum", "linear-gelu")], ids=str)
def test_inductor(call: Call) -> None:
    compiled = torch.compile(call.function, fullgraph=True)
    for batch in (2, 3):
        check(call, compiled, {"batch": batch})


class Exported(torch.nn.Module):
    """``call`` as a module of its tensors; numbers and flags are constants."""

    def __init__(self, call: Call, arguments: Arguments) -> None:
        super().__init__()
        self.function = call.function
        self.others = {name: value for name, value in arguments.items() if name not in tensors_of(arguments)}

    def forward(self, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        return results(self.function(**tensors, **self.others))


def tensors_of(arguments: Arguments) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if isinstance(value, (Tensor, list, tuple))}


@every_call
def test_export_with_a_dynamic_batch(call: Call) -> None:
    first = next(iter(call.sizes))
    arguments, larger = (call.arguments(**{first: size}) for size in (5, 7))

    def dynamic(x: Any, y: Any) -> Any:
        changed = (dim for dim in range(x.dim()) if x.shape[dim] != y.shape[dim]) if isinstance(x, Tensor) else ()
        return dict.fromkeys(changed, torch.export.Dim.DYNAMIC)

    shapes = tree_map(dynamic, tensors_of(arguments), tensors_of(larger))
    program = torch.export.export(Exported(call, arguments), (tensors_of(arguments),), dynamic_shapes=(shapes,))
    loaded = program.module()
    for given in (arguments, larger):
        copies = tree_map_only(Tensor, torch.clone, given)
        torch.testing.assert_close(loaded(tensors_of(given)), results(call.function(**copies)))
