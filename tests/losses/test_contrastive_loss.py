"""contrastive_loss: scales, tiles, labels, targets, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import INTERPRETED, Backend, every_backend
from tests.numbers import assert_accurate
from velm_kernels.losses import products

NAMES = ("loss", "image", "text", "logit_scale")


def features(pairs: int, dim: int, likeness: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of images, and of texts that are the more like those of their images the greater ``likeness``."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, pairs, dim, generator=generator, dtype=torch.float64)
    return image.to(dtype), (likeness * image + text).to(dtype)


def plain(image: Tensor, text: Tensor, scale: Tensor, normalize: bool = True) -> Tensor:
    """As users write it."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = scale * image @ text.t()
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def run(function: Any, image: Tensor, text: Tensor, scale: float, **options: Any) -> dict[str, Tensor]:
    dtype = torch.float64 if image.dtype is torch.float64 else torch.float32
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(scale, dtype=dtype)]
    leaves[2].requires_grad_()
    loss = function(*leaves, **options)
    return dict(zip(NAMES, [loss.detach(), *torch.autograd.grad(loss, leaves)], strict=True))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tests cross many of their edges."""
    monkeypatch.setattr(products, "ROWS", 48)
    monkeypatch.setattr(products, "ROWS_OF_16_BITS", 31)
    monkeypatch.setattr(products, "COLUMNS", 37)


# Untrained; as CLIP begins; as it ends; and pairs that are all told apart, whose loss is 1e-9.
@pytest.mark.parametrize(("scale", "likeness"), [(1.0, 0.0), (14.3, 1.0), (100.0, 0.3), (100.0, 1.0), (1.0, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_backend
def test_scales(backend: Backend, dtype: torch.dtype, scale: float, likeness: float, small_tiles: None) -> None:
    image, text = features(100, 40, likeness, dtype)
    with backend.use():
        got = run(velm_kernels.contrastive_loss, image, text, scale)
    exact = run(plain, image.double(), text.double(), scale)
    ways = run(plain, image, text, scale)
    for name in NAMES:
        # The sum that is the gradient of the scale cancels down to a part of its terms.
        floor = float(exact["image"].norm() * image.double().norm()) / scale if name == "logit_scale" else 0.0
        # What a score of 50 is off by in its last place, a softmax near 0 is off by in relation to itself.
        assert_accurate(name, got[name], ways[name], exact[name], dtype, floor=floor, ulps=max(4.0, scale / 2))


@every_backend
def test_an_infinite_score_is_no_loss_of_0(backend: Backend) -> None:
    """The pair's own is larger than all others by infinity; pairs beside scores of -inf lose what they lost."""
    image, text = features(20, 8, 1.0)
    text[:, 2] = -text[:, 2].abs()
    image[3, 2], text[3, 2] = torch.inf, 1.0
    logits = image.double() @ text.double().t()
    own = torch.arange(20)
    rows, columns = (F.cross_entropy(z, own, reduction="none") for z in (logits, logits.t()))
    exact = (rows + columns) / 2
    with backend.use():
        got = velm_kernels.contrastive_loss(image, text, 1.0, normalize=False, reduction="none")
    assert exact.isfinite().any() and not exact[3].isfinite()
    torch.testing.assert_close(got.isfinite(), exact.isfinite())
    torch.testing.assert_close(got[exact.isfinite()].double(), exact[exact.isfinite()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likeness", [3.0, 10.0])
@every_backend
def test_where_the_diagonal_of_the_gradient_cancels(backend: Backend, likeness: float) -> None:
    """1 minus a softmax of 1 - 1e-12 is known to the last places, of which float32 has none."""
    image, text = features(30, 64, likeness)
    with backend.use():
        got = run(velm_kernels.contrastive_loss, image, text, 30.0)
    exact = run(plain, image.double(), text.double(), 30.0)
    assert exact["loss"] < 1e-4
    if backend.name == "reference":
        return
    for name in NAMES:
        error = float((got[name].double() - exact[name]).norm() / exact[name].norm())
        # A score of 30 has an error of 2e-6.
        assert error < 1e-5, (name, error)


@every_backend
def test_closed_forms(backend: Backend) -> None:
    with backend.use():
        for n, scale in ((1, 3.0), (5, 10.0), (300, 2.0)):
            eye = torch.eye(n)
            loss = velm_kernels.contrastive_loss(eye, eye, scale)
            exact = math.log(math.exp(scale) + n - 1) - scale
            assert float(loss) == pytest.approx(exact, rel=1e-6, abs=1e-7)
        assert velm_kernels.contrastive_loss(torch.randn(0, 4), torch.randn(0, 4), 2.0) == 0


@every_backend
def test_labels(backend: Backend, small_tiles: None) -> None:
    """The same as weights written out; hashes of 64 bits; rows without a target; other numbers of texts."""
    image, text = features(60, 24, 0.5)
    text = torch.cat([text, text[:31]])
    of_image = torch.randint(-2, 9, (60,), generator=torch.Generator().manual_seed(1)) * (2**40 + 1)
    of_text = torch.randint(-2, 12, (91,), generator=torch.Generator().manual_seed(2)) * (2**40 + 1)
    same = (of_image[:, None] == of_text) & (of_image[:, None] >= 0)
    targets = [(weights / weights.sum(1, keepdim=True).clamp(min=1)).double() for weights in (same, same.t())]

    def exact(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()
        both = [-(t.to(z.dtype) * z.log_softmax(1)).sum(1) for t, z in zip(targets, (logits, logits.t()))]
        counts = [(t.sum(1) > 0).sum() for t in targets]
        return (both[0].sum() / counts[0] + both[1].sum() / counts[1]) / 2

    assert (same.sum(1) == 0).any() and (same.sum(1) > 1).any()
    with backend.use():
        got = run(velm_kernels.contrastive_loss, image, text, 14.3, labels=(of_image, of_text))
        # Nothing belongs to anything.
        none = velm_kernels.contrastive_loss(image, image, 14.3, labels=torch.full((60,), -1))
        # Each a label of its own: as without labels.
        alone = velm_kernels.contrastive_loss(image, image + 1, 14.3, labels=torch.randperm(60) * 2**40)
        without = velm_kernels.contrastive_loss(image, image + 1, 14.3)
    wanted, way = (run(exact, *(x.to(d) for x in (image, text)), 14.3) for d in (torch.float64, torch.float32))
    for name in NAMES:
        assert_accurate(name, got[name], way[name], wanted[name])
    assert none == 0
    torch.testing.assert_close(alone, without, rtol=1e-4, atol=1e-6)


@every_backend
def test_soft_targets_and_smoothing(backend: Backend, small_tiles: None) -> None:
    image, text = features(60, 24, 0.5)
    soft = torch.rand(60, 60, generator=torch.Generator().manual_seed(3)).softmax(1)
    eye = torch.eye(60)
    with backend.use():
        for smoothing in (0.0, 0.3):

            def exact(image: Tensor, text: Tensor, scale: Tensor, t: Tensor, e: float = smoothing) -> Tensor:
                z = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()
                t = t.to(z.dtype)
                return (F.cross_entropy(z, t, label_smoothing=e) + F.cross_entropy(z.t(), t.t(), label_smoothing=e)) / 2

            for targets, given in ((soft, {"soft_targets": soft}), (eye, {})):
                got = run(velm_kernels.contrastive_loss, image, text, 14.3, label_smoothing=smoothing, **given)
                wanted = run(exact, image.double(), text.double(), 14.3, t=targets)
                way = run(exact, image, text, 14.3, t=targets)
                for name in NAMES:
                    assert_accurate(f"{name} {smoothing}", got[name], way[name], wanted[name])


def test_targets_with_a_gradient() -> None:
    image, text = features(7, 5, 0.5, torch.float64)
    soft = torch.rand(7, 7, dtype=torch.float64).softmax(1).requires_grad_()

    def loss(image: Tensor, text: Tensor, soft: Tensor) -> Tensor:
        return velm_kernels.contrastive_loss(image, text, 3.0, soft_targets=soft)

    assert torch.autograd.gradcheck(loss, (image.requires_grad_(), text.requires_grad_(), soft))


@every_backend
def test_the_bias_moves_nothing(backend: Backend) -> None:
    image, text = features(20, 8, 0.5)
    bias = torch.tensor(-10.0, requires_grad=True)
    with backend.use():
        loss = velm_kernels.contrastive_loss(image, text, 5.0, bias)
        torch.testing.assert_close(loss, velm_kernels.contrastive_loss(image, text, 5.0))
        assert torch.autograd.grad(loss, bias)[0].abs() < 1e-6
        bias = torch.tensor(torch.nan, requires_grad=True)
        loss = velm_kernels.contrastive_loss(image, text, 5.0, bias)
        assert loss.isnan() and torch.autograd.grad(loss, bias)[0].isnan()


@every_backend
def test_rows_shorter_than_the_least_norm(backend: Backend) -> None:
    """As torch.nn.functional.normalize has them, whose gradient divides by the least norm."""
    image, text = features(9, 6, 0.5)
    image[2] = 0
    image[4] *= 1e-20
    # Short by so little that what a norm's gradient would take off is a quarter of it.
    image[6] *= 5e-13 / image[6].norm()
    with backend.use():
        got = run(velm_kernels.contrastive_loss, image, text, 5.0)
    exact = run(plain, image.double(), text.double(), 5.0)
    for name in NAMES:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=1e-7)


@every_backend
def test_scores_far_apart(backend: Backend, small_tiles: None) -> None:
    """Rows of which some have scores of hundreds and others of a hundredth, which no common base serves."""
    image, text = features(90, 16, 0.5)
    image *= torch.logspace(-2, 2, 90)[:, None]
    text *= torch.logspace(1, -2, 90)[:, None]
    for scale in (2.0, -2.0, 0.0):
        with backend.use():
            got = run(velm_kernels.contrastive_loss, image, text, scale, normalize=False)
        exact = run(plain, image.double(), text.double(), scale, normalize=False)
        way = run(plain, image, text, scale, normalize=False)
        for name in NAMES:
            assert_accurate(f"{name} {scale}", got[name], way[name], exact[name])


MEASURED = """
import resource, torch, velm_kernels
torch.set_num_threads(1)
image, text = (torch.randn({n}, 32).requires_grad_() for _ in range(2))
velm_kernels.contrastive_loss(image[:8], text[:8], 14.3).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
velm_kernels.contrastive_loss(image, text, 14.3).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(INTERPRETED, reason="of the kernels for the CPU")
def test_memory() -> None:
    """One matrix of scores alone has 256 MiB."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(n=8192)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 * 1024, f"{done.stdout} KiB"
