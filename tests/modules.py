"""One small call of every public module: what tests over all modules run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import velm_kernels

from .operators import Arguments


@dataclass(frozen=True)
class ModuleCall:
    """One call of a public module.

    Attributes:
        name: of the class; constructor: its arguments by name.
        make: makes the arguments of ``forward`` by name, or by position where they have none.
    """

    name: str
    constructor: Arguments = field(hash=False)
    make: Callable[[Callable[..., Tensor]], Arguments | tuple[Any, ...]]

    def __str__(self) -> str:
        return self.name

    @property
    def type(self) -> type[torch.nn.Module]:
        return getattr(velm_kernels, self.name)

    def module(self, **changed: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.type(**{**self.constructor, **changed}).eval()

    def arguments(self, dtype: torch.dtype = torch.float32) -> Arguments | tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        return self.make(lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def call_module(module: torch.nn.Module, arguments: Arguments | tuple[Any, ...]) -> Any:
    return module(**arguments) if isinstance(arguments, dict) else module(*arguments)


def _pair(normal: Any) -> Arguments:
    return {"x": [normal(2, 6), normal(2, 5, 8)]}


def _tokens(normal: Any) -> Arguments:
    return {"x": normal(2, 7, 16), "lengths": torch.tensor([5, 7]), "mask": torch.ones(2, 7, dtype=torch.bool)}


def _streams(normal: Any) -> Arguments:
    mask = torch.ones(2, 7, dtype=torch.bool)
    return {"states_a": normal(2, 5, 16), "states_b": normal(2, 7, 24), "mask_b": mask}


def _text_and_media(normal: Any) -> Arguments:
    start = torch.zeros(2, 5, dtype=torch.long)
    return {
        "hidden_states": normal(2, 5, 16),
        "encoder_hidden_states": normal(2, 7, 24),
        "key_lengths": torch.tensor([7, 3]),
        "key_ranges": (start, start + 2),
    }


def _features(normal: Any) -> Arguments:
    given = {"logit_scale": normal(), "logit_bias": normal()}
    return {"image_features": normal(2, 8), "text_features": normal(2, 8), **given}


_PAIR = {"input_dims": [6, 8], "output_dim": 4}

MODULES = [
    ModuleCall("CrossAttention", {"embed_dim": 16, "num_heads": 2, "kv_dim": 24, "qk_norm": True}, _text_and_media),
    ModuleCall("GatedCrossAttention", {"embed_dim": 16, "num_heads": 2, "kv_dim": 24}, _text_and_media),
    ModuleCall("CoAttention", {"dim_a": 16, "dim_b": 24, "num_heads": 2}, _streams),
    ModuleCall("BidirectionalAttention", {"dim_a": 16, "dim_b": 24, "inner_dim": 8, "num_heads": 2}, _streams),
    ModuleCall(
        "Linear",
        {"in_features": 8, "out_features": 4, "activation": "gelu"},
        lambda normal: {"input": normal(2, 5, 8), "residual": normal(2, 5, 4)},
    ),
    ModuleCall("MLP", {"dim": 8}, lambda normal: {"x": normal(2, 5, 8), "residual": normal(2, 5, 8)}),
    ModuleCall(
        "PatchEmbed",
        {"in_channels": 3, "embed_dim": 8, "patch_size": (2, 4)},
        lambda normal: {"pixels": normal(2, 3, 5, 8)},
    ),
    ModuleCall("MaskedPool", {}, _tokens),
    ModuleCall(
        "SegmentPool", {}, lambda normal: {"x": normal(7, 16), "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)}
    ),
    ModuleCall("AttentionPool", {"dim": 16, "heads": 2}, _tokens),
    ModuleCall(
        "AttentionPool2d",
        {"spacial_dim": 3, "embed_dim": 16, "num_heads": 2, "output_dim": 8},
        lambda normal: {"x": normal(2, 16, 3, 3)},
    ),
    ModuleCall("ProbePool", {"dim": 16, "heads": 2, "hidden_dim": 32}, _tokens),
    ModuleCall("AttentionalPooler", {"d_model": 8, "context_dim": 16, "n_head": 2, "n_queries": 3}, _tokens),
    ModuleCall("TokenMerge", {"r": 2}, lambda normal: {"x": normal(2, 9, 16), "metric": normal(2, 9, 4)}),
    ModuleCall("PerceiverResampler", {"dim": 16, "depth": 1, "heads": 2, "head_dim": 8, "n_latents": 3}, _tokens),
    ModuleCall(
        "Bilinear",
        {"in1_features": 6, "in2_features": 8, "out_features": 4},
        lambda normal: {"input1": normal(2, 6), "input2": normal(2, 5, 8)},
    ),
    ModuleCall(
        "TensorFusion",
        {"input_dims": [3, 4], "out_features": 5},
        lambda normal: (normal(2, 3), normal(2, 4)),
    ),
    ModuleCall(
        "LowRankFusion",
        {"input_dims": [3, 4], "out_features": 5, "rank": 2},
        lambda normal: (normal(2, 3), normal(2, 4)),
    ),
    ModuleCall(
        "FiLM",
        {"condition_dim": 6, "features": 16},
        lambda normal: {"x": normal(2, 5, 16), "condition": normal(2, 6)},
    ),
    ModuleCall("MCB", {**_PAIR, "mm_dim": 20}, _pair),
    ModuleCall("MFB", {**_PAIR, "mm_dim": 10, "normalize": True}, _pair),
    ModuleCall("MLB", {**_PAIR, "mm_dim": 10}, _pair),
    ModuleCall("MFH", {**_PAIR, "mm_dim": 10}, _pair),
    ModuleCall("Mutan", {**_PAIR, "mm_dim": 10, "rank": 2}, _pair),
    ModuleCall("Tucker", {**_PAIR, "mm_dim": 6}, _pair),
    ModuleCall("BlockTucker", {**_PAIR, "mm_dim": 10, "chunks": 2}, _pair),
    ModuleCall("Block", {**_PAIR, "mm_dim": 10, "chunks": 2, "rank": 2}, _pair),
    ModuleCall("LinearSum", {**_PAIR, "mm_dim": 10}, _pair),
    ModuleCall("ConcatMLP", {**_PAIR, "dimensions": [10, 12]}, _pair),
    ModuleCall(
        "BilinearAttention",
        {"x_dim": 6, "y_dim": 8, "z_dim": 4, "glimpse": 2},
        lambda normal: {"v": normal(2, 5, 6), "q": normal(2, 7, 8), "v_lengths": torch.tensor([5, 3])},
    ),
    ModuleCall(
        "BilinearAttentionPool",
        {"v_dim": 6, "q_dim": 8, "h_dim": 4},
        lambda normal: {"v": normal(2, 5, 6), "q": normal(2, 7, 8), "attention": normal(2, 5, 7)},
    ),
    ModuleCall("ContrastiveLoss", {}, _features),
    ModuleCall("SigmoidLoss", {}, _features),
    ModuleCall(
        "CoCaLoss",
        {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0},
        lambda normal: {
            "image_features": normal(2, 8),
            "text_features": normal(2, 8),
            "logits": normal(2, 3, 11),
            "labels": torch.tensor([[1, 2, 0], [10, 0, 0]]),
            "logit_scale": normal(),
        },
    ),
    ModuleCall(
        "LinearCrossEntropyLoss",
        {"softcap": 5.0, "shift": True},
        lambda normal: {
            "hidden": normal(2, 5, 8),
            "weight": normal(11, 8),
            "targets": torch.tensor([[1, 2, -100, 4, 5], [-100, 10, 0, 3, 3]]),
        },
    ),
]


def public_modules() -> set[str]:
    found = {name: getattr(velm_kernels, name) for name in velm_kernels.__all__}
    return {name for name, value in found.items() if isinstance(value, type) and issubclass(value, torch.nn.Module)}


assert {call.name for call in MODULES} == public_modules()
