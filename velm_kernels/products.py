"""Which matrix product serves :func:`velm_kernels.linear` on the CPU: the packed one of this library, or torch's.

The choice is a fixed function of the processor, the instruction set, the dtype and the sizes. Nothing is timed when it
is made, so the same call computes the same bits on every run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from velm_kernels import processors
from velm_kernels.backends import cpu
from velm_kernels.backends.choice import Choice
from velm_kernels.processors import Processor

PRODUCTS = ("velm", "torch")

# Below this many rows a bfloat16 product is bound by reading the weight too, and a call costs more than it saves.
BFLOAT16_ROWS = 8

_asked_for = Choice("velm_kernels_product")


def faster_than_torch(
    x_rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device | str,
    training: bool,
) -> bool:
    """Whether ``x (x_rows, in_features) @ weight (out_features, in_features)^T`` is faster here than in torch.

    True means that sending a plain ``nn.Linear`` of these sizes through :func:`velm_kernels.linear` gains time;
    with an activation or a residual to fuse it gains in any case. ``training``: backward will run too.

    The rule:

    - float16 on processors without float16 arithmetic (avx512fp16, amx-fp16): torch computes such products one
      element at a time; this library converts while packing and accumulates in float32.
    - bfloat16 on processors without bfloat16 arithmetic (avx512bf16, amx-bf16): the same, from ``BFLOAT16_ROWS`` rows.
    - float32 where :mod:`velm_kernels.processors` has a measurement that says so, from as many rows as it says.
    - Everything else, and devices other than the CPU: torch.
    """
    if torch.device(device).type != "cpu" or dtype not in cpu.DTYPES:
        return False
    isa = cpu.in_use()
    if isa is None or min(x_rows, in_features, out_features) <= 0:
        return False
    return x_rows >= first_row(dtype, isa, processors.this_processor())


@functools.cache
def first_row(dtype: torch.dtype, isa: str, processor: Processor) -> int:
    """From how many rows on this library's product is the faster one; ``processors.NEVER`` where torch's always is."""
    if dtype == torch.float16:
        return processors.NEVER if processor.has("avx512fp16", "amx-fp16") else 1
    if dtype == torch.bfloat16:
        return processors.NEVER if processor.has("avx512bf16", "amx-bf16") else BFLOAT16_ROWS
    return processors.line_for(processor).float32_rows if isa.startswith("avx512") else processors.NEVER


@contextlib.contextmanager
def use_product(name: str) -> Iterator[None]:
    """Inside, the product ``name`` ("velm" or "torch") is taken whatever the rule says: for tests and benchmarks."""
    if name not in PRODUCTS:
        raise ValueError(f"use_product: expected one of {', '.join(PRODUCTS)}, given {name!r}")
    with _asked_for.use(name):
        yield


def forced_product() -> str | None:
    """What :func:`use_product` says, or None."""
    return _asked_for.get()


def own_product(
    x_rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, training: bool
) -> bool:
    """What the operators ask: :func:`faster_than_torch`, unless :func:`use_product` says otherwise."""
    asked = forced_product()
    if asked is not None:
        return asked == "velm"
    return faster_than_torch(x_rows, in_features, out_features, dtype, device, training)


def own_product_of(x_rows: int, dtype: torch.dtype) -> bool:
    """:func:`own_product` for ordinary sizes on the CPU, at once, where torch.compile is known not to trace."""
    asked = _asked_for.get_untraced()
    if asked is not None:
        return asked == "velm"
    isa = cpu.in_use()
    return isa is not None and x_rows >= first_row(dtype, isa, processors.this_processor())


_never: tuple[str | None, Processor, bool] | None = None


def always_torch() -> bool:
    """Whether :func:`faster_than_torch` says no on the CPU whatever the call; patched modules ask each time."""
    global _never
    isa, processor = cpu.in_use(), processors.this_processor()
    if _never is None or _never[0] != isa or _never[1] is not processor:
        rows = (processors.NEVER if isa is None else first_row(dtype, isa, processor) for dtype in cpu.DTYPES)
        _never = isa, processor, min(rows) >= processors.NEVER
    return _never[2]
