"""The operator multiscale_deformable_attention: weighted sums of bilinear samples of several levels."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.multiscale_deformable_attention import reference
from velm_kernels.backends import Arguments
from velm_kernels.layout import product
from velm_kernels.operator import Operator


def fits(arguments: Arguments) -> None:
    """An error where the levels do not have as many tokens as there are, wherever their sizes may be read."""
    shapes: Tensor = arguments["spatial_shapes"]
    if not checks.reads_values(shapes):
        return
    sizes, tokens = shapes.tolist(), arguments["value"].shape[1]
    if any(size < 0 for pair in sizes for size in pair) or sum(map(product, sizes)) != tokens:
        raise ValueError(
            f"spatial_shapes: expected (height, width) of levels with {tokens} tokens together, as value has, given "
            f"{' + '.join(f'{height} * {width}' for height, width in sizes) or 'none'}"
        )


# value: (batch, tokens, heads, d), last stride 1, any other strides. spatial_shapes: (levels, 2) int64, of (height,
# width); sampling_locations: (batch, queries, heads, levels, points, 2), of (x, y), and attention_weights: (batch,
# queries, heads, levels, points), any floating dtypes (float64 with float64 alone); contiguous, as what comes
# out and what comes in backward.
OPERATOR = Operator(
    "multiscale_deformable_attention",
    "Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights",
    shapes=lambda a: a.value.new_empty((*a.sampling_locations.shape[:2], a.value.shape[2] * a.value.shape[3])),
    reference=reference.multiscale_deformable_attention,
    differentiable=("value", "sampling_locations", "attention_weights"),
    saves=("value", "spatial_shapes", "sampling_locations", "attention_weights"),
    check=fits,
    triton="attention.multiscale_deformable_attention.triton",
    # A product with the share of each of four corners, their sum, a product with the weight, and the sum over samples.
    flops=lambda a: 10 * product(a.attention_weights) * a.value[3],
    # Four corners read for the gradients of shares, four added to.
    backward_flops=lambda a: 16 * product(a.attention_weights) * a.value[3],
)
