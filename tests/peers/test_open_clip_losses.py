"""The losses of open_clip beside ours: values, gradients, and that its training loop can take ours."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.numbers import assert_accurate

from .packages import open_clip as import_open_clip

PAIRS = {"ClipLoss": "ContrastiveLoss", "SigLipLoss": "SigmoidLoss", "CoCaLoss": "CoCaLoss"}
SETTINGS = {"CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5, "pad_id": 3}}


@pytest.fixture(scope="module")
def losses() -> Any:
    return import_open_clip().loss


def given(kind: str, dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 50, 24, generator=generator, dtype=torch.float64), dim=-1)
    found = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(scale, dtype=torch.float64)}
    if kind == "CoCaLoss":
        found["logits"] = torch.randn(50, 6, 11, generator=generator, dtype=torch.float64)
    else:
        found["logit_bias"] = torch.tensor(-4.0, dtype=torch.float64)
    found = {name: value.to(dtype).requires_grad_() for name, value in found.items()}
    if kind == "CoCaLoss":
        found["labels"] = torch.randint(0, 11, (50, 6), generator=generator)
    return found


def run(loss: Any, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    # As open_clip's training loop calls it.
    found = loss(**arguments, output_dict=True)
    leaves = {name: value for name, value in arguments.items() if value.requires_grad}
    grads = torch.autograd.grad(sum(found.values()), list(leaves.values()))
    return {name: value.detach() for name, value in found.items()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PAIRS)
def test_values_and_gradients(kind: str, dtype: torch.dtype, scale: float, losses: Any) -> None:
    settings = SETTINGS.get(kind, {})
    ours, theirs = getattr(velm_kernels, PAIRS[kind])(**settings), getattr(losses, kind)(**settings)
    arguments = given(kind, dtype, scale)
    wide = {
        name: value.detach().double().requires_grad_() if value.is_floating_point() else value
        for name, value in arguments.items()
    }
    exact, way, got = run(theirs, wide), run(theirs, arguments), run(ours, arguments)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].dtype == way[name].dtype
        # The bias changes nothing in a softmax: rounding alone is left.
        floor = 1.0 if name == "logit_bias" else 0.0
        assert_accurate(name, got[name], way[name], value, dtype, floor=floor, ulps=max(4.0, scale / 4))


@pytest.mark.parametrize("kind", PAIRS)
def test_arguments_are_those_of_open_clip(kind: str, losses: Any) -> None:
    for of in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(module, of)).parameters
            for module in (getattr(velm_kernels, PAIRS[kind]), getattr(losses, kind))
        )
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            # A bias may be left out of ours.
            assert ours[name].default == parameter.default or name == "logit_bias", name


def test_closed_forms() -> None:
    for n in (2, 64, 1000):
        eye = torch.eye(n)
        of_clip = velm_kernels.ContrastiveLoss()(eye, eye, 10.0)
        assert float(of_clip) == pytest.approx(math.log(math.exp(10.0) + n - 1) - 10.0, rel=1e-5)
        of_siglip = velm_kernels.SigmoidLoss()(eye, eye, 10.0, -10.0)
        assert float(of_siglip) == pytest.approx(math.log(2) + (n - 1) * math.log1p(math.exp(-10.0)), rel=1e-6)
