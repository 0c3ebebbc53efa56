"""Which matrix product serves :func:`velm_kernels.linear` on the CPU: the packed one of this library, or torch's.

The choice is a fixed function of the processor, the instruction set, the dtype and the sizes. Nothing is timed when it
is made, so the same call computes the same bits on every run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from velm_kernels.backends import cpu

PRODUCTS = ("velm", "torch")

# Below this many rows torch's float32 product is bound by reading the weight, and there is nothing to gain.
AMD_FLOAT32_ROWS = 32

# Below this many rows a bfloat16 product is bound by reading the weight too, and a call costs more than it saves.
BFLOAT16_ROWS = 8

_forced: list[str] = []


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """(vendor, features) of this processor, as its cpuid names them; ("", none) where that is not known."""
    try:
        from velm_kernels import _facts
    except ImportError:
        return "", frozenset()
    facts = _facts.cpu()
    return str(facts["vendor"]), frozenset(facts["features"])


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
    - float32 on AMD processors with AVX-512, from ``AMD_FLOAT32_ROWS`` rows: torch's product comes from a library tuned
      for other processors and leaves more than half of the multiply-add rate unused.
    - Everything else, and devices other than the CPU: torch.
    """
    if torch.device(device).type != "cpu" or dtype not in cpu.DTYPES:
        return False
    isa = cpu.in_use()
    if isa is None or min(x_rows, in_features, out_features) <= 0:
        return False
    vendor, features = processor()
    return _rule(x_rows, in_features, out_features, dtype, training, isa, vendor, features)


def _rule(
    x_rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    training: bool,
    isa: str,
    vendor: str,
    features: frozenset[str],
) -> bool:
    if dtype == torch.float16:
        return not features & {"avx512fp16", "amx-fp16"}
    if dtype == torch.bfloat16:
        return x_rows >= BFLOAT16_ROWS and not features & {"avx512bf16", "amx-bf16"}
    return vendor == "AuthenticAMD" and isa.startswith("avx512") and x_rows >= AMD_FLOAT32_ROWS


@contextlib.contextmanager
def use_product(name: str) -> Iterator[None]:
    """Inside, the product ``name`` ("velm" or "torch") is taken whatever the rule says: for tests and benchmarks."""
    if name not in PRODUCTS:
        raise ValueError(f"use_product: expected one of {', '.join(PRODUCTS)}, given {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_product() -> str | None:
    """What :func:`use_product` says, or None."""
    return _forced[-1] if _forced else None


def own_product(
    x_rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device, training: bool
) -> bool:
    """What the operators ask: :func:`faster_than_torch`, unless :func:`use_product` says otherwise."""
    if _forced:
        return forced_product() == "velm"
    return faster_than_torch(x_rows, in_features, out_features, dtype, device, training)
