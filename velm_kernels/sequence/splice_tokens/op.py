"""The operator splice_tokens: rows of features among rows of an embedding, by number and by id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.splice_into.op import rows_of_features, taken
from velm_kernels.sequence.splice_tokens.reference import embedded_by_index


def meaning(token_ids: Tensor, weight: Tensor, features: Tensor, index: Tensor, place: Tensor) -> Tensor:
    return embedded_by_index(token_ids, weight, features, index)


def gradients(a: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    of_weight, of_features = wanted
    grad_weight = None
    if of_weight:
        is_text = a.index < 0
        ids = a.token_ids.clamp(0, max(a.vocabulary - 1, 0)).long()
        rows = a.grad.masked_fill(~is_text[:, None], 0.0)
        # What is no text goes to a row more.
        grad_weight = a.grad.new_zeros(a.vocabulary + 1, a.grad.shape[1])
        grad_weight = grad_weight.index_add(0, torch.where(is_text, ids, a.vocabulary), rows)[: a.vocabulary]
    return grad_weight, taken(a.grad, a.place) if of_features else None


def _empty(a: Any) -> Tensor:
    out: Tensor = a.weight.new_empty((a.token_ids.shape[0], a.weight.shape[1]))
    return out


def _rows_of_weight(a: Any) -> Tensor:
    rows: Tensor = a.grad.new_empty((a.vocabulary, a.grad.shape[1]))
    return rows


def _check(arguments: Arguments) -> None:
    """Ids of text are rows of the weight; those of tokens that take a feature are not looked at."""
    ids, index = arguments["token_ids"], arguments["index"]
    vocabulary = arguments["weight"].shape[0]
    if checks.reads_values(ids):
        text = ids[index < 0]
        checks.values_between("token_ids", text, 0, vocabulary - 1)


# token_ids: (tokens,) int32, contiguous; weight: (vocabulary, dim), features: (n, dim), any row stride, last stride 1,
# one dtype; index and place as of splice_into. What comes out is contiguous; the gradient that comes in has last stride
# 1; that of the weight is summed in float32, in the order of the tokens.
OPERATOR = Operator(
    "splice_tokens",
    "Tensor token_ids, Tensor weight, Tensor features, Tensor index, Tensor place",
    shapes=_empty,
    reference=meaning,
    differentiable=("weight", "features"),
    saves={"weight": ("token_ids", "index"), "features": ("index", "place")},
    remembers={"SymInt vocabulary": lambda a: a.weight.shape[0]},
    gradients=gradients,
    gradient_shapes={"weight": _rows_of_weight, "features": rows_of_features},
    incoming=lambda grad, a: unit_last_stride(grad),
    check=_check,
    triton="sequence.splice_tokens.triton",
    cuda="sequence.splice_tokens.cuda",
)
