"""Modules that a configuration names: what pools the regions of a picture, what joins the picture and a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import velm_kernels


class AttentionPooling(nn.Module):
    """Question-guided attention: the question is the one query over the regions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        query = self._split(self.query(question)[:, None])
        key, value = self._split(self.key(regions)), self._split(self.value(regions))
        pooled, mass = velm_kernels.cross_attention(query, key, value, return_key_mass=True)
        return self.out(pooled.transpose(1, 2).flatten(1)), mass.mean(1)


class UnguidedPooling(nn.Module):
    """Over all regions, whatever the question, by a mode of ``masked_pool``."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, None]:
        return velm_kernels.masked_pool(regions, mode=self.mode), None


def two_layers(size: int, fused: int) -> nn.Module:
    hidden = velm_kernels.Linear(size, 2 * fused, activation="gelu")
    return nn.Sequential(hidden, velm_kernels.Linear(2 * fused, fused))


class Product(nn.Module):
    """Both projected and multiplied, element by element (Antol et al., "VQA", 2015)."""

    def __init__(self, sizes: Sequence[int], fused: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(size, fused) for size in sizes)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        picture, question = (project(x) for project, x in zip(self.projections, inputs, strict=True))
        return picture.tanh() * question.tanh()


class Concatenation(nn.Module):
    """Both side by side through two layers."""

    def __init__(self, sizes: Sequence[int], fused: int) -> None:
        super().__init__()
        self.layers = two_layers(sum(sizes), fused)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.layers(torch.cat(tuple(inputs), -1))


class Bilinear(nn.Module):
    """Every element of one times every element of the other, weighed for each output."""

    def __init__(self, sizes: Sequence[int], fused: int) -> None:
        super().__init__()
        # Products of many pairs: smaller sides keep the weight from being most of the model.
        self.projections = nn.ModuleList(nn.Linear(size, size // 2) for size in sizes)
        self.join = velm_kernels.Bilinear(sizes[0] // 2, sizes[1] // 2, fused)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        picture, question = (project(x) for project, x in zip(self.projections, inputs, strict=True))
        return self.join(picture, question)


class QuestionAlone(nn.Module):
    """What the words alone give away: the picture is not looked at."""

    def __init__(self, sizes: Sequence[int], fused: int) -> None:
        super().__init__()
        self.layers = two_layers(sizes[1], fused)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.layers(inputs[1])


# Called with the size of regions and questions and the number of heads; the module takes regions
# (batch, regions, dim) and questions (batch, dim) and returns (batch, dim) and, if it weighs them, the weights of the
# regions (batch, regions), which sum to 1.
POOLINGS: dict[str, Callable[[int, int], nn.Module]] = {
    "attention": AttentionPooling,
    **{mode: lambda dim, heads, mode=mode: UnguidedPooling(mode) for mode in ("mean", "max", "logsumexp", "gem")},
}

# Called with the sizes of picture and question and that of the result; the module takes both as a list.
FUSIONS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "bilinear": Bilinear,
    "concatenation": Concatenation,
    "product": Product,
    "question alone": QuestionAlone,
}
