"""linear_cross_entropy on the CPU: the passes over logits in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.losses.linear_cross_entropy import chunks
from velm_kernels.products import own_product_of

# See velm_kernels/losses/linear_cross_entropy/chunks.py: z (rows, columns), last stride 1; bias (columns,), of any
# dtype, and targets (rows,) contiguous; sums and weights contiguous.
cpu.declare(
    "linear_cross_entropy_sums(Tensor z, Tensor? bias, Tensor targets, int first, float softcap, bool smooths, "
    "bool details, Tensor(a!) sums) -> ()"
)
cpu.declare(
    "linear_cross_entropy_gradient(Tensor(a!) z, Tensor? bias, Tensor targets, int first, float softcap, "
    "bool details, Tensor weights) -> ()"
)
# Asks for large pages.
cpu.declare("linear_cross_entropy_fresh(Tensor(a!) x) -> ()")

Kernel = Callable[[str], Callable[..., Any]]
# 64 MiB; what a product of 512 rows leaves in a second-level cache.
BYTES, LEAST_ROWS, COLUMNS = 1 << 26, 128, 2048
_DTYPES = (torch.bfloat16, torch.float16)


class _Passes:
    def __init__(self, kernel: Kernel) -> None:
        self.fresh: Any = kernel("linear_cross_entropy_fresh")
        self.sums: Any = kernel("linear_cross_entropy_sums")
        self.gradient: Any = kernel("linear_cross_entropy_gradient")


def _sizes(hidden: Tensor) -> chunks.Sizes:
    # What torch multiplies one element at a time, and float16 that it would sum in float16.
    converts = frozenset(d for d in _DTYPES if d == torch.float16 or own_product_of(hidden.shape[0], d))
    return chunks.Sizes(BYTES, LEAST_ROWS, COLUMNS, gathers=True, converts=converts)


def linear_cross_entropy_forward(kernel: Kernel, hidden: Tensor, *arguments: Any) -> None:
    chunks.forward(_Passes(kernel), _sizes(hidden), hidden, *arguments)


def linear_cross_entropy_backward(
    kernel: Kernel,
    grad_loss: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    *arguments: Any,
) -> None:
    chunks.backward(_Passes(kernel), _sizes(hidden), grad_loss, grad_logprobs, grad_entropy, hidden, *arguments)
