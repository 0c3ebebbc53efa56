"""What a wrong declaration of an operator ends in: an error that names it, never the end of the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import velm_kernels
from tests.operators import CALLS, Call
from velm_kernels.backends import cpu
from velm_kernels.backends.follow import Follower
from velm_kernels.operator import Operator


@pytest.mark.parametrize(
    "wrong",
    [
        {"differentiable": ("y",)},
        {"differentiable": ("x",), "saves": ("gate",)},
        {"differentiable": ("x",), "saves": {"gate": ("x",)}},
        {"differentiable": ("x",), "saves": ("out",), "saves_only_if": {"x": lambda a: True}},
        {"results": ("out", "stats"), "without_gradient": ("stat",)},
        {"results": ("out", "stats"), "may_be_absent": ("x",)},
        {"differentiable": ("x",), "gradient_shapes": {"out": lambda a: a.x}},
        {"forward_only": ("mode",)},
    ],
)
def test_names_that_there_are_not(wrong: dict[str, Any]) -> None:
    field = [*wrong][-1]
    with pytest.raises(ValueError, match=rf"^{field} of misspelt: expected one of .*, given '\w+'$"):
        Operator("misspelt", "Tensor x", shapes=lambda a: a.x, reference=lambda x: x, **wrong)
    assert not hasattr(torch.ops.velm, "misspelt_forward")


# What backward reads for the gradients that are wanted in these calls.
NEEDED = {
    "film": {"x", "gamma"},
    "gated_residual": {"x"},
    "masked_pool-logsumexp": {"x"},
    "masked_pool-gem": {"x"},
    "attention_pool-packed": {"cu_seqlens"},
    "cross_attention-everything": {"range_stop"},
    "cross_attention_varlen": {"cu_seqlens_k"},
}


@pytest.mark.skipif(not cpu.in_use(), reason="no library for the CPU")
@pytest.mark.parametrize("call", [call for call in CALLS if str(call) in NEEDED], ids=str)
def test_kernels_refuse_to_compute_without_what_they_read(call: Call) -> None:
    with velm_kernels.use_backend("cpu"), Follower() as follower:
        call.run(call.arguments())
    refused = set()
    for name, arguments in follower.called:
        operator = getattr(torch.ops.velm, name).default
        if not name.endswith("_backward"):
            continue
        for argument in operator._schema.arguments:
            if argument.name in NEEDED[str(call)] and arguments.get(argument.name) is not None:
                with pytest.raises(RuntimeError, match=f"{argument.name}: expected a tensor, given None"):
                    operator(**arguments | {argument.name: None, "backend": "cpu"})
                refused.add(argument.name)
    assert refused == NEEDED[str(call)]
