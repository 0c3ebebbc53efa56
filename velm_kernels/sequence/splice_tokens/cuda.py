"""splice_tokens by CUDA kernels: torch sorts the ids of the tokens whose gradients are added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from velm_kernels.sequence.places import text_by_id


def splice_tokens_forward(kernel: Callable[[str], Callable[..., Any]], *arguments: Any) -> None:
    kernel("splice_tokens_forward")(*arguments)


def splice_tokens_backward(
    kernel: Callable[[str], Callable[..., Any]],
    grad: Tensor,
    token_ids: Tensor | None,
    index: Tensor,
    place: Tensor | None,
    vocabulary: int,
    grad_weight: Tensor | None,
    grad_features: Tensor | None,
) -> None:
    keys, order = token_ids, index
    if grad_weight is not None and token_ids is not None:
        grad_weight.zero_()
        keys, order = text_by_id(token_ids, index, vocabulary)
    # In place of ids and index: keys in rising order, and the tokens that have them.
    kernel("splice_tokens_backward")(grad, keys, order, place, vocabulary, grad_weight, grad_features)
