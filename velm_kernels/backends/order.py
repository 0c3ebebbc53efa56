"""In which order backends are tried: a fixed rule on operator, device and arguments, never a timing.

The table holds until somebody has measured on such a device; a line that follows from a measurement says from which.
What a backend cannot serve goes to the next one, so the order is one of preference alone. Tensors on the CPU:
Triton (its interpreter, where that is switched on), this library, torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from velm_kernels.backends import devices

CUDA_FIRST = ("cuda", "triton", "torch", "reference")
TRITON_FIRST = ("triton", "cuda", "torch", "reference")
TORCH_FIRST = ("torch", "triton", "cuda", "reference")
ON_CPU = ("triton", "cpu", "torch", "reference")
TORCH_FIRST_ON_CPU = ("torch", "triton", "cpu", "reference")
# mps, xpu and others, for which nothing here was written.
ELSEWHERE = ("triton", "torch", "reference")

# The columns are generations: 80 stands for compute capability 8.0 to 8.9, 100 for 10.x and 11.x, 120 for 12.x.
GENERATIONS = (80, 90, 100, 120)
_Row = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]

# By operator without _forward and _backward; "" for those that have no line.
TABLE: dict[str, _Row] = {
    # The kernels of the CUDA library are mma.sync, which sm_90 and sm_100 execute at a part of what their own matrix
    # instructions do. Triton's compiler reaches those.
    "": (CUDA_FIRST, TRITON_FIRST, TRITON_FIRST, CUDA_FIRST),
    # torch's own attention (cuDNN, FlashAttention) is at the limit there. It serves what is plain or causal.
    "attention": (CUDA_FIRST, TORCH_FIRST, TORCH_FIRST, CUDA_FIRST),
    # Its CUDA kernel uses no matrix instructions yet.
    "attention_pool": (TRITON_FIRST,) * 4,
    # No matrices. The CUDA kernels count samples for the gradient of value, Triton's sort their corners.
    "multiscale_deformable_attention": (CUDA_FIRST,) * 4,
    # Nothing but products of matrices.
    "folded_bilinear": (TORCH_FIRST,) * 4,
    # cuBLASLt through torch: no other product reaches it.
    "linear": (TORCH_FIRST,) * 4,
}

# operator -> whether torch is to come first where the table lets it.
_torch_is_best: dict[str, Callable[[dict[str, Any]], bool]] = {}
# operator -> whether torch is to come first on the CPU.
_torch_is_best_on_cpu: dict[str, Callable[[dict[str, Any]], bool]] = {}


def prefer_torch(
    operator: str,
    where_the_table_lets_it: Callable[[dict[str, Any]], bool] | None = None,
    on_cpu: Callable[[dict[str, Any]], bool] | None = None,
) -> None:
    """Lets the arguments of ``operator`` say whether torch comes first: on GPUs only where the table has it first, on
    the CPU where ``on_cpu`` says so."""
    if where_the_table_lets_it is not None:
        _torch_is_best[operator] = where_the_table_lets_it
    if on_cpu is not None:
        _torch_is_best_on_cpu[operator] = on_cpu


def asks_arguments(operator: str) -> bool:
    """Whether the order depends on more than the devices of the arguments."""
    return operator in _torch_is_best or operator in _torch_is_best_on_cpu


def generation(capability: int) -> int:
    """The column of :data:`TABLE` for a compute capability; what is newer than all of them is taken for the newest that
    has its own matrix instructions."""
    if capability >= 130:
        return 100
    return max((known for known in GENERATIONS if known <= capability), default=GENERATIONS[0])


def of(operator: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    """The backends in the order in which they are tried for these arguments."""
    tensor = _first_tensor(arguments)
    if tensor is None or tensor.is_cpu:
        if operator in _torch_is_best_on_cpu and _torch_is_best_on_cpu[operator](arguments):
            return TORCH_FIRST_ON_CPU
        return ON_CPU
    if tensor.device.type != "cuda":
        return ELSEWHERE
    row = TABLE.get(operator.removesuffix("_forward").removesuffix("_backward"), TABLE[""])
    order = row[GENERATIONS.index(generation(devices.capability(tensor.device.index)))]
    if order is TORCH_FIRST and operator in _torch_is_best and not _torch_is_best[operator](arguments):
        return ("triton", "torch", "cuda", "reference")
    return order


def _first_tensor(arguments: dict[str, Any]) -> torch.Tensor | None:
    for value in arguments.values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, torch.Tensor):
                return one
    return None
