"""The written meaning of sigmoid_loss, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    matches: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """For each image the sum over texts of ``-log sigmoid(y * logit)``, y 1 for a match and -1 else.

    ``matches (images, texts)``, bool; without it image i and text i belong together.
    """
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = logit_scale * (image @ text.t())
    if logit_bias is not None:
        logits = logits + logit_bias
    if matches is None:
        matches = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    return F.softplus(torch.where(matches, -logits, logits)).sum(1)
