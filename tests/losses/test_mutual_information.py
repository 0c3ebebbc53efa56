"""mutual_information: closed forms, what is known of Gaussian numbers, the code of papers, tiles, clipping, memory."""

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
from tests.losses.test_contrastive_loss import features, small_tiles  # noqa: F401
from tests.numbers import assert_accurate
from velm_kernels.losses.mutual_information import BOUNDS

NAMES = ("bound", "x", "y", "scale")


def published(x: Tensor, y: Tensor, scale: Tensor, bound: str, clip: float) -> Tensor:
    """As the authors of SMILE write estimators down, from the matrix of scores."""
    f = scale * x @ y.t()
    n = len(f)
    positive = f.diag().mean()

    def log_mean_exp_off(f: Tensor) -> Tensor:
        return torch.logsumexp(f - torch.diag(math.inf * torch.ones(n)), (0, 1)) - math.log(n * (n - 1))

    if bound == "infonce":
        return math.log(n) + (f.diag() - f.logsumexp(1)).mean()
    if bound == "dv":
        return positive - log_mean_exp_off(f)
    if bound == "nwj":
        return 1 + (f - 1).diag().mean() - log_mean_exp_off(f - 1).exp()
    if bound == "jsd":
        of_pairs = -F.softplus(-f.diag()).mean()
        return of_pairs - (F.softplus(f).sum() - F.softplus(f.diag()).sum()) / (n * (n - 1))
    return positive - log_mean_exp_off(f.clamp(-clip, clip))


def run(function: Any, x: Tensor, y: Tensor, scale: float, **options: Any) -> dict[str, Tensor]:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    leaves = [x.clone(), y.clone(), torch.tensor(scale, dtype=dtype)]
    value = function(*[leaf.requires_grad_() for leaf in leaves], **options)
    # What comes in is no 1, and has a sign.
    return dict(zip(NAMES, [value.detach(), *torch.autograd.grad(-3 * value, leaves)], strict=True))


def gaussian(count: int, dims: int, correlation: float) -> tuple[Tensor, Tensor]:
    """Features whose product is log (p(x, y) / (p(x) p(y))) of ``dims`` pairs of numbers that are correlated."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, count, dims, generator=generator, dtype=torch.float64)
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    rest = 1 - correlation**2
    squares = [-(correlation**2) / (2 * rest) * of.square() for of in (x, y)]
    one = torch.ones(count, 1, dtype=torch.float64)
    of_x = torch.cat([correlation / rest * x, squares[0].sum(1, keepdim=True) + exact(dims, correlation), one], 1)
    return of_x.float(), torch.cat([y, one, squares[1].sum(1, keepdim=True)], 1).float()


def exact(dims: int, correlation: float) -> float:
    return -dims / 2 * math.log(1 - correlation**2)


@every_backend
def test_closed_forms(backend: Backend) -> None:
    with backend.use():
        for n, scale in ((2, 3.0), (5, 10.0), (70, 2.0)):
            eye = torch.eye(n)
            found = {name: float(velm_kernels.mutual_information(eye, eye, scale, name, clip=1.0)) for name in BOUNDS}
            # Of scores that are `scale` for pairs and 0 for all others.
            wanted = {
                "infonce": math.log(n) + scale - math.log(math.exp(scale) + n - 1),
                "dv": scale,
                "nwj": scale - math.exp(-1),
                "jsd": -math.log1p(math.exp(-scale)) - math.log(2),
                "smile": scale,
            }
            assert found == pytest.approx(wanted, rel=1e-6)
        ones = torch.ones(40, 1)
        for scale in (3.0, -3.0):
            # All scores are `scale`: nothing is known, and what is clipped seems to be known.
            assert float(velm_kernels.mutual_information(ones, ones, scale)) == pytest.approx(0, abs=1e-6)
            assert float(velm_kernels.mutual_information(ones, ones, scale, "dv")) == pytest.approx(0, abs=1e-6)
            clipped = velm_kernels.mutual_information(ones, ones, scale, "smile", clip=0.5)
            assert float(clipped) == pytest.approx(scale - math.copysign(0.5, scale))
            nwj = velm_kernels.mutual_information(ones, ones, scale, "nwj")
            assert float(nwj) == pytest.approx(scale - math.exp(scale - 1), rel=1e-5)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("count", [0, 1])
def test_one_pair_has_no_negatives(count: int, bound: str) -> None:
    x, y = (torch.full((count, 3), torch.nan, requires_grad=True) for _ in range(2))
    value = velm_kernels.mutual_information(x, y, bound=bound)
    assert value == 0
    for grad in torch.autograd.grad(value, (x, y)):
        assert torch.equal(grad, torch.zeros(count, 3))


@pytest.mark.skipif(INTERPRETED, reason="what is computed is the same by every backend")
def test_gaussian_numbers() -> None:
    """By the best scores: near the truth where there is little to know; where there is much, InfoNCE at its limit."""
    x, y = gaussian(1000, 3, 0.6)
    truth = exact(3, 0.6)
    for bound in ("infonce", "dv", "smile"):
        # A standard deviation of the mean of 1000 scores is 0.03.
        assert float(velm_kernels.mutual_information(x, y, bound=bound, clip=20)) == pytest.approx(truth, abs=0.1)
    # Its best scores are larger by 1; there are of 2 JS - log 4 as many as pairs tell apart.
    x[:, -2] += 1
    assert float(velm_kernels.mutual_information(x, y, bound="nwj")) == pytest.approx(truth, abs=0.1)
    x[:, -2] -= 1
    jsd = float(velm_kernels.mutual_information(x, y, bound="jsd"))
    assert -2 * math.log(2) < jsd < 0
    for worse in (0.7, 1.4):
        assert float(velm_kernels.mutual_information(x, y, worse, "jsd")) < jsd
    x, y = gaussian(300, 20, 0.9)
    assert exact(20, 0.9) > 16
    most = float(velm_kernels.mutual_information(x, y))
    assert 0.98 * math.log(300) < most <= math.log(300)
    # Scores of something else tell nothing.
    assert float(velm_kernels.mutual_information(x, y.roll(1, 0))) < 0


# Untrained; of a model; and scores of hundreds, of which exponentials are no numbers.
@pytest.mark.parametrize(("scale", "likeness"), [(0.02, 0.0), (0.3, 1.0), (-0.3, 1.0), (20.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", BOUNDS)
@every_backend
def test_what_papers_write(
    backend: Backend,
    bound: str,
    dtype: torch.dtype,
    scale: float,
    likeness: float,
    small_tiles: None,  # noqa: F811
) -> None:
    if bound == "nwj" and scale > 1:
        pytest.skip("its value is no number of float32")
    x, y = features(100, 40, likeness, dtype)
    options = {"bound": bound, "clip": 2.5}
    with backend.use():
        got = run(velm_kernels.mutual_information, x, y, scale, **options)
    wanted = run(published, x.double(), y.double(), scale, **options)
    way = run(published, x, y, scale, **options)
    for name in NAMES:
        # The sum that is the gradient of the scale cancels down to a part of its terms, and so do bounds near 0.
        floor = {"scale": float(wanted["x"].norm() * x.double().norm()) / abs(scale), "bound": 1.0}.get(name, 0.0)
        # What a score of hundreds is off by in its last place, its exponential is off by in relation to itself.
        ulps = max(4.0, 40 * abs(scale))
        assert_accurate(f"{name} {bound}", got[name], way[name], wanted[name], dtype, floor=floor, ulps=ulps)


@every_backend
def test_of_infonce_and_contrastive_loss(backend: Backend, small_tiles: None) -> None:  # noqa: F811
    """Both directions of InfoNCE are log N minus the loss of CLIP."""
    x, y = features(90, 16, 0.5)
    with backend.use():
        both = [velm_kernels.mutual_information(*pair, 0.3) for pair in ((x, y), (y, x))]
        loss = velm_kernels.contrastive_loss(x, y, 0.3, normalize=False)
    assert both[0] != both[1]
    assert float(both[0] + both[1]) / 2 == pytest.approx(math.log(90) - float(loss), rel=1e-5)


@every_backend
def test_clipped_scores_have_no_gradient(backend: Backend, small_tiles: None) -> None:  # noqa: F811
    """What is left is that of pairs, clipped or not."""
    x, y = features(70, 24, 3.0)
    with backend.use():
        got = run(velm_kernels.mutual_information, x, y, 4.0, bound="smile", clip=0.0)
    torch.testing.assert_close(got["x"], -3 * 4.0 * y / 70)
    torch.testing.assert_close(got["y"], -3 * 4.0 * x / 70)
    torch.testing.assert_close(got["scale"], -3 * (x * y).sum() / 70)


@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients_by_differences(bound: str) -> None:
    x, y = features(7, 5, 0.5, torch.float64)

    def value(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return velm_kernels.mutual_information(x, y, scale, bound, clip=0.8)

    leaves = (x.requires_grad_(), y.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


MEASURED = """
import resource, torch, velm_kernels
torch.set_num_threads(1)
x, y = (torch.randn({n}, 32).requires_grad_() for _ in range(2))
for bound in ("infonce", "jsd", "smile"):
    velm_kernels.mutual_information(x[:8], y[:8], 0.1, bound).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bound in ("infonce", "jsd", "smile"):
    velm_kernels.mutual_information(x, y, 0.1, bound).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(INTERPRETED, reason="of the kernels for the CPU")
def test_memory() -> None:
    """One matrix of scores alone has 144 MiB."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(n=6144)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 * 1024, f"{done.stdout} KiB"
