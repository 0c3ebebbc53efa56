"""The meaning of linear_cross_entropy in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    reduction: str = "mean",
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``cross_entropy(hidden weight^T + bias, targets)``; what is not labelled is not read, and gives 0."""
    if shift:
        targets = shifted(targets, ignore_index)
    labelled = targets != ignore_index
    # Twice, so that neither a row that is not labelled nor an infinite weight reaches the other.
    logits = hidden.masked_fill(~labelled[..., None], 0.0) @ weight.transpose(0, 1)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~labelled[..., None], 0.0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = torch.log_softmax(logits, -1)
    places = targets.masked_fill(~labelled, 0).to(torch.int64)
    # Without a vocabulary there is no row with a label.
    of_targets = log_probabilities.gather(-1, places[..., None])[..., 0] if weight.shape[0] else logits.sum(-1)
    loss = -of_targets
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean(-1)
    loss = loss.masked_fill(~labelled, 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / labelled.sum()
    if not return_logprobs:
        return loss
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return loss, of_targets.masked_fill(~labelled, 0.0), entropy.masked_fill(~labelled, 0.0)


def shifted(targets: Tensor, ignore_index: int) -> Tensor:
    """The target of each position as that of its predecessor; the last position has none."""
    last = targets.new_full((*targets.shape[:-1], min(1, targets.shape[-1])), ignore_index)
    return torch.cat([targets[..., 1:], last], -1)
