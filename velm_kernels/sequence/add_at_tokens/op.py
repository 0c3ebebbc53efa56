"""The operator add_at_tokens: rows of features added to rows of others, by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import backends
from velm_kernels.backends import Arguments, cpu, cuda, failures
from velm_kernels.backends.library import LIBRARY
from velm_kernels.layout import empty_like, unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.add_at_tokens.reference import by_index
from velm_kernels.sequence.splice_into.op import rows_of_features, taken


def meaning(hidden: Tensor, features: Tensor, index: Tensor, place: Tensor) -> Tensor:
    return by_index(hidden, features, index)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None]:
    return (taken(a.grad, a.place) if wanted[0] else None,)


# As of splice_into, with hidden in place of embeddings.
OPERATOR = Operator(
    "add_at_tokens",
    "Tensor hidden, Tensor features, Tensor index, Tensor place",
    shapes=lambda a: empty_like(a.hidden),
    reference=meaning,
    differentiable=("features",),
    passed_on=("hidden",),
    saves={"features": ("index", "place")},
    gradients=gradients,
    gradient_shapes={"features": rows_of_features},
    incoming=lambda grad, a: unit_last_stride(grad),
    triton="sequence.add_at_tokens.triton",
)

# The one operator that writes into an argument, for calls that record no gradient: kernels are those of
# add_at_tokens_forward with hidden as their result.
LIBRARY.define(
    "add_in_place(Tensor(a!) hidden, Tensor features, Tensor index, Tensor place) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _in_place_by_library(asked: str, values: Arguments) -> bool:
    """Whether a library of this device has done it: forward of add_at_tokens with hidden as its result."""
    hidden = values["hidden"]
    if asked in ("", "cpu") and not cpu.reasons(OPERATOR.forward, values):
        cpu.op(OPERATOR.forward)(*values.values(), hidden)
        return True
    backend = asked or "cuda"
    if backend not in cuda.NAMESPACES or hidden.is_cpu == (backend == "cuda"):
        return False
    if cuda.reasons(backend, OPERATOR.forward, values) or failures.against(OPERATOR.forward, backend, values):
        return False
    try:
        cuda.op(backend, OPERATOR.forward)(*values.values(), hidden)
    except failures.StartError as failure:
        failures.remember(OPERATOR.forward, backend, values, failure)
        return False
    return True


def _add_in_place(hidden: Tensor, features: Tensor, index: Tensor, place: Tensor) -> None:
    values = {"hidden": hidden, "features": features, "index": index, "place": place}
    if _in_place_by_library(backends.forced(), values):
        return
    if hidden.shape[0] == 0:
        return
    # Features behind the last token are added as zeros, to the first one.
    hidden.index_add_(0, place.clamp(min=0), features.masked_fill((place < 0)[:, None], 0.0))


LIBRARY.impl("add_in_place", _add_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("velm::add_in_place", lambda hidden, features, index, place: None, lib=LIBRARY)
add_in_place = torch.ops.velm.add_in_place.default
