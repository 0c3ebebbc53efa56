"""Late interaction: what the tokens of a query find in those of a document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import takes_torch
from velm_kernels.losses.maxsim.op import OPERATOR
from velm_kernels.losses.products import arithmetic
from velm_kernels.processors import NEVER

# Scores of tokens up to which torch's form is the faster one, without and with a gradient, see
# velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 1 << 19, 1 << 15
_DTYPES = frozenset((torch.float32, torch.bfloat16))


def maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """``sum_i max_j q_i . d_j`` of every query and every document: the score of ColBERT and ColPali.

    Args:
        queries: ``(queries, tokens, dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        documents: ``(documents, tokens of a document, dim)``, dtype of queries: the patches of pages, as an example.
        query_mask: ``(queries, tokens)``, bool: the tokens that count. Others are not read.
        document_mask: ``(documents, tokens of a document)``, bool, likewise.

    Under autocast queries and documents are cast to its dtype.

    Returns:
        ``(queries, documents)`` in float32, for float64 in float64. A document without a token that counts, and a query
        without one, give 0.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    The scores of tokens, ``(queries, documents, tokens, tokens of a document)``, exist for some documents at a time. Of
    each token of a query the place of the nearest one in a document is kept where a gradient is recorded, int32, of
    equal ones the first; backward adds those rows alone. Products and sums are in float32; without a gradient each
    score of bfloat16 is rounded before its sum, on processors that multiply bfloat16. Small calls without masks on the
    CPU are computed by torch's own operators.

    The formula is that of ColBERT (Khattab and Zaharia, 2020) and ColPali (Faysse et al., 2024).

    Example:
        >>> queries, documents = torch.randn(3, 8, 128), torch.randn(5, 1024, 128)
        >>> velm_kernels.maxsim(queries, documents).shape
        torch.Size([3, 5])
    """
    small = plain(queries, documents, query_mask, document_mask)
    if small is not None:
        return small
    if isinstance(queries, Tensor):
        queries, documents = checks.autocast(queries, documents)
    arguments = canonical(queries, documents, query_mask, document_mask)
    arguments["records"] = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    out: Tensor = OPERATOR(arguments)[0]
    return out


def plain(queries: Tensor, documents: Tensor, query_mask: Any = None, document_mask: Any = None) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if query_mask is not None or document_mask is not None:
        return None
    if not takes_torch(NEVER, queries, documents, dtype=_DTYPES) or not queries.dim() == documents.dim() == 3:
        return None
    (of_queries, tokens, dim), (of_documents, length, other) = queries.shape, documents.shape
    scores = of_queries * tokens * of_documents * length
    records = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    if dim != other or not scores * dim > 0 or scores > (SMALL_RECORDED if records else SMALL):
        return None
    dtype = torch.float32 if records else arithmetic(queries)
    rows, columns = (x.to(dtype).reshape(-1, dim) for x in (queries, documents))
    best = torch.mm(rows, columns.t()).view(-1, of_documents, length).max(2).values
    return best.view(of_queries, tokens, of_documents).sum(1, dtype=torch.float32)


def canonical(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Arguments:
    """Checks the arguments of :func:`maxsim` and returns those of the operator."""
    checks.dtype_in(
        "queries", checks.tensor("queries", queries, dims=3, layout="(queries, tokens, dim)"), checks.FLOAT_DTYPES
    )
    checks.tensor("documents", documents, dims=3, layout="(documents, tokens, dim)")
    checks.dtype_in("documents", documents, (queries.dtype,))
    checks.same_device("documents", documents, "queries", queries)
    if documents.shape[2] != queries.shape[2]:
        raise ValueError(
            f"documents: expected (documents, tokens, dim) with dim = {queries.shape[2]} as in queries "
            f"{tuple(queries.shape)}, given {tuple(documents.shape)}"
        )
    masks = {"query_mask": (query_mask, queries), "document_mask": (document_mask, documents)}
    for name, (mask, of) in masks.items():
        if mask is not None:
            checks.dtype_in(name, checks.tensor(name, mask), (torch.bool,))
            checks.same_device(name, mask, "queries", queries)
            checks.shape(name, mask, f"the first two dimensions of {name.removesuffix('_mask')}", of.shape[:2])
    return {
        "queries": queries.contiguous(),
        "documents": documents.contiguous(),
        "query_mask": None if query_mask is None else query_mask.contiguous(),
        "document_mask": None if document_mask is None else document_mask.contiguous(),
        "records": False,
    }


OPERATOR.serves("maxsim", canonical, plain)
