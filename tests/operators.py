"""The cases of all operators (``velm_kernels/cases.py``), as tests over all of them take them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

import velm_kernels
from velm_kernels import cases
from velm_kernels.cases import Arguments as Arguments
from velm_kernels.cases import Case as Call  # noqa: F401
from velm_kernels.cases import results as results

# What tries every promise, and what is tried for its numbers beside these.
CALLS = [case for case in cases.every() if not case.numbers_only]
FOR_NUMBERS = cases.every()

# Of 16 bits sums in float32, which stay so.
IN_FLOAT32 = {"linear_cross_entropy", "maxsim", "maxsim_contrastive_loss", "topk_similarity"}


def differentiable_results(value: Any) -> list[Tensor]:
    return [result for result in results(value) if result.requires_grad]


def public_operators() -> set[str]:
    """The names of all functions of the library that take tensors and are neither draws of random numbers alone nor
    plain torch, as decomposed_position_bias is, nor only say where something lies."""
    others = {"explain", "use_backend", "patch", "unpatch", "make_sketch", "sample_hard_negatives"}
    others |= {"decomposed_position_bias"}
    others |= {"grid_positions", "resize_taps"}
    return {name for name in velm_kernels.__all__ if inspect.isfunction(getattr(velm_kernels, name))} - others


assert {call.operator for call in CALLS} == public_operators()
