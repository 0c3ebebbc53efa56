"""splice_into by a Triton kernel: the launches."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.sequence.triton_rows import put_rows


def splice_into_forward(embeddings: Tensor, features: Tensor, index: Tensor, place: Tensor, out: Tensor) -> None:
    put_rows(embeddings, None, features, index, out)


def splice_into_backward(
    grad: Tensor, index: Tensor, place: Tensor | None, grad_embeddings: Tensor | None, grad_features: Tensor | None
) -> None:
    if grad_embeddings is not None:
        put_rows(grad, None, None, index, grad_embeddings)
    if grad_features is not None and place is not None:
        put_rows(None, None, grad, place, grad_features)
