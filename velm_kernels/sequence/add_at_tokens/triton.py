"""add_at_tokens by a Triton kernel: the launches."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.sequence.triton_rows import put_rows


def add_at_tokens_forward(hidden: Tensor, features: Tensor, index: Tensor, place: Tensor, out: Tensor) -> None:
    put_rows(hidden, None, features, index, out, add=True)


def add_at_tokens_backward(grad: Tensor, index: Tensor, place: Tensor, grad_features: Tensor) -> None:
    put_rows(None, None, grad, place, grad_features)
