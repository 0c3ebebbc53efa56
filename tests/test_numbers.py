"""The numbers rule for every operator, output and gradient: inputs of three sizes, three dtypes, against float64.

More draws: ``VELM_TEST_DRAWS=20 python -m pytest tests/test_numbers.py``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend_with_cuda
from tests.numbers import ULPS, relative_rms
from tests.operators import CALLS, Call, results

pytestmark = pytest.mark.quick

DRAWS = int(os.environ.get("VELM_TEST_DRAWS", "1"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What CUDA does not have: linear, and pixel_shuffle_tokens, which is made of it.
NOT_THERE = {"linear", "pixel_shuffle_tokens"}


def outputs_and_gradients(call: Call, arguments: dict[str, Any], exact: bool = False) -> list[Tensor]:
    given = call.requiring_gradients(arguments)
    found = call.exact(given) if exact else results(call.function(**given))
    found = tuple(out for out in found if out.is_floating_point())
    generator = torch.Generator().manual_seed(1)
    outs, upstream = [], []
    for out in found:
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        # On the grid of 16 bits, so that it is the same in every dtype.
        if out.requires_grad:
            outs.append(out)
            upstream.append(weights.bfloat16().to(out.dtype))
    gradients = torch.autograd.grad(outs, call.leaves(given), upstream, allow_unused=True)
    return [out.detach() for out in found] + [g for g in gradients if g is not None]


# What is scaled, if not everything: scores that are products of four factors would get a hundred times as large.
SCALED = {"attention_pool": ("x", "query")}


def scaled(call: Call, arguments: dict[str, Any], factor: float) -> dict[str, Any]:
    chosen = SCALED.get(call.operator)
    if chosen is not None:
        return arguments | {name: factor * arguments[name] for name in chosen}
    return call.with_leaves(arguments, [factor * leaf for leaf in call.leaves(arguments)])


def nudged(call: Call, arguments: dict[str, Any], eps: float, seed: int) -> dict[str, Any]:
    """Arguments that are off by as much as rounding them could make them."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for leaf in call.leaves(arguments):
        noise = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 0.5
        leaves.append(leaf * (1 + eps * noise))
    return call.with_leaves(arguments, leaves)


def worst(call: Call, backend: Backend, dtype: torch.dtype, size: float, seed: int) -> list[str]:
    arguments = scaled(call, call.arguments(dtype, seed=seed), size)
    wide = call.with_leaves(arguments, [leaf.double() for leaf in call.leaves(arguments)])
    exact = outputs_and_gradients(call, wide, exact=True)
    try:
        plain = outputs_and_gradients(call, arguments, exact=True)
    except RuntimeError:
        # There is no plain form in 16 bits where torch has none, as of Fourier transforms, or where some arguments are
        # wider.
        with velm_kernels.use_backend("reference"):
            plain = outputs_and_gradients(call, arguments)
    # A sum whose terms cancel is as inexact as its terms: as what it would be of other roundings of the inputs.
    eps = torch.finfo(dtype).eps
    other = outputs_and_gradients(call, nudged(call, wide, eps, seed), exact=True)
    with backend.use():
        got = outputs_and_gradients(call, arguments)
    failures = []
    for i, (value, rounded, moved, true) in enumerate(zip(got, plain, other, exact, strict=True)):
        finite = true.isfinite()
        value, rounded, moved, true = (x.where(finite, 0.0) for x in (value, rounded, moved, true))
        if not value.numel():
            continue
        error, of_plain = relative_rms(value, true), relative_rms(rounded.nan_to_num(0.0, 0.0, 0.0), true)
        # Rounding a value that is itself representable counts once, that of the result once more.
        limit = 2 * max(of_plain, relative_rms(moved, true)) + ULPS * eps
        if not error <= limit:
            where = f"{dtype}, size {size}, draw {seed}, result {i}"
            failures.append(f"{where}: {error:.2g}, plain torch {of_plain:.2g}, limit {limit:.2g}")
    return failures


@pytest.mark.parametrize("call", CALLS, ids=str)
@every_backend_with_cuda
def test_numbers(backend: Backend, call: Call) -> None:
    if backend.name in ("cuda", "device_on_host") and call.operator in NOT_THERE:
        pytest.skip("not on this backend")
    failures = []
    for seed in range(DRAWS):
        for dtype in DTYPES:
            for size in (0.1, 1.0, 3.0):
                failures += worst(call, backend, dtype, size, seed)
    assert not failures, "\n".join(failures)
