"""What a configuration's ``fusion`` names: modules that join one vector of a picture with one of a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

import velm_kernels
from python_models.vqa import plain


class Forms(NamedTuple):
    """A module of this library, and the same one, with the same parameters, in plain PyTorch."""

    velm: Callable[..., nn.Module]
    plain: Callable[..., nn.Module]


class OfPair(nn.Module):
    """Hands a pair on to a module that takes two arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return self.module(*x)


class Modulated(nn.Module):
    """The question scales and shifts what the picture is, and two layers follow."""

    def __init__(self, film: nn.Module, size: int, fused: int) -> None:
        super().__init__()
        self.film = film
        self.layers = nn.Sequential(nn.Linear(size, 2 * fused), nn.GELU(), nn.Linear(2 * fused, fused))

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        picture, question = x
        return self.layers(self.film(picture, question))


class QuestionAlone(nn.Module):
    """What the words alone give away: the picture is not looked at."""

    def __init__(self, sizes: Sequence[int], fused: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sizes[1], 2 * fused), nn.GELU(), nn.Linear(2 * fused, fused))

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return self.layers(x[1])


def _published(name: str, **options: object) -> Forms:
    """A module that takes a pair; options are those of the papers, but for sizes that would outgrow everything else."""

    def make(kind: type[nn.Module]) -> Callable[..., nn.Module]:
        return lambda sizes, fused: kind(list(sizes), fused, **options)

    return Forms(make(getattr(velm_kernels, name)), make(getattr(plain, name)))


def _bilinear(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda sizes, fused: OfPair(kind(*sizes, fused))


def _film(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda sizes, fused: Modulated(kind(sizes[1], sizes[0]), sizes[0], fused)


def _of_pair(name: str, *options: int) -> Forms:
    """A module that takes any number of modalities, each an argument."""

    def make(kind: type[nn.Module]) -> Callable[..., nn.Module]:
        return lambda sizes, fused: OfPair(kind(list(sizes), fused, *options))

    return Forms(make(getattr(velm_kernels, name)), make(getattr(plain, name)))


# Called with the sizes of picture and question and with that of the result; the module takes both in a list.
FUSIONS: dict[str, Forms] = {
    "bilinear": Forms(_bilinear(velm_kernels.Bilinear), _bilinear(nn.Bilinear)),
    "block": _published("Block", mm_dim=800, chunks=20, rank=15),
    "block-tucker": _published("BlockTucker", mm_dim=480, chunks=12),
    "concat-mlp": _published("ConcatMLP"),
    "film": Forms(_film(velm_kernels.FiLM), _film(plain.FiLM)),
    "linear-sum": _published("LinearSum", activ_output=None),
    "low-rank-fusion": _of_pair("LowRankFusion", 16),
    "mcb": _published("MCB", mm_dim=4000, activ_output=None),
    "mfb": _published("MFB", mm_dim=1000, factor=5, activ_input=None, activ_output=None, normalize=True),
    "mfh": _published("MFH", mm_dim=1000, factor=5, activ_input=None, activ_output=None, normalize=True),
    "mlb": _published("MLB", activ_input="tanh", activ_output=None),
    "mutan": _published("Mutan", mm_dim=360, rank=10),
    "tensor-fusion": _of_pair("TensorFusion"),
    "tucker": _published("Tucker", mm_dim=80),
    "question-alone": Forms(QuestionAlone, QuestionAlone),
}
