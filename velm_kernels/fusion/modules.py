"""Modules that join two modalities."""

from __future__ import annotations

from torch import Tensor, nn

from velm_kernels.fusion.bilinear import bilinear


class Bilinear(nn.Bilinear):
    """``torch.nn.Bilinear`` on :func:`velm_kernels.bilinear`: constructor, state_dict, initialisation and result are
    the same.

    Shape:
        ``(..., in1_features)`` and ``(..., in2_features)`` to ``(..., out_features)``. Leading dimensions broadcast,
        and ``(batch, in1_features)`` goes with ``(batch, regions, in2_features)`` too.
    """

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return bilinear(input1, input2, self.weight, self.bias)
