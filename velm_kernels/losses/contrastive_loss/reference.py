"""The written meaning of contrastive_loss, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels.losses import pairs

Optional = Tensor | None


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Optional = None,
    image_targets: Optional = None,
    text_targets: Optional = None,
    normalize: bool = True,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each image over all texts, and of each text over all images.

    ``image_targets (images, texts)`` and ``text_targets (texts, images)`` are the weights of the targets of each row;
    without them image i and text i belong together. A row whose targets are all 0 has none, and loses nothing.
    """
    scores = logits(image, text, logit_scale, logit_bias, normalize)
    return (
        cross_entropy(scores, image_targets, label_smoothing),
        cross_entropy(scores.t(), text_targets, label_smoothing),
    )


def logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Optional, normalize: bool) -> Tensor:
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    scores = logit_scale * (image @ text.t())
    return scores if logit_bias is None else scores + logit_bias


def cross_entropy(scores: Tensor, targets: Optional, label_smoothing: float) -> Tensor:
    if scores.numel() == 0:
        return scores.sum(1)
    if targets is None:
        own = torch.arange(scores.shape[0], device=scores.device)
        return F.cross_entropy(scores, own, reduction="none", label_smoothing=label_smoothing)
    # Smoothing gives nothing to a row without a target.
    has_target = (targets != 0).any(1, keepdim=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / scores.shape[1] * has_target
    return -torch.where(has_target, targets * scores.log_softmax(1), 0.0).sum(1)


def targets_of(labels: Tensor, others: Tensor) -> Tensor:
    """From labels of rows and of columns: each row's weight spread over the columns with its label, none for a label
    below 0."""
    same = pairs.same_label(labels, others)
    return same / same.sum(1, keepdim=True).clamp(min=1)
