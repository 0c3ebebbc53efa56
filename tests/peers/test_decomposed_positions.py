"""The attention of transformers' towers with decomposed relative positions, beside ours with the same weights."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velm_kernels
from tests.conftest import INTERPRETED, ONCE, Backend
from tests.numbers import assert_accurate

pytest.importorskip("transformers")

CLASSES = {
    "sam": "SamVisionAttention",
    "sam_hq": "SamHQVisionAttention",
    "got_ocr2": "GotOcr2VisionAttention",
    "deepseek_ocr2": "DeepseekOcr2SamVisionAttention",
    "slanext": "SLANeXtVisionAttention",
    "pp_formulanet": "PPFormulaNetVisionAttention",
    "vitdet": "VitDetAttention",
}


def attention(family: str, window: int) -> nn.Module:
    """A module of random weights, eager, whose tables are for a grid of ``window`` x ``window``."""
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError as error:
        pytest.skip(str(error))
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=2, image_size=64, patch_size=8, qkv_bias=True, attention_dropout=0.0,
        use_rel_pos=True, use_relative_position_embeddings=True, dropout_rate=0.0,
    )  # fmt: skip
    found: nn.Module = getattr(module, CLASSES[family])(config, (window,) * 2 if family == "vitdet" else window)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.5 if parameter.dim() == 1 else 0.3)
    return found


def ours(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, (batch, height, width, features), by this library."""
    batch, height, width, _ = x.shape
    heads = module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads
    qkv = module.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    of_rows, of_columns = velm_kernels.decomposed_position_bias(
        query, module.rel_pos_h, module.rel_pos_w, (height, width)
    )
    out = velm_kernels.cross_attention(query, key, value, rel_pos_height=of_rows, rel_pos_width=of_columns)
    return module.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def gradients(module: nn.Module, x: Tensor, run: Any) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = run(x)
    out = out[0] if isinstance(out, tuple) else out
    leaves = {"x": x, **dict(module.named_parameters())}
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize("backend", ONCE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 7)])
@pytest.mark.parametrize("family", CLASSES)
def test_outputs_and_gradients(family: str, height: int, width: int, dtype: torch.dtype, backend: Backend) -> None:
    """Also of pictures of another shape than that of the tables, which are interpolated."""
    if INTERPRETED and (dtype != torch.float32 or height == width):
        pytest.skip("slow")
    module = attention(family, window=6).to(dtype)
    x = torch.randn(2, height, width, 32).to(dtype)
    double = copy.deepcopy(module).double()
    exact = gradients(double, x.double(), double)
    plain = gradients(module, x, module)
    with backend.use():
        got = gradients(module, x, lambda x: ours(module, x))
    for name, value in got.items():
        assert_accurate(name, value, plain[name], exact[name], dtype)
