"""The operators of torch behind the public functions: ``torch.library.opcheck`` of every one that a call and its
gradients run, and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.operators import CALLS, IN_FLOAT32, Call
from velm_kernels import cases
from velm_kernels.backends.follow import Follower

every_call = pytest.mark.parametrize("call", CALLS, ids=str)


@every_call
def test_opcheck(call: Call) -> None:
    """Schemas and fake results, and that what has a gradient is registered for it."""
    with Follower() as follower:
        call.run(call.arguments())

    def leaf(value: object) -> object:
        is_leaf = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if is_leaf else value

    for name, arguments in follower.called:
        operator = getattr(torch.ops.velm, name).default
        if "backend" in (argument.name for argument in operator._schema.arguments):
            arguments["backend"] = ""
        has_gradients = name.endswith("_forward") and hasattr(torch.ops.velm, name.replace("_forward", "_backward"))
        test_utils = ["test_schema", "test_faketensor"]
        if has_gradients:
            arguments = tree_map(leaf, arguments)
            test_utils.append("test_autograd_registration")
        torch.library.opcheck(operator, (), arguments, test_utils=test_utils)


# Sums of rows and what is added to them are computed in the dtype they have, as torch's own operators of that kind.
NOT_CAST = {
    "gated_residual",
    "merge_attention",
    "dropout_residual",
    "masked_pool",
    "segment_pool",
    "select_tokens",
    "merge_tokens",
    "unmerge_tokens",
    "rotary",
    "splice_into",
    "splice_tokens",
    "add_at_tokens",
    "multiscale_deformable_attention",
    "topk_similarity",
    "merge_topk",
    "interpolated_embedding",
    "merge_patches",
    "pool_grid",
}
# As torch's own: from what was rounded for their products, in float32.
LOSSES = {"contrastive_loss", "mutual_information", "sigmoid_loss"}


@every_call
def test_autocast(call: Call) -> None:
    """As if what has a gradient had come in autocast's dtype, or as if there were no autocast."""
    arguments = call.arguments()
    with torch.autocast("cpu", torch.bfloat16):
        got = call.run(arguments)
    given = arguments
    if call.operator not in NOT_CAST:
        leaves = [leaf.bfloat16() for leaf in call.leaves(arguments)]
        # A residual is added as it is.
        kept = ["residual"] if call.operator == "linear" else []
        names = call.leaf_names(arguments)
        plain = [leaf if name in kept else cast for name, leaf, cast in zip(names, call.leaves(arguments), leaves)]
        given = call.with_leaves(arguments, plain)
    expected = call.run(given)
    residual = call.operator == "linear" and "residual" in call.differentiable
    kept = call.operator in NOT_CAST | LOSSES | IN_FLOAT32 or residual
    assert got["output_0"].dtype == (torch.float32 if kept else torch.bfloat16)
    for name, value in got.items():
        if name.startswith("output_") and call.operator not in LOSSES:
            assert value.dtype == expected[name].dtype, name
        value, other = (one.masked_fill(one.isinf(), 0.0) for one in (value, expected[name]))
        # Parameters beside products are not rounded on the way.
        assert cases.relative_rms(value, other, floor=1.0) < 2**-6, name
