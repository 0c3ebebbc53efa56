"""topk_similarity on the CPU: all of it in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.retrieval.topk_similarity.reference import METRICS

# metric is a place in METRICS.
cpu.declare(
    "topk_similarity(Tensor queries, Tensor database, Tensor? valid, Tensor? ids, int metric, Tensor(a!) values, "
    "Tensor(b!) places) -> ()"
)
cpu.declare(
    "topk_gradients(Tensor grad, Tensor queries, Tensor database, Tensor places, int metric, "
    "Tensor(a!)? grad_queries, Tensor(b!)? grad_database) -> ()"
)

Kernel = Callable[[str], Callable[..., Any]]


def topk_similarity_forward(
    kernel: Kernel,
    queries: Tensor,
    database: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    k: int,
    metric: str,
    values: Tensor,
    places: Tensor,
) -> None:
    kernel("topk_similarity")(queries, database, valid, ids, METRICS.index(metric), values, places)


def topk_similarity_backward(
    kernel: Kernel,
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    places: Tensor,
    k: int,
    metric: str,
    grad_queries: Tensor | None,
    grad_database: Tensor | None,
) -> None:
    kernel("topk_gradients")(grad, queries, database, places, METRICS.index(metric), grad_queries, grad_database)
