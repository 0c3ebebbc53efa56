"""The operator sigmoid_loss: the losses of all pairs, summed, and where nothing but their sum is asked for the
gradients with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.losses import pairs
from velm_kernels.losses.sigmoid_loss import reference
from velm_kernels.operator import Operator


def meaning(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    normalize: bool,
    of_rows: bool,
    make: bool,
) -> tuple[Tensor | None, ...]:
    matches = None
    if image_labels is not None and text_labels is not None:
        matches = pairs.same_label(image_labels, text_labels)
    losses = reference.sigmoid_loss(image, text, logit_scale, logit_bias, matches, normalize)
    # The reference's own backward reads no gradient that was made.
    made = [image.new_zeros(image.shape), text.new_zeros(text.shape), image.new_zeros(2)] if make else [None] * 3
    return losses if of_rows else losses.sum(), *made


def _shapes(a: Any) -> tuple[Tensor | None, ...]:
    wide = torch.promote_types(a.image.dtype, torch.float32)
    loss = a.image.new_empty(a.image.shape[:1] if a.of_rows else (), dtype=wide)
    if not a.make:
        return loss, None, None, None
    # float16 has no room for gradients before they are multiplied by the scale of a loss.
    dtype = torch.float32 if a.image.dtype == torch.float16 else a.image.dtype
    return (
        loss,
        a.image.new_empty(a.image.shape, dtype=dtype),
        a.text.new_empty(a.text.shape, dtype=dtype),
        a.image.new_empty((2,), dtype=wide),
    )


def _products(a: Any) -> int:
    return int(2 * a.image[0] * a.image[1] * a.text[0])


def _backward_products(a: Any) -> int:
    of_image, of_text, of_scale = (bool(a.wanted >> bit & 1) for bit in range(3))
    if not a.of_rows:
        return 0
    return _products(a) * (1 + (of_image or (of_scale and not of_text)) + of_text)


# image (images, d), text (texts, d), any row stride, last stride 1, one dtype; logit_scale, logit_bias () float32;
# labels int32 from 0, of both or neither, below 0 for none. loss () or with of_rows (images,), float32; what is made,
# if `make`, are the gradients of that sum: of image, of text, and (2,) of scale and bias.
OPERATOR = Operator(
    "sigmoid_loss",
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, Tensor? image_labels, Tensor? text_labels, "
    "bool normalize, bool of_rows, bool make",
    shapes=_shapes,
    reference=meaning,
    results=("loss", "made_image", "made_text", "made_factors"),
    may_be_absent=("made_image", "made_text", "made_factors"),
    without_gradient=("made_image", "made_text", "made_factors"),
    differentiable=("image", "text", "logit_scale", "logit_bias"),
    # With what is made image and text are read by second derivatives alone.
    saves=(
        "image",
        "text",
        "logit_scale",
        "logit_bias",
        "image_labels",
        "text_labels",
        "made_image",
        "made_text",
        "made_factors",
    ),
    triton="losses.sigmoid_loss.triton",
    cpu="losses.sigmoid_loss.cpu",
    cuda=False,
    flops=_products,
    backward_flops=_backward_products,
)
# One pass over a tile (rows, columns) of products: adds losses of its rows, and with `gradients` the gradients, which
# are left in its place, to sums (2, rows) of any row stride. The pair of row i is column i + diagonal.
cpu.declare(
    "sigmoid_pass(Tensor(a!) tile, Tensor scale, Tensor? bias, int diagonal, Tensor? row_labels, "
    "Tensor? column_labels, Tensor? weights, bool gradients, Tensor(b!) sums) -> ()"
)
