"""What comes before the kernels in C++: queries, keys and values with contiguous rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from velm_kernels.layout import unit_last_stride

Kernels = Callable[[str], Callable[..., Any]]


def attention_forward(kernel: Kernels, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> None:
    rows = map(unit_last_stride, (query, key, value))
    kernel("attention_forward")(*rows, *more)


def attention_backward(
    kernel: Kernels,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *more: Any,
) -> None:
    rows = map(unit_last_stride, (query, key, value))
    kernel("attention_backward")(grad_out, grad_logsumexp, *rows, *more)
