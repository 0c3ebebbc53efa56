"""The written meaning of mutual_information, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sums(x: Tensor, y: Tensor, scale: Tensor, clip: float = math.inf) -> tuple[Tensor, Tensor]:
    """For each pair its score, and the logarithm of the mean of the exponentials of its x's scores with all other y,
    each clipped."""
    return sums_of(scale * (x @ y.t()), clip)


def sums_of(scores: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The same of the matrix of scores."""
    own = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    others = scores if clip == math.inf else scores.clamp(-clip, clip)
    return scores.diagonal(), log_mean_exp(others.masked_fill(own, -math.inf), scores.shape[0] - 1)


def log_mean_exp(values: Tensor, count: int) -> Tensor:
    """Over the last dimension, of ``count`` of its values, where the others are -inf. A mean near 1 is near 1, where a
    log-sum-exp and the logarithm of a count would be differences of larger ones."""
    highest = values.detach().amax(-1, keepdim=True)
    taken = torch.where(highest.isfinite(), highest, 0.0)
    return ((values - taken).exp().sum(-1) / count).log() + taken[..., 0]


def mutual_information(x: Tensor, y: Tensor, scale: Tensor, bound: str = "infonce", clip: float = 5.0) -> Tensor:
    """The bound, from all scores."""
    scores = scale * (x @ y.t())
    count = scores.shape[0]
    if count < 2:
        return 0.0 * scores.sum()
    positive = scores.diagonal()
    apart = scores[~torch.eye(count, dtype=torch.bool, device=scores.device)]
    if bound == "infonce":
        return math.log(count) + (positive - scores.logsumexp(1)).mean()
    if bound == "jsd":
        return -F.softplus(-positive).mean() - F.softplus(apart).mean()
    if bound == "smile":
        apart = apart.clamp(-clip, clip)
    log_mean = apart.logsumexp(0) - math.log(len(apart))
    return positive.mean() - ((log_mean - 1).exp() if bound == "nwj" else log_mean)
