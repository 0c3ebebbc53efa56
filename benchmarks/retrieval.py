"""The nearest rows of a database."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Function, Inputs, published

K = 10


def topk_similarity_case(queries: int, rows: int, dim: int) -> Case:
    def eager(queries: Tensor, database: Tensor) -> Tensor:
        return torch.topk(queries @ database.T, K).values

    def velm(queries: Tensor, database: Tensor) -> Tensor:
        return velm_kernels.topk_similarity(queries, database, K)[0].to(queries.dtype)

    def make(generator: torch.Generator) -> Inputs:
        return {
            "queries": torch.randn(queries, dim, generator=generator, dtype=torch.float64),
            "database": torch.randn(rows, dim, generator=generator, dtype=torch.float64),
        }

    ways: dict[str, Any] = {"eager": eager, "velm": velm}
    if importlib.util.find_spec("faiss") is not None:
        ways["faiss"] = _faiss()
    return Case(
        operator="topk_similarity",
        name=f"search-{queries}",
        shape=f"{K} of {rows} x {dim}, {queries} queries",
        make=make,
        wanted=(),
        ways=ways,
        flops=2.0 * queries * rows * dim,
        traffic=float((rows + queries) * dim),
        backward_flops=None,
        work=float(rows * dim),
        dtypes=(torch.float32, torch.bfloat16),
        reads_only=True,
    )


def _faiss() -> Function:
    """The flat index of faiss, which copies its database once."""
    indices: dict[int, Any] = {}

    def search(queries: Tensor, database: Tensor) -> Tensor:
        import faiss

        place = database.data_ptr()
        if place not in indices:
            indices.clear()
            indices[place] = faiss.IndexFlatIP(database.shape[1])
            indices[place].add(database.float().numpy())
        values, _ = indices[place].search(queries.float().numpy(), K)
        return torch.from_numpy(values).to(queries.dtype)

    return search


def cases() -> list[Case]:
    size = published()["search"]
    return [topk_similarity_case(**{**size, "queries": queries}) for queries in (1, 8, size["queries"], 1024)]
