"""sigmoid_loss by tiles of scores: products by torch, and between them one pass over each tile by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.losses.products import Accumulator, Scores, gradient_of_rows, unit_rows

Optional = Tensor | None
# From a tile to sums over its rows, with the gradient in its place.
Pass = Callable[..., None]


def forward(
    kernel: Pass,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Optional,
    image_labels: Optional,
    text_labels: Optional,
    normalize: bool,
    of_rows: bool,
    make: bool,
    loss: Tensor,
    made_image: Optional,
    made_text: Optional,
    made_factors: Optional,
) -> None:
    given = (image, text, scale, bias, image_labels, text_labels, normalize)
    sums = _pass(kernel, *given, None, make, made_image, made_text, made_factors)
    loss.copy_(sums if of_rows else sums.sum())


def backward(
    kernel: Pass,
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Optional,
    image_labels: Optional,
    text_labels: Optional,
    made_image: Tensor,
    made_text: Tensor,
    made_factors: Tensor,
    normalize: bool,
    of_rows: bool,
    make: bool,
    grad_image: Optional,
    grad_text: Optional,
    grad_scale: Optional,
    grad_bias: Optional,
) -> None:
    if make:
        of = (made_image, grad_image), (made_text, grad_text)
        for made, to in (*of, (made_factors[0], grad_scale), (made_factors[1], grad_bias)):
            if to is not None:
                torch.mul(made, grad, out=to)
        return
    weights = grad if of_rows else grad.expand(image.shape[0]).contiguous()
    of_factors = grad.new_empty((2,))
    given = (image, text, scale, bias, image_labels, text_labels, normalize)
    _pass(kernel, *given, weights, True, grad_image, grad_text, of_factors)
    for to, value in zip((grad_scale, grad_bias), of_factors, strict=True):
        if to is not None:
            to.copy_(value)


def _pass(
    kernel: Pass,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Optional,
    image_labels: Optional,
    text_labels: Optional,
    normalize: bool,
    weights: Optional,
    gradients: bool,
    grad_image: Optional,
    grad_text: Optional,
    of_factors: Optional,
) -> Tensor:
    """The loss of each image; with ``gradients`` also those of what is given, of scale and bias in ``of_factors``."""
    (rows, row_norms), (columns, column_norms) = unit_rows(image, normalize), unit_rows(text, normalize)
    sums = image.new_zeros((2, len(image)), dtype=torch.float32)
    # The gradient of the scale is a sum over that of one of the two.
    of_image = Accumulator(rows, grad_image, gradients and (grad_image is not None or grad_text is None))
    of_text = Accumulator(columns, grad_text, gradients and grad_text is not None)
    for r, c, tile in Scores(rows, columns):
        labels: Any = (None, None)
        if image_labels is not None and text_labels is not None:
            labels = image_labels[r], text_labels[c]
        weight = None if weights is None else weights[r]
        kernel(tile, scale, bias, r.start - c.start, *labels, weight, gradients, sums[:, r])
        of_image.add(tile, columns[c], r)
        of_text.add(tile.t(), rows[r], c)
    total = None
    for one, unit, norms, to in ((of_image, rows, row_norms, grad_image), (of_text, columns, column_norms, grad_text)):
        if (found := one.result()) is not None:
            total = gradient_of_rows(found, unit, norms if normalize else None, scale, to)
    if of_factors is not None and total is not None:
        of_factors[0] = total
        torch.sum(sums[1], 0, out=of_factors[1])
    return sums[0]
