"""How operators run on DTensors (``torch.distributed.tensor``): along which dimensions each device computes its part.

Every operator takes replicated arguments; torch gathers what is sharded otherwise. Attention and linear projections
also run in parts, without communication: attention over batch and heads, projections over rows, over output features
(column parallel) and over input features (row parallel, whose result is a pending sum). Mixing DTensors with plain
tensors is an error, as in torch.

The strategies are registered when the first DTensor is met: nothing here costs those who have none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

# A way to compute in parts: a placement for each result and for the tensors named; tensors not named are replicated.
# A placement is a dimension to shard, "sum" for a pending sum, or None for a replica.
Placement = int | str | None
Way = tuple[list[Placement], dict[str, Placement]]
Ways = Callable[[dict[str, Any]], list[Way]]

_GRADIENTS = (
    *("query", "key", "value", "bias", "rel_pos_height", "rel_pos_width"),
    *("query_norm_weight", "key_norm_weight"),
)


@torch.compiler.assume_constant_result
def register() -> bool:
    """Registers the strategies of all operators with torch, once."""
    return _register()


@functools.cache
def _register() -> bool:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info

    def placement(given: Placement) -> Any:
        if given is None:
            return Replicate()
        return Partial() if given == "sum" else Shard(given)  # type: ignore[arg-type]

    def strategies(operator: Any, ways: Ways | None) -> Callable[..., Any]:
        names = [argument.name for argument in operator._schema.arguments]
        count = len(operator._schema.returns)

        def inputs(bound: dict[str, Any], given: dict[str, Placement]) -> list[Any]:
            listed: list[Any] = []
            for name in names:
                # Every tensor of a list has a place of its own.
                values = bound[name] if isinstance(bound[name], (tuple, list)) else [bound[name]]
                listed += [placement(given.get(name)) if hasattr(value, "placements") else None for value in values]
            return listed

        def acceptable(*args: Any) -> list[Any]:
            bound = dict(zip(names, args, strict=True))
            found: list[Way] = [([None] * count, {}), *(ways(bound) if ways else ())]
            return [([placement(result) for result in results], inputs(bound, given)) for results, given in found]

        return acceptable

    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("velm::"):
            continue
        operator = getattr(torch.ops.velm, name.removeprefix("velm::")).default
        if any("List" in str(value.type) for value in operator._schema.returns):
            continue
        register_sharding(operator)(strategies(operator, _WAYS.get(name.removeprefix("velm::"))))
        # Torch would keep a strategy by the tensors and by what comes from the first integer on; all arguments count.
        known[operator] = RuntimeSchemaInfo(0, needs_pytree=True)
    return True


def _linear_forward(given: dict[str, Any]) -> list[Way]:
    kept = given["keeps"] != ""
    ways: list[Way] = [
        ([0, 0 if kept else None], {"x": 0, "residual": 0}),
        ([1, 1 if kept else None], {"weight": 0, "bias": 0, "residual": 1}),
    ]
    if given["bias"] is None and given["residual"] is None and not given["activation"]:
        ways.append((["sum", None], {"x": 1, "weight": 1}))
    return ways


def _linear_backward(given: dict[str, Any]) -> list[Way]:
    def asked(*results: Placement) -> list[Placement]:
        return [result if given["wanted"] & 1 << bit else None for bit, result in enumerate(results)]

    return [
        (asked(0, "sum", "sum"), {"grad": 0, "x": 0, "out": 0, "kept": 0}),
        (asked("sum", 0, 0), {"grad": 1, "weight": 0, "out": 1, "kept": 1}),
        (asked(1, 1, None), {"x": 1, "weight": 1}),
    ]


def _attention_dims(given: dict[str, Any]) -> list[int]:
    """The dimensions of query, key and value over which attention falls into parts: batch and heads."""
    # What is dropped depends on the place in the batch, of which a part knows nothing; packed sequences have no batch.
    if given["dropout_p"] > 0.0 or given["cu_seqlens_q"] is not None:
        return []
    query, key = given["query"], given["key"]
    whole_groups = query.shape[1] == key.shape[1] or key.shape[1] % math.prod(query.mesh.shape) == 0
    return [0, 1] if whole_groups else [0]


def _attention_inputs(given: dict[str, Any], dim: int) -> dict[str, Placement]:
    named: dict[str, Placement] = dict.fromkeys(("query", "key", "value", "rel_pos_height", "rel_pos_width"), dim)
    if dim == 0:
        named |= dict.fromkeys(("key_lengths", "range_start", "range_stop", "key_mask"), 0)
    named |= {name: dim for name in ("mask", "bias") if given[name] is not None and given[name].shape[dim] > 1}
    return named


def _attention_forward(given: dict[str, Any]) -> list[Way]:
    return [
        ([dim, dim, dim if given["return_key_mass"] else None], _attention_inputs(given, dim))
        for dim in _attention_dims(given)
    ]


def _attention_backward(given: dict[str, Any]) -> list[Way]:
    ways: list[Way] = []
    for dim in _attention_dims(given):
        inputs = _attention_inputs(given, dim)
        results = [
            (inputs.get(name, "sum") if given["wanted"] & 1 << bit else None) for bit, name in enumerate(_GRADIENTS)
        ]
        ways.append((results, inputs | dict.fromkeys(("grad_out", "grad_logsumexp", "out", "logsumexp"), dim)))
    return ways


_WAYS: dict[str, Ways] = {
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
}
