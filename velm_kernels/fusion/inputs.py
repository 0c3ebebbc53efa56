"""Several inputs whose leading dimensions broadcast: what the fusions of 2 to 4 modalities check."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from velm_kernels import checks
from velm_kernels.layout import leading_dims

MOST_INPUTS = 4


def checked_inputs(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None, tuple[int, ...]]:
    """The arguments in the dtype of autocast, checked but for the shapes of weight and bias, and the leading
    dimensions of the result."""
    inputs = checks.tensors("inputs", inputs, 2, MOST_INPUTS)
    for name, value in (("weight", weight), ("bias", bias)):
        if name == "weight" or value is not None:
            checks.tensor(name, value)
    *inputs, weight, bias = checks.autocast(*inputs, weight, bias)
    for m, x in enumerate(inputs):
        checks.dtype_in(f"inputs[{m}]", x, (inputs[0].dtype,) if m else checks.FLOAT_DTYPES)
        checks.same_device(f"inputs[{m}]", x, "inputs[0]", inputs[0])
        if x.dim() == 0:
            raise ValueError(f"inputs[{m}]: expected (..., d), given ()")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.dtype_in(name, value, (inputs[0].dtype,))
            checks.same_device(name, value, "inputs[0]", inputs[0])
    try:
        leading = checks.broadcast_shapes(*leading_dims(inputs))
    except RuntimeError:
        raise ValueError(f"inputs: expected leading dimensions that broadcast, given {checks.shapes(inputs)}") from None
    return list(inputs), weight, bias, leading
