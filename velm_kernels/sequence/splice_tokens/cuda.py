"""splice_tokens by CUDA kernels: torch sorts the ids of the tokens whose gradients are added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def text_by_id(token_ids: Tensor, index: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The tokens in the order of their ids, of one id in their own: (ids, numbers of tokens), int32. Behind those of
    text come those that take a feature, with ``vocabulary`` as their id."""
    keys = torch.where(index < 0, token_ids.clamp(0, max(vocabulary - 1, 0)), vocabulary)
    keys, order = keys.sort(stable=True)
    return keys, order.int()
