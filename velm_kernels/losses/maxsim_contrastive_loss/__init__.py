"""The contrastive loss of late interaction."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.losses.maxsim import maxsim

REDUCTIONS = ("none", "mean", "sum")


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
    """``cross_entropy(scale * maxsim(queries, documents), labels)``: each query is to find its own document.

    This is the loss that ColBERT (Khattab and Zaharia, 2020) and ColPali (Faysse et al., 2024) are trained by, with the
    other documents of a batch as negatives.

    Args:
        queries: ``(queries, tokens, dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        documents: ``(documents, tokens of a document, dim)``, dtype of queries. Those behind the first ``queries`` are
            further negatives.
        scale: of the scores, the inverse of a temperature: a number, or a tensor with one element, with a gradient.
        query_mask, document_mask: bool, the tokens that count, as in :func:`velm_kernels.maxsim`.
        labels: ``(queries,)``, of any integer dtype: each query's document; by default the one in its place.
        label_smoothing: in [0, 1), as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Under autocast queries and documents are cast to its dtype.

    Returns:
        The loss, ``()`` or ``(queries,)``, in float32, for float64 in float64.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are fewer documents than queries and no labels; on
            the CPU, or with VELM_CHECK=1, a label is no document.

    Memory is that of :func:`velm_kernels.maxsim`.

    Example:
        >>> queries, documents = torch.randn(4, 8, 128), torch.randn(4, 1024, 128)
        >>> velm_kernels.maxsim_contrastive_loss(queries, documents, scale=0.02).shape
        torch.Size([])
    """
    label_smoothing = checks.probability("label_smoothing", label_smoothing)
    checks.choice("reduction", reduction, REDUCTIONS)
    if isinstance(scale, Tensor):
        checks.dtype_in("scale", scale, checks.FLOAT_DTYPES)
        if scale.numel() != 1:
            raise ValueError(f"scale: expected a tensor with one element, given {tuple(scale.shape)}")
        scale = scale.reshape(())
    else:
        scale = checks.number("scale", scale, -torch.inf, torch.inf, described="a finite number")
    scores = maxsim(queries, documents, query_mask, document_mask)
    if labels is None:
        if scores.shape[0] > scores.shape[1]:
            raise ValueError(
                f"documents: expected one for each of {scores.shape[0]} queries or more, given {tuple(documents.shape)}"
            )
        labels = torch.arange(scores.shape[0], device=scores.device)
    else:
        checks.dtype_in("labels", checks.tensor("labels", labels), checks.INTEGER_DTYPES)
        checks.shape("labels", labels, "(queries,)", scores.shape[:1])
        checks.same_device("labels", labels, "queries", queries)
        checks.values_between("labels", labels, 0, scores.shape[1] - 1)
        labels = labels.to(torch.int64)
    if isinstance(scale, Tensor):
        checks.same_device("scale", scale, "queries", queries)
        scale = scale.to(scores.dtype)
    return torch.nn.functional.cross_entropy(
        scale * scores, labels, label_smoothing=label_smoothing, reduction=reduction
    )
