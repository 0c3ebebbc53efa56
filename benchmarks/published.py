"""Published fusion modules of block-bootstrap-pytorch beside this library's, which have the same weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import velm_kernels
from benchmarks import peers
from benchmarks.harness import Case, Inputs


def _module(
    name: str, kind: str, batch: int, regions: int, dims: tuple[int, int], out: int, **options: Any
) -> Case | None:
    """The fusion of a question with a picture, or with every region of it: their own takes rows, so that the question
    goes through its projection once for every region."""
    fusions = peers.block_fusions()
    if fusions is None:
        return None
    # The weights are inputs, and the modules themselves need none.
    with torch.device("meta"):
        theirs: nn.Module = getattr(fusions, kind)(list(dims), out, **options)
        ours: nn.Module = getattr(velm_kernels, kind)(list(dims), out, **options)
    sizes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        picture = (batch, regions, dims[1]) if regions else (batch, dims[1])
        # As large as those that torch.nn.Linear begins with.
        weights = {key: randn(*size) * (3 * size[-1]) ** -0.5 for key, size in sizes.items()}
        return {"question": randn(batch, dims[0]), "picture": randn(*picture)} | weights

    def eager(question: Tensor, picture: Tensor, **weights: Tensor) -> Tensor:
        if not regions:
            return functional_call(theirs, weights, ([question, picture],))
        rows = [question[:, None].expand(-1, regions, -1).flatten(0, 1), picture.flatten(0, 1)]
        return functional_call(theirs, weights, (rows,)).view(batch, regions, -1)

    def velm(question: Tensor, picture: Tensor, **weights: Tensor) -> Tensor:
        return functional_call(ours, weights, ([question, picture],))

    rows = batch * max(1, regions)
    # A multiplication for every weight and row, but for those of the question's own projection.
    projection = math.prod(sizes["linear0.weight"])
    matrices = sum(math.prod(size) for size in sizes.values() if len(size) > 1)
    product = 2.0 * (rows * (matrices - projection) + batch * projection)
    weights = sum(math.prod(size) for size in sizes.values())
    traffic = float(weights + batch * dims[0] + rows * (dims[1] + out))
    return Case(
        operator=kind,
        name=name,
        shape=f"{batch}{f' x {regions} regions' if regions else ''}, {dims[0]} and {dims[1]} -> {out}",
        make=make,
        wanted=("question", "picture", *sizes),
        ways={"eager": eager, "velm": velm},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(rows * options.get("mm_dim", 1600) * max(options.get("factor", 1), options.get("rank", 1))),
        dtypes=(torch.float32,),
    )


def cases() -> list[Case]:
    smooth = {"activ_input": "tanh", "activ_output": None}
    found = [
        _module("linear-sum", "LinearSum", 256, 0, (2400, 2048), 1000, mm_dim=1200),
        _module("mlb", "MLB", 256, 0, (2400, 2048), 1000, mm_dim=1200, **smooth),
        _module("mlb-regions", "MLB", 16, 36, (2400, 2048), 2, mm_dim=1200, **smooth),
        _module("mfb", "MFB", 256, 0, (2400, 2048), 1000, mm_dim=1000, factor=5, normalize=True, **smooth),
        _module("mfb-regions", "MFB", 16, 36, (2400, 2048), 2, mm_dim=1000, factor=5, **smooth),
        _module("mutan", "Mutan", 256, 0, (2400, 2048), 1000, mm_dim=360, rank=10),
        _module("mutan-regions", "Mutan", 16, 36, (2400, 2048), 2, mm_dim=360, rank=10),
        _module("block", "Block", 256, 0, (4800, 2048), 3000, mm_dim=1600, chunks=20, rank=15),
        _module("block-tucker", "BlockTucker", 64, 0, (2400, 2048), 1000, mm_dim=800, chunks=20),
        _module("tucker", "Tucker", 64, 0, (2400, 2048), 1000, mm_dim=160),
    ]
    return [case for case in found if case is not None]
