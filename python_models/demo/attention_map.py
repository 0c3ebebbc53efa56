"""How much attention each region of a picture receives from a question, without ever forming the attention weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import velm_kernels
from python_models.demo import data


def regions(model: nn.Module, split: data.Split, question: int) -> Tensor:
    """Attention that the words of a question pay to each image patch in the last layer, summed over heads and words.

    The projections of the trained layer give query, key and value; ``cross_attention(return_key_mass=True)`` gives the
    sums, with memory for one number a key.

    Returns:
        ``(rows, columns)`` of patches, summing to at most heads * words; the rest went to words and [CLS].
    """
    model.eval()
    inputs = data.batch(split, torch.tensor([question]))
    words = int(inputs["attention_mask"].sum())
    length = inputs["input_ids"].shape[1]
    layer = model.vilt.encoder.layer[-1].attention.attention
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["hidden"] = args[0]

    embeddings = model.vilt.embeddings
    hook = layer.register_forward_pre_hook(keep)
    with torch.inference_mode():
        torch.manual_seed(0)
        model(**inputs)
        # The same seed draws the same order of patches again; this time the order is returned.
        torch.manual_seed(0)
        *_, (places, grid) = embeddings.visual_embed(
            inputs["pixel_values"], inputs["pixel_mask"], max_image_length=model.config.max_image_length
        )
        heads = (layer.num_attention_heads, layer.attention_head_size)
        query, key, value = (
            project(seen["hidden"]).unflatten(-1, heads).transpose(1, 2)
            for project in (layer.query, layer.key, layer.value)
        )
        visible = torch.ones(1, key.shape[2], dtype=torch.bool)
        visible[:, words:length] = False
        _, mass = velm_kernels.cross_attention(query[:, :, :words], key, value, key_mask=visible, return_key_mass=True)
    hook.remove()
    to_patches = mass[0].sum(0)[length + 1 :]
    picture = torch.zeros(grid)
    picture[places[0, :, 0], places[0, :, 1]] = to_patches
    return picture
