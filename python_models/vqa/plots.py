"""Pictures of what the model looked at."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from python_models.vqa.evaluation import Prediction


def attention(path: Path, picture: Image.Image, question: str, found: Prediction) -> None:
    """The picture, and beside it the picture under the weights of its regions.

    Raises:
        ValueError: the model does not weigh regions.
    """
    if found.weights is None:
        raise ValueError("this model does not weigh the regions of a picture, so there is no map of them")
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    figure, (plain, looked) = plt.subplots(1, 2, figsize=(7, 4), layout="constrained")
    plain.imshow(pixels)
    looked.imshow(pixels, alpha=0.55)
    looked.imshow(found.weights.numpy(), alpha=0.55, cmap="magma", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    answer, probability = found.answers[0]
    figure.suptitle(f"{question}\n{answer} ({probability:.0%})")
    for axis in (plain, looked):
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
