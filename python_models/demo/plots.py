"""The picture that the demo writes: what it has measured, and what the model looked at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from PIL import Image

from python_models.demo.families import Comparison
from python_models.vqa.evaluation import Prediction

BEFORE, AFTER, GOOD, BAD = "#9aa3ad", "#1673b1", "#1a7f37", "#c62828"


@dataclass(frozen=True)
class Turns:
    """A model trained in two ways in turns: medians of a step's milliseconds, before and after."""

    name: str
    step_ms: tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """A question about a picture, what was answered, and what is right."""

    picture: Path
    question: str
    found: Prediction
    right: str


@dataclass(frozen=True)
class Shown:
    """Everything in the picture.

    Attributes:
        machine: a line about where it was measured.
        losses: of each step, unpatched and patched.
        loss_difference: the largest relative one.
        turns: step times.
        accuracy: name -> share of right answers; ``trained`` are the names that the trained model reached.
        trained: see there.
        asked: questions to show.
        families: whole models.
    """

    machine: str
    losses: tuple[Sequence[float], Sequence[float]]
    loss_difference: float
    turns: Sequence[Turns]
    accuracy: Mapping[str, float]
    trained: Sequence[str]
    asked: Sequence[Asked]
    families: Sequence[Comparison]


def overview(path: Path, shown: Shown) -> None:
    """One PNG of everything."""
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "font.size": 9}):
        figure = plt.figure(figsize=(15, 15), layout="constrained")
        figure.suptitle(f"velm_kernels: one run of make demo\n{shown.machine}\n", fontsize=13)
        heights = (5.4, 3.2, 0.9 + 0.42 * len(shown.families))
        figure.set_figheight(0.6 + sum(heights) * 1.15)
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
        _answers(top, shown.asked)
        _training(middle, shown)
        _families(bottom, shown.families)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90)
        plt.close(figure)


def _answers(figure: Any, asked: Sequence[Asked]) -> None:
    """Each picture above itself under the weights of its regions."""
    figure.suptitle("Held-out pictures: the trained model's answers, and the regions that it looked at", fontsize=12)
    axes = figure.subplots(2, len(asked), squeeze=False)
    for column, one in enumerate(asked):
        pixels = np.asarray(Image.open(one.picture).convert("RGB"))
        height, width = pixels.shape[:2]
        answer, probability = one.found.answers[0]
        is_right = answer == one.right
        verdict = "right" if is_right else f"wrong: {one.right}"
        picture, looked = axes[:, column]
        picture.imshow(pixels)
        picture.set_title(textwrap.fill(one.question, 25) + "\n", fontsize=10)
        picture.text(
            0.5,
            1.02,
            f"{answer} ({probability:.0%}), {verdict}",
            color=GOOD if is_right else BAD,
            fontsize=10.5,
            fontweight="bold",
            ha="center",
            va="bottom",
            transform=picture.transAxes,
        )
        looked.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
        if one.found.weights is not None:
            weights = one.found.weights.numpy()
            drawn = looked.imshow(
                weights, cmap="inferno", vmin=0, alpha=0.72, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            bar = figure.colorbar(drawn, ax=looked, location="bottom", fraction=0.05, pad=0.03)
            bar.set_ticks([0, float(weights.max())], labels=["0 %", f"{weights.max():.0%} of its attention"])
            bar.ax.get_xticklabels()[0].set_horizontalalignment("left")
            bar.ax.get_xticklabels()[1].set_horizontalalignment("right")
        for axis in (picture, looked):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)


def _training(figure: Any, shown: Shown) -> None:
    losses, steps, right = figure.subplots(1, 3)
    plain, patched = shown.losses
    numbers = range(1, len(plain) + 1)
    losses.plot(numbers, plain, color=BEFORE, linewidth=5, label="before patch")
    losses.plot(numbers, patched, color=AFTER, linewidth=1.5, label="after patch")
    losses.set(xlabel="step", ylabel="training loss")
    losses.set_title(
        f"ViLT, same weights and batches:\nlosses differ by {shown.loss_difference:.0e} at most, relatively"
    )
    losses.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    losses.legend(frameon=False)

    names = [one.name for one in shown.turns]
    _pairs(steps, names, [one.step_ms for one in shown.turns], "ms")
    steps.set_title("A training step, in turns (less is better)")
    steps.legend(frameon=False, loc="lower right")

    labels = list(shown.accuracy)
    shares = [100 * shown.accuracy[name] for name in labels]
    bars = right.barh(labels, shares, color=[AFTER if name in shown.trained else BEFORE for name in labels])
    right.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=3)
    right.invert_yaxis()
    right.set(xlabel="% of held-out questions", xlim=(0, 125), xticks=range(0, 101, 20))
    right.set_title("Right answers (blue: the trained model)")


def _families(figure: Any, families: Sequence[Comparison]) -> None:
    figure.suptitle("Whole models of transformers before and after patch(model) (less is better)", fontsize=12)
    names = [f"{one.family} {one.dtype}, batch {one.batch}" for one in families]
    axes = figure.subplots(1, 4, sharey=True)
    mib = 2**20
    panels = (
        ("inference, ms", [one.inference_ms for one in families]),
        ("forward and backward, ms", [one.step_ms for one in families]),
        ("kept for backward, MiB", [tuple(count / mib for count in one.saved_bytes) for one in families]),
        ("peak of a step, MiB", [tuple(count / mib for count in one.peak_bytes) for one in families]),
    )
    for axis, (title, pairs) in zip(axes, panels, strict=True):
        _pairs(axis, names, pairs, title)
    axes[0].legend(frameon=False, loc="lower right")


def _pairs(axis: Any, names: Sequence[str], pairs: Sequence[tuple[float, float] | None], label: str) -> None:
    """Bars before and after of each name, with the quotient at the second; None leaves a place empty."""
    for place, pair in enumerate(pairs):
        if pair is None:
            continue
        before, after = pair
        axis.barh(place - 0.2, before, 0.38, color=BEFORE, label=None if place else "before")
        axis.barh(place + 0.2, after, 0.38, color=AFTER, label=None if place else "after")
        axis.text(before, place - 0.2, f" {before:.0f}", va="center", fontsize=8)
        axis.text(after, place + 0.2, f" {after:.0f}  ({before / after:.2f}x)", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.32)
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
