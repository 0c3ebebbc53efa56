"""The nearest rows of a database, without a matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride
from velm_kernels.retrieval.topk_similarity.op import OPERATOR
from velm_kernels.retrieval.topk_similarity.reference import METRICS


def topk_similarity(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: str = "dot",
    valid: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``database`` that are nearest to each query: ``torch.topk(queries @ database.T, k)`` whose
    scores never exist all at once, as the flat indices of faiss (Johnson et al., 2019) search.

    Args:
        queries: ``(queries, dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        database: ``(rows, dim)``, likewise; float64 goes with float64. Where the dtypes are not the same, queries are
            multiplied in float32. Rows may be any distance apart, so that a part of the columns is not copied.
        k: how many, from 0 on.
        metric: ``"dot"``, ``q . d``, and ``"cosine"``, ``q . d / (|q| |d|)`` with norms of at least 1e-12: the greatest
            come first. ``"l2"``, ``|q - d|^2``: the least come first, as in faiss.
        valid: ``(rows,)``, bool: the rows that can be found. Others are not read.
        ids: ``(rows,)``, int64, of any values that are not negative: what indices name rows by, in place of their
            numbers.

    Returns:
        ``(values, indices)``, both ``(queries, k)``: values in float32 (for float64 in float64) from the best on, and
        int64 indices. Of equal values the lower index comes first, however the rows are ordered. NaN is the greatest
        value, as for ``torch.topk``. Where fewer than ``k`` rows are valid, -inf (inf for ``"l2"``) and -1 follow, as
        in faiss.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or k or metric is not as above.

    Products and sums are in float32. A value depends on its query and its row alone, not on how many others there are:
    what is found in parts of a database is, by :func:`velm_kernels.merge_topk`, what is found in all of it.

    The gradient of values reaches the queries and the rows that were found, which are added up by index in one order;
    rows that were not found get 0. Indices have none. Autocast changes nothing.

    Example:
        >>> database = torch.eye(4)
        >>> values, indices = velm_kernels.topk_similarity(torch.tensor([[0.5, 0.0, 2.0, 0.0]]), database, k=3)
        >>> values, indices
        (tensor([[2.0000, 0.5000, 0.0000]]), tensor([[2, 0, 1]]))
    """
    arguments = canonical(queries, database, k, metric, valid, ids)
    values, places = OPERATOR(arguments)
    if ids is None or ids.shape[0] == 0:
        # Backward reads places, and whoever called may write on what is returned.
        return values, places.clone() if values.requires_grad else places
    return values, torch.where(places < 0, places, ids[places.clamp(min=0)])


def canonical(
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: str = "dot",
    valid: Tensor | None = None,
    ids: Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`topk_similarity` and returns those of the operator."""
    checks.dtype_in("queries", checks.tensor("queries", queries, dims=2, layout="(queries, dim)"), checks.FLOAT_DTYPES)
    checks.tensor("database", database, dims=2, layout="(rows, dim)")
    wide = (torch.float64,) if queries.dtype == torch.float64 else checks.FLOAT_DTYPES[:3]
    checks.dtype_in("database", database, wide)
    checks.same_device("database", database, "queries", queries)
    if database.shape[1] != queries.shape[1]:
        raise ValueError(
            f"database: expected (rows, dim) with dim = {queries.shape[1]} as in queries {tuple(queries.shape)}, "
            f"given {tuple(database.shape)}"
        )
    k = checks.integer("k", k, 0, 2**31 - 1)
    checks.choice("metric", metric, METRICS)
    for name, given, dtype in (("valid", valid, torch.bool), ("ids", ids, torch.int64)):
        if given is not None:
            checks.dtype_in(name, checks.tensor(name, given), (dtype,))
            checks.same_device(name, given, "database", database)
            checks.shape(name, given, "(rows,)", database.shape[:1])
    if queries.dtype != database.dtype:
        queries = queries.float()
    return {
        "queries": unit_last_stride(queries),
        "database": unit_last_stride(database),
        "valid": None if valid is None else valid.contiguous(),
        "ids": None if ids is None else ids.contiguous(),
        "k": k,
        "metric": metric,
    }


OPERATOR.serves("topk_similarity", canonical)
