"""sigmoid_loss: scales, tiles, labels, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import Backend, every_backend
from tests.losses.test_contrastive_loss import features, small_tiles  # noqa: F401
from tests.numbers import assert_accurate

NAMES = ("loss", "image", "text", "logit_scale", "logit_bias")


def plain(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, matches: Tensor | None = None) -> Tensor:
    """As SigLIP's authors write it, in each dtype."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t() + bias
    signs = 2 * (torch.eye(len(image)) if matches is None else matches).to(logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def run(function, image: Tensor, text: Tensor, scale: float, bias: float, **options) -> dict[str, Tensor]:
    dtype = torch.float64 if image.dtype is torch.float64 else torch.float32
    leaves = [image.clone(), text.clone(), torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)]
    loss = function(*[leaf.requires_grad_() for leaf in leaves], **options)
    # What forward made of the gradient is multiplied by what comes in.
    return dict(zip(NAMES, [loss.detach(), *torch.autograd.grad(3 * loss, leaves)], strict=True))


@pytest.mark.parametrize(
    ("scale", "bias", "likeness"), [(1.0, 0.0, 0.0), (10.0, -10.0, 1.0), (100.0, -15.0, 0.3), (100.0, -50.0, 30.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_backend
def test_scales(
    backend: Backend,
    dtype: torch.dtype,
    scale: float,
    bias: float,
    likeness: float,
    small_tiles: None,  # noqa: F811
) -> None:
    image, text = features(100, 40, likeness, dtype)
    with backend.use():
        got = run(velm_kernels.sigmoid_loss, image, text, scale, bias)
        rows = velm_kernels.sigmoid_loss(image, text, scale, bias, reduction="none")
        torch.testing.assert_close(rows.float().mean(), got["loss"].float(), rtol=1e-2, atol=1e-5)
    exact, way = run(plain, image.double(), text.double(), scale, bias), run(plain, image, text, scale, bias)
    for name in NAMES:
        floor = float(exact["image"].norm() * image.double().norm()) / scale if name == "logit_scale" else 0.0
        # What a score of 50 is off by in its last place, a sigmoid near 0 is off by in relation to itself.
        assert_accurate(name, got[name], way[name], exact[name], dtype, floor=floor, ulps=max(4.0, scale / 2))


@every_backend
def test_closed_forms(backend: Backend) -> None:
    with backend.use():
        for n in (1, 4, 300):
            loss = velm_kernels.sigmoid_loss(torch.eye(n), torch.eye(n), 10.0, -10.0)
            assert float(loss) == pytest.approx(math.log(2) + (n - 1) * math.log1p(math.exp(-10)), rel=1e-6)
        # Of negatives alone what is left is a sum of exponentials, to the last places.
        none = torch.full((20,), -1)
        loss = velm_kernels.sigmoid_loss(torch.eye(20), torch.eye(20), 0.0, -40.0, labels=none)
        assert float(loss) == pytest.approx(20 * math.exp(-40), rel=1e-5)
        assert velm_kernels.sigmoid_loss(torch.randn(0, 4), torch.randn(0, 4), 2.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_each_image_has_a_gradient_of_its_own(
    backend: Backend,
    dtype: torch.dtype,
    small_tiles: None,  # noqa: F811
) -> None:
    """Of a loss for each image, every score has the weight of its row, that of a pair too."""
    image, text = features(100, 40, 1.0, dtype)
    weights = torch.linspace(-2, 3, 100, dtype=torch.float64)

    def own(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        losses = velm_kernels.sigmoid_loss(image, text, scale, bias, reduction="none")
        return (losses * weights.to(losses.dtype)).sum()

    def by_torch(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t() + bias
        losses = -F.logsigmoid((2 * torch.eye(100) - 1).to(logits.dtype) * logits).sum(1)
        return (losses * weights.to(losses.dtype)).sum()

    with backend.use():
        got = run(own, image, text, 10.0, -4.0)
    exact, way = run(by_torch, image.double(), text.double(), 10.0, -4.0), run(by_torch, image, text, 10.0, -4.0)
    for name in NAMES:
        assert_accurate(name, got[name], way[name], exact[name], dtype)


@every_backend
def test_labels(backend: Backend, small_tiles: None) -> None:  # noqa: F811
    image, text = features(60, 24, 0.5)
    text = torch.cat([text, text[:31]])
    of_image = torch.randint(-2, 9, (60,), generator=torch.Generator().manual_seed(1)) * (2**40 + 1)
    of_text = torch.randint(-2, 12, (91,), generator=torch.Generator().manual_seed(2)) * (2**40 + 1)
    same = (of_image[:, None] == of_text) & (of_image[:, None] >= 0)
    with backend.use():
        got = run(velm_kernels.sigmoid_loss, image, text, 10.0, -3.0, labels=(of_image, of_text))
    exact = run(plain, image.double(), text.double(), 10.0, -3.0, matches=same)
    way = run(plain, image, text, 10.0, -3.0, matches=same)
    for name in NAMES:
        assert_accurate(name, got[name], way[name], exact[name])
