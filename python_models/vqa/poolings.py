"""What a configuration's ``pooling`` names: modules that make one vector of the regions of a picture."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import velm_kernels
from python_models.vqa import plain
from python_models.vqa.fusions import Forms


class GuidedAttention(nn.Module):
    """The question is the one query that attends over the regions. In training the regions' weights are left out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, Tensor | None]:
        query = self.query(question)[:, None]
        key, value = self.key, self.value
        pooled = velm_kernels.attention_pool(
            regions, query, key.weight, value.weight, key.bias, value.bias, heads=self.heads
        )
        weights = None if self.training else self._weights(regions, query)
        return self.out(pooled[:, 0]), weights

    def _weights(self, regions: Tensor, query: Tensor) -> Tensor:
        key = self._split(self.key(regions))
        _, mass = velm_kernels.cross_attention(self._split(query), key, key, return_key_mass=True)
        return mass.mean(1)


class PlainGuidedAttention(GuidedAttention):
    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, Tensor | None]:
        query = self._split(self.query(question)[:, None])
        key, value = self._split(self.key(regions)), self._split(self.value(regions))
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        pooled = (weights @ value).transpose(1, 2).flatten(1)
        return self.out(pooled), None if self.training else weights.mean(1)[:, 0]


class GuidedBilinear(nn.Module):
    """Bilinear attention over pairs of a region and the question, one map a head, the features of all maps added."""

    def __init__(self, attention: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.attention, self.joint = attention, pool

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        words = question[:, None]
        maps, _ = self.attention(regions, words, v_mask=None)
        return self.joint(regions, words, maps).sum(1), maps.mean(1)[..., 0]


class Unguided(nn.Module):
    """Pools all regions, whatever the question."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, None]:
        return self.pool(regions), None


class LargestOfMerged(Unguided):
    """The largest values of half as many tokens, each the mean of similar regions."""

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, None]:
        return self.pool(regions)[0].amax(1), None


class LearnedQuery(Unguided):
    """A learned query attends over the regions, whatever the question."""

    def forward(self, regions: Tensor, question: Tensor) -> tuple[Tensor, None]:
        return self.pool(regions)[:, 0], None


def _bilinear_attention(
    attention: Callable[..., nn.Module], pool: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def make(dim: int, heads: int) -> nn.Module:
        return GuidedBilinear(attention(dim, dim, dim, heads, (0.0, 0.0)), pool(dim, dim, dim, 0.0))

    return make


def _perceiver(kind: type[nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda dim, heads: LearnedQuery(kind(dim, 1, heads, dim // heads, n_latents=1, hidden_dim=2 * dim))


def _mode(mode: str) -> Forms:
    def ours(dim: int, heads: int) -> nn.Module:
        return Unguided(velm_kernels.MaskedPool(mode))

    def theirs(dim: int, heads: int) -> nn.Module:
        return Unguided(getattr(plain, mode))

    return Forms(ours, theirs)


# Called with the size of regions and questions and the number of heads; the module takes regions
# (batch, regions, dim) and questions (batch, dim) and returns (batch, dim) and, if it weighs them, the weights of the
# regions (batch, regions), which sum to 1; those may be None in training.
POOLINGS: dict[str, Forms] = {
    "attention": Forms(GuidedAttention, PlainGuidedAttention),
    "bilinear-attention": Forms(
        _bilinear_attention(velm_kernels.BilinearAttention, velm_kernels.BilinearAttentionPool),
        _bilinear_attention(plain.BilinearAttention, plain.BilinearAttentionPool),
    ),
    "learned-query": Forms(
        lambda dim, heads: LearnedQuery(velm_kernels.AttentionPool(dim, heads)),
        lambda dim, heads: LearnedQuery(plain.AttentionPool(dim, heads)),
    ),
    "perceiver": Forms(_perceiver(velm_kernels.PerceiverResampler), _perceiver(plain.PerceiverResampler)),
    "token-merge": Forms(
        lambda dim, heads: LargestOfMerged(velm_kernels.TokenMerge(ratio=0.5)),
        lambda dim, heads: LargestOfMerged(plain.TokenMerge(ratio=0.5)),
    ),
    **{mode: _mode(mode) for mode in ("mean", "max", "logsumexp", "gem")},
}
