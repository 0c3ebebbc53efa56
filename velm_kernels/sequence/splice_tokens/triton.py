"""splice_tokens by Triton kernels: the launches."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.sequence.triton_rows import put_rows, sum_rows_of_text


def splice_tokens_forward(
    token_ids: Tensor, weight: Tensor, features: Tensor, index: Tensor, place: Tensor, out: Tensor
) -> None:
    put_rows(weight, token_ids, features, index, out)


def splice_tokens_backward(
    grad: Tensor,
    token_ids: Tensor | None,
    index: Tensor,
    place: Tensor | None,
    vocabulary: int,
    grad_weight: Tensor | None,
    grad_features: Tensor | None,
) -> None:
    if grad_weight is not None and token_ids is not None:
        sum_rows_of_text(grad, token_ids, index, grad_weight)
    if grad_features is not None and place is not None:
        put_rows(None, None, grad, place, grad_features)
