"""sigmoid_loss over the pairs of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from velm_kernels.losses.products import Accumulator, Scores, gradient_of_rows, unit_rows
from velm_kernels.losses.ring import ELSEWHERE, Ring, kernel

Optional = Tensor | None


class SigmoidLoss(torch.autograd.Function):
    """The sum of the losses of this process's images over all texts; its gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Optional,
        labels: tuple[Tensor, Tensor] | None,
        normalize: bool,
        ring: Ring,
    ) -> Tensor:
        (rows, row_norms), (columns, column_norms) = unit_rows(image, normalize), unit_rows(text, normalize)
        sums = image.new_zeros((2, len(image)), dtype=torch.float32)
        gradients = any(ctx.needs_input_grad[:4])
        run = kernel("sigmoid_pass", "sigmoid_loss", image)
        made = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (image, text)]
        of_rows = Accumulator(rows, made[0], gradients)

        def visit(rank: int, columns: Tensor, total: Tensor | None = None) -> None:
            of_columns = Accumulator(columns, total, gradients, begun=True)
            of_labels: Any = (None, None)
            if labels is not None:
                of_labels = ring.part(labels[0], 0, ring.rank), ring.part(labels[1], 1, rank)
            for r, c, tile in Scores(rows, columns):
                diagonal = r.start - c.start if rank == ring.rank else ELSEWHERE
                both = (None, None) if labels is None else (of_labels[0][r], of_labels[1][c])
                run(tile, scale, bias, diagonal, *both, None, gradients, sums[:, r])
                of_rows.add(tile, columns[c], r)
                of_columns.add(tile.t(), rows[r], c)

        start = [(columns, 0), (made[1].zero_(), 0)] if gradients else [(columns, 0)]
        back = ring.round(start, visit)
        if gradients:
            of_images = of_rows.result()
            assert of_images is not None
            of_scale = gradient_of_rows(of_images, rows, row_norms if normalize else None, scale, made[0])
            gradient_of_rows(back[1], columns, column_norms if normalize else None, scale, back[1])
            ctx.save_for_backward(made[0], back[1], of_scale, None if bias is None else sums[1].sum())
            ctx.dtype = image.dtype
        return sums[0].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        image, text, of_scale, of_bias = ctx.saved_tensors
        rows = [(grad * made).to(ctx.dtype) for made in (image, text)]
        return *rows, grad * of_scale, None if of_bias is None else grad * of_bias, None, None, None
