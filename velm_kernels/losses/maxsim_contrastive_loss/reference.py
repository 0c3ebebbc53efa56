"""The meaning of maxsim_contrastive_loss in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.losses.maxsim import reference


def maxsim_contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor | float = 1.0,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The cross entropy of each query's scores over all documents."""
    scores = scale * reference.maxsim(queries, documents, query_mask, document_mask)
    if labels is None:
        labels = torch.arange(queries.shape[0], device=queries.device)
    return torch.nn.functional.cross_entropy(scores, labels, label_smoothing=label_smoothing, reduction=reduction)
