"""The two pictures that the demo writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from python_models.demo.families import Comparison


@dataclass(frozen=True)
class Looked:
    """A picture with the question asked, the model's answer, the right one, and the attention on its patches."""

    pixels: Tensor
    question: str
    predicted: str
    right: str
    attention: Tensor


def curves_and_speed(
    path: Path, plain: Sequence[float], patched: Sequence[float], demo_speedup: float, families: Sequence[Comparison]
) -> None:
    """Loss curves on the left, how many times as fast the patched models are on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.plot(patched, linewidth=3, alpha=0.5, label="patched")
    left.plot(plain, linewidth=1, color="black", label="unpatched")
    left.set(xlabel="step", ylabel="training loss (cross-entropy)", title="ViLT on easy-vqa, same seed and batches")
    left.legend()
    names = ["vilt (this demo)", *(family.family for family in families)]
    steps = [demo_speedup, *(family.step_speedup for family in families)]
    inferences = [None, *(family.inference_speedup for family in families)]
    for place, (step, inference) in enumerate(zip(steps, inferences, strict=True)):
        bars = [(place - 0.2, step, "tab:blue")]
        if inference is not None:
            bars.append((place + 0.2, inference, "tab:orange"))
        for where, width, colour in bars:
            right.barh(where, width, height=0.38, color=colour)
            right.text(width, where, f" {width:.2f}x", va="center", fontsize=8)
    right.barh([0], [0], color="tab:blue", label="training step")
    right.barh([0], [0], color="tab:orange", label="inference")
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="unpatched time / patched time, fp32", title="patch(model)")
    right.margins(x=0.15)
    right.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def attention_on_pictures(path: Path, looked: Sequence[Looked]) -> None:
    """Each picture beside itself under the attention that its regions received from the words of the question."""
    figure, axes = plt.subplots(2, len(looked), figsize=(3.2 * len(looked), 6.6), layout="constrained", squeeze=False)
    for column, one in enumerate(looked):
        picture = one.pixels.permute(1, 2, 0).numpy()
        axes[0, column].imshow(picture)
        axes[0, column].set_title(f"{one.question}\nmodel: {one.predicted}   right: {one.right}", fontsize=9)
        axes[1, column].imshow(picture, alpha=0.55)
        scaled = torch.nn.functional.interpolate(one.attention[None, None], size=picture.shape[:2], mode="bilinear")
        shown = axes[1, column].imshow(scaled[0, 0].numpy(), cmap="inferno", alpha=0.6)
        figure.colorbar(shown, ax=axes[1, column], fraction=0.046, label="attention received (key mass)")
        for row in range(2):
            axes[row, column].set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
