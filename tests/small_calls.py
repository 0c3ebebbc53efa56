"""Small calls that may be left to torch, and larger ones of the same functions, for tests/test_small_calls.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import velm_kernels


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Small:
    """A public function that may leave a small call to torch: its arguments for a size and a function that draws, a
    size on the small side of its rule and one on the other, or 0 where that takes long."""

    function: str
    make: Callable[[int, Callable[..., Tensor]], dict[str, Any]]
    few: int
    many: int

    def call(self, arguments: dict[str, Any]) -> Any:
        return getattr(velm_kernels, self.function)(**arguments)

    def arguments(self, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> Tensor:
            # Sums of magnitudes do not cancel: their roots are as exact as they are.
            drawn = torch.randn(shape, generator=generator)
            return (drawn.abs() + 0.1 if self.function == "factorized_pool" else drawn).to(dtype)

        return self.make(n, normal)


def _lengths(batch: int, most: int) -> Tensor:
    return most - torch.arange(batch) % 2


def _pooled(mode: str) -> Callable[..., dict[str, Any]]:
    return lambda n, normal: {"x": normal(4, n, 8), "lengths": _lengths(4, n), "mode": mode}


def _masked(mode: str) -> Callable[..., dict[str, Any]]:
    # The last row has no token.
    def make(n: int, normal: Any) -> dict[str, Any]:
        mask = (torch.arange(n) + torch.arange(4)[:, None]) % 3 > 0
        mask[3] = False
        return {"x": normal(4, n, 8), "mask": mask, "mode": mode}

    return make


def _of_queries(shape: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
    def make(n: int, normal: Any) -> dict[str, Any]:
        weights = {name: 0.3 * normal(16, 12) for name in ("key_weight", "value_weight")}
        biases = {"key_bias": normal(16), "value_bias": normal(16)}
        return {"x": normal(2, n, 12), "query": normal(*shape, 16), "heads": 2} | weights | biases

    return make


def _sketched(n: int, normal: Any) -> dict[str, Any]:
    sketches = {f"sketch_{name}": velm_kernels.make_sketch(size, 32, seed=size) for name, size in (("x", 6), ("y", 9))}
    return {"x": normal(2, 6), "y": normal(2, n, 9), "dim": 32} | sketches


def _spliced(function: str) -> Callable[..., dict[str, Any]]:
    # Of one sequence nothing is a picture.
    def make(n: int, normal: Any) -> dict[str, Any]:
        mask = (torch.arange(n) + torch.arange(3)[:, None]) % 3 > 0
        mask[1] = False
        features = {"features": normal(int(mask.sum()), 8)}
        if function == "splice_tokens":
            ids = (7 * torch.arange(3 * n) % 11).view(3, n).masked_fill(mask, 99)
            return {"token_ids": ids, "embedding_weight": normal(11, 8), "image_token_id": 99} | features
        return {"embeddings" if function == "splice_into" else "hidden": normal(3, n, 8), "mask": mask} | features

    return make


def _scored(x: str, y: str, factors: tuple[str, ...], **options: Any) -> Callable[..., dict[str, Any]]:
    return lambda n, normal: {
        x: normal(n, 8),
        y: normal(n, 8),
        **{name: 0.5 * normal(1)[0] for name in factors},
        **options,
    }


def _labelled(bias: bool = False, **options: Any) -> Callable[..., dict[str, Any]]:
    def make(n: int, normal: Any) -> dict[str, Any]:
        targets = (7 * torch.arange(2 * n) % (n + 7)).view(2, n)
        given = {"hidden": normal(2, n, 8), "weight": normal(n + 7, 8), "targets": targets}
        return given | ({"bias": normal(n + 7)} if bias else {}) | options

    return make


def _tied(n: int, normal: Any) -> dict[str, Any]:
    # Equal scores, infinities and NaN: the first of equal ones is taken.
    scores = (normal(3, n) * 2).round()
    scores[:, ::5], scores[:, 1::7], scores[:, 2::9] = torch.nan, torch.inf, -torch.inf
    return {"x": normal(3, n, 8), "scores": scores, "k": n // 2}


CALLS: dict[str, Small] = {
    "film": Small(
        "film", lambda n, draw: {"x": draw(2, n, 8), "gamma": draw(2, 8), "beta": draw(2, 8), "gamma_offset": 1.0},
        3, 40000,
    ),
    "film of pixels": Small(
        "film",
        lambda n, draw: {"x": draw(2, 8, n, 2), "gamma": draw(2, 8), "beta": draw(2, 8), "channels_first": True},
        3, 20000,
    ),
    "film for all": Small(
        "film", lambda n, draw: {"x": draw(2, n, 8), "gamma": draw(8), "beta": draw(8)}, 3, 40000
    ),
    "weighted_sum": Small(
        "weighted_sum", lambda n, draw: {"features": [draw(2, n, 8), draw(2, n, 8)], "weights": draw(2, 2)}, 3, 20000
    ),
    "weighted_sum of regions": Small(
        "weighted_sum",
        lambda n, draw: {"features": [draw(2, 8), draw(2, n, 8), draw(2, n, 8)], "weights": draw(3)}, 3, 20000,
    ),
    "gated_residual": Small(
        "gated_residual", lambda n, draw: {"residual": draw(n, 8), "x": draw(n, 8), "gate": draw(1)}, 3, 9000
    ),
    "gated_residual of rows": Small(
        "gated_residual",
        lambda n, draw: {
            "residual": draw(2, n, 8), "x": draw(2, n, 8), "gate": draw(1)[0], "row_mask": draw(2, n) > 0
        },
        3, 5000,
    ),
    "masked_pool": Small("masked_pool", lambda n, draw: {"x": draw(2, n, 8)}, 3, 20000),
    **{f"masked_pool {mode}": Small("masked_pool", _pooled(mode), 5, 9000) for mode in
       ("mean", "sum", "max", "logsumexp")},
    **{f"masked_pool {mode} by mask": Small("masked_pool", _masked(mode), 5, 9000) for mode in ("mean", "sum")},
    "segment_pool": Small(
        "segment_pool", lambda n, draw: {"x": draw(n, 8), "cu_seqlens": torch.tensor([0, 0, n // 3, n])}, 7, 140000
    ),
    "segment_pool of one": Small(
        "segment_pool", lambda n, draw: {"x": draw(n, 8), "cu_seqlens": torch.tensor([0, n]), "mode": "sum"}, 7, 140000
    ),
    "cross_attention": Small(
        "cross_attention",
        lambda n, draw: {"query": draw(1, 4, 3, 8), "key": draw(1, 4, n, 8), "value": draw(1, 4, n, 8), "scale": 0.5},
        5, 50000,
    ),
    "linear": Small(
        "linear",
        lambda n, draw: {
            "x": draw(n, 8), "weight": draw(16, 8), "bias": draw(16), "activation": "gelu", "residual": draw(n, 16)
        },
        3, 20000,
    ),
    # Of few pixels a convolution.
    "patch_embed": Small(
        "patch_embed",
        lambda n, draw: {"pixels": draw(2, 6, 2 * n + 1, 3 * n), "weight": draw(5, 6, n, n), "bias": draw(5)}, 3, 0,
    ),
    "patch_embed in the layout of a convolution": Small(
        "patch_embed",
        lambda n, draw: {"pixels": draw(2, 6, n, 2 * n), "weight": draw(5, 6, n, n), "layout": "channels_first"}, 3, 0,
    ),
    "bilinear": Small(
        "bilinear", lambda n, draw: {"x": draw(n, 4), "y": draw(n, 6), "weight": draw(8, 4, 6), "bias": draw(8)},
        3, 12000,
    ),
    "bilinear of regions": Small(
        "bilinear", lambda n, draw: {"x": draw(2, 4), "y": draw(2, n, 6), "weight": draw(8, 4, 6), "bias": draw(8)},
        3, 6000,
    ),
    "tensor_fusion": Small(
        "tensor_fusion",
        lambda n, draw: {"inputs": [draw(n, 3), draw(n, 4)], "weight": draw(8, 20), "bias": draw(8)}, 3, 14000,
    ),
    "tensor_fusion of regions": Small(
        "tensor_fusion", lambda n, draw: {"inputs": [draw(2, 3), draw(2, n, 4)], "weight": draw(8, 20)}, 3, 7000
    ),
    "low_rank_fusion": Small(
        "low_rank_fusion",
        lambda n, draw: {
            "inputs": [draw(n, 3), draw(n, 4)],
            "factors": [draw(2, 4, 8), draw(2, 5, 8)],
            "weight": draw(2),
            "bias": draw(8),
        },
        3, 5000,
    ),
    "factorized_pool": Small(
        "factorized_pool", lambda n, draw: {"a": draw(n, 24), "b": draw(n, 24), "factor": 3, "layout": "outer"},
        3, 23000,
    ),
    "factorized_pool with norm": Small(
        "factorized_pool",
        lambda n, draw: {"a": draw(n, 24), "b": draw(n, 24), "factor": 3, "power_norm": True, "l2_norm": True},
        3, 5000,
    ),
    "compact_bilinear": Small("compact_bilinear", _sketched, 3, 5000),
    "select_tokens": Small("select_tokens", _tied, 20, 0),
    "select_tokens of one": Small(
        "select_tokens", lambda n, draw: {"x": draw(1, n, 8), "scores": draw(1, n), "k": 3}, 20, 0
    ),
    "contrastive_loss": Small("contrastive_loss", _scored("image", "text", ("logit_scale",)), 5, 600),
    "contrastive_loss of pairs": Small(
        "contrastive_loss",
        _scored(
            "image", "text", ("logit_scale", "logit_bias"), normalize=False, label_smoothing=0.2, reduction="none"
        ),
        5, 600,
    ),
    "sigmoid_loss": Small("sigmoid_loss", _scored("image", "text", ("logit_scale", "logit_bias")), 5, 600),
    "sigmoid_loss of pairs": Small(
        "sigmoid_loss", _scored("image", "text", ("logit_scale",), normalize=False, reduction="none"), 5, 600
    ),
    **{
        f"mutual_information {bound}": Small(
            "mutual_information", _scored("x", "y", ("scale",), bound=bound, clip=0.7), 5, 600
        )
        for bound in ("infonce", "dv", "nwj", "jsd", "smile")
    },
    "linear_cross_entropy": Small("linear_cross_entropy", _labelled(), 5, 1600),
    "linear_cross_entropy of a part": Small(
        "linear_cross_entropy", _labelled(bias=True, reduction="sum", ignore_index=7), 5, 1700
    ),
    "linear_cross_entropy of a capped head": Small(
        "linear_cross_entropy",
        _labelled(bias=True, softcap=2.0, label_smoothing=0.2, reduction="none"), 5, 1600,
    ),
    "maxsim": Small(
        "maxsim", lambda n, draw: {"queries": draw(2, 3, 8), "documents": draw(4, n, 8)}, 5, 30000
    ),
    **{name: Small(name, _spliced(name), 5, 60000) for name in ("splice_into", "splice_tokens", "add_at_tokens")},
    "attention_pool of few tokens": Small("attention_pool", _of_queries((1,)), 5, 23000),
    "attention_pool folded": Small("attention_pool", _of_queries((1,)), 20, 23000),
    "attention_pool folded for each": Small("attention_pool", _of_queries((2, 1)), 20, 23000),
    "attention_pool ordinary": Small("attention_pool", _of_queries((2, 20)), 20, 23000),
}  # fmt: skip
