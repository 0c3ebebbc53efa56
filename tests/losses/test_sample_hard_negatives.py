"""sample_hard_negatives: what is never drawn, and how often the rest is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import velm_kernels
from tests.conftest import INTERPRETED
from tests.losses.test_contrastive_loss import features, small_tiles  # noqa: F401
from velm_kernels.losses import products

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton's")


def test_drawn_by_the_softmax_of_what_does_not_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative frequencies of 20,000 draws, for both sides."""
    monkeypatch.setattr(products, "ROWS", 640)
    monkeypatch.setattr(products, "COLUMNS", 640)
    image, text = features(7, 8, 0.5)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, 7, 7)
    draws = 20_000
    copies = 2000
    for _ in range(draws // copies):
        # Copies of the same rows are as many draws.
        of_image, of_text = velm_kernels.sample_hard_negatives(
            image.repeat(copies, 1), text, 4.0, _own(copies), generator
        )
        counts[0].view(-1).scatter_add_(0, (torch.arange(7).repeat(copies) * 7 + of_image), torch.ones(7 * copies))
        of_image, of_text = velm_kernels.sample_hard_negatives(
            image, text.repeat(copies, 1), 4.0, _own(copies)[::-1], generator
        )
        counts[1].view(-1).scatter_add_(0, (torch.arange(7).repeat(copies) * 7 + of_text), torch.ones(7 * copies))
    scores = 4.0 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()
    scores.fill_diagonal_(-torch.inf)
    for side, exact in enumerate((scores.softmax(1), scores.t().softmax(1))):
        assert counts[side].diagonal().sum() == 0
        # Four standard deviations.
        assert ((counts[side] / draws - exact).abs() < 4 * (exact * (1 - exact) / draws).sqrt() + 1e-9).all()


def _own(copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(7).repeat(copies), torch.arange(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_belongs_is_never_drawn(dtype: torch.dtype, small_tiles: None) -> None:  # noqa: F811
    """However high its score; with labels, of different numbers; -1 where there is nothing else."""
    image, text = features(100, 16, 5.0, dtype)
    for _ in range(5):
        of_image, of_text = velm_kernels.sample_hard_negatives(image, text, 100.0)
        own = torch.arange(100)
        assert (of_image != own).all() and (of_text != own).all() and of_image.min() >= 0 and of_text.max() < 100
        labels = torch.arange(100) // 4, torch.arange(60) // 4
        of_image, of_text = velm_kernels.sample_hard_negatives(image, text[:60], 100.0, labels)
        assert (labels[1][of_image] != labels[0]).all() and (labels[0][of_text] != labels[1]).all()
    nothing = velm_kernels.sample_hard_negatives(image, text, 100.0, torch.zeros(100, dtype=torch.int64))
    assert (nothing[0] == -1).all() and (nothing[1] == -1).all()
    assert [len(x) for x in velm_kernels.sample_hard_negatives(image[:0], text[:0], 1.0)] == [0, 0]


def test_a_generator_repeats_its_draws() -> None:
    image, text = features(50, 16, 0.5)
    draws = [
        velm_kernels.sample_hard_negatives(image, text, 5.0, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_wrong_arguments() -> None:
    image, text = features(5, 16, 0.5)
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, given int 3"):
        velm_kernels.sample_hard_negatives(image, text, 5.0, generator=3)
    with pytest.raises(ValueError, match="text: expected as many rows as image = 5"):
        velm_kernels.sample_hard_negatives(image, text[:3], 5.0)
    with pytest.raises(TypeError, match="labels: expected"):
        velm_kernels.sample_hard_negatives(image, text, 5.0, torch.rand(5))
