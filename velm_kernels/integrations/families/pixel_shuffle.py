"""Idefics3, SmolVLM and InternVL: image tokens made fewer and wider, in one copy where the models take two.

The result is equal to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.pooling import pixel_shuffle_tokens

from ..patching import Replacement, replaces

_IDEFICS3 = "transformers.models.idefics3.modeling_idefics3"
_SMOLVLM = "transformers.models.smolvlm.modeling_smolvlm"
_INTERNVL = "transformers.models.internvl.modeling_internvl"


def _fits(height: int, width: int, factor: int | float) -> bool:
    # A trace would keep the sides of its example, where it has numbers at all.
    if torch.jit.is_tracing():
        return False
    return isinstance(factor, int) and factor >= 1 and not height % factor and not width % factor


@replaces(_IDEFICS3, "Idefics3Connector", family="idefics3", by="pixel_shuffle_tokens")
@replaces(_SMOLVLM, "SmolVLMConnector", family="smolvlm", by="pixel_shuffle_tokens")
class Connector(Replacement):
    velm_methods = ("pixel_shuffle",)

    def pixel_shuffle(self, x: Tensor, scale_factor: int = 2) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        if x.dim() != 3 or side * side != x.shape[1] or not _fits(side, side, scale_factor):
            return self.velm_original_method("pixel_shuffle", "not a square that it divides", x, scale_factor)
        return pixel_shuffle_tokens(x, side, side, scale_factor)


@replaces(_INTERNVL, "InternVLModel", family="internvl", by="pixel_shuffle_tokens")
class Model(Replacement):
    velm_methods = ("pixel_shuffle",)

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        _, width, height, _ = vision_features.shape
        factor = round(1 / scale_factor)
        # The model refuses some, such as thirds, for the remainders of floating point.
        refused = width % scale_factor or height % scale_factor or factor * scale_factor != 1
        if refused or not _fits(width, height, factor):
            reason = "not a map that it divides"
            return self.velm_original_method("pixel_shuffle", reason, vision_features, scale_factor)
        tokens = pixel_shuffle_tokens(vision_features.flatten(1, 2), width, height, factor)
        return tokens.unflatten(1, (width // factor, height // factor))
