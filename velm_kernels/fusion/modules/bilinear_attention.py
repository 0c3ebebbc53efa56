"""The two layers of Bilinear Attention Networks: attention maps of regions and words, and what they pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.bilinear_attention import bilinear_attention, bilinear_attention_pool
from velm_kernels.fusion.bilinear_attention.reference import live_rows
from velm_kernels.fusion.dropout_residual import dropout_residual
from velm_kernels.linear.linear import linear


class _WeightNormLinear(nn.Module):
    """A linear layer whose weight has a direction and one length, with ReLU: ``weight_g * weight_v / |weight_v|``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        layer = nn.Linear(in_features, out_features)
        self.weight_v, self.bias = layer.weight, layer.bias
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(layer.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v))
        return linear(x, weight, self.bias, "relu")


class _Projection(nn.Module):
    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        # The number that the layer has behind its dropout in the published sequence.
        self.main = nn.ModuleDict({"1" if dropout > 0 else "0": _WeightNormLinear(in_features, out_features)})

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.main.values()
        out: Tensor = layer(_dropped(x, self.dropout, self.training))
        return out


def _dropped(x: Tensor, p: float, training: bool) -> Tensor:
    return dropout_residual(x, dropout_p=p) if p > 0 and training else x


def _checked_dropout(dropout: Sequence[float]) -> tuple[float, float]:
    if len(dropout) != 2:
        raise ValueError(f"dropout: expected two probabilities in [0, 1), given {checks.describe(list(dropout))}")
    return checks.probability("dropout[0]", dropout[0]), checks.probability("dropout[1]", dropout[1])


def _checked(name: str, x: Tensor, layer: _Projection) -> Tensor:
    (projection,) = layer.main.values()
    weight = cast(_WeightNormLinear, projection).weight_v
    rows = "regions" if name == "v" else "words"
    return checks.features(name, x, f"(batch, {rows}, {name}_dim)", weight.shape[1], weight, 3)


def _without_padding(name: str, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Zeros where a row does not count: padding may hold NaN, which must not reach the gradients of weights."""
    if lengths is None and mask is None:
        return x
    if lengths is not None:
        lengths = checks.integers(f"{name}_lengths", lengths, "(batch,)", x.shape[:1], name, x)
    if mask is not None:
        mask = checks.mask(f"{name}_mask", mask, "the first dimensions of " + name, x.shape[:2], name, x)
    return torch.where(live_rows(x, lengths, mask)[..., None], x, 0.0)


class _Logits(nn.Module):
    def __init__(
        self, v_dim: int, q_dim: int, features: int, glimpses: int, input_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.v_net = _Projection(v_dim, features, input_dropout)
        self.q_net = _Projection(q_dim, features, input_dropout)
        self.h_mat_v = nn.Parameter(torch.randn(1, glimpses, 1, features))
        self.h_mat_g = nn.Parameter(torch.linalg.vector_norm(self.h_mat_v.detach()))
        self.h_bias = nn.Parameter(torch.randn(1, glimpses, 1, 1))

    def forward(self, v: Tensor, q: Tensor, **masks: Tensor | None) -> tuple[Tensor, Tensor]:
        v = _dropped(self.v_net(v), self.dropout, self.training)
        h = (self.h_mat_v * (self.h_mat_g / torch.linalg.vector_norm(self.h_mat_v))).flatten(0, 2)
        maps, logits = bilinear_attention(v, self.q_net(q), h, self.h_bias.flatten(), return_logits=True, **masks)
        return maps, logits


class BilinearAttention(nn.Module):
    """The attention maps of Bilinear Attention Networks (Kim et al., 2018) over all pairs of regions and words, by
    :func:`velm_kernels.bilinear_attention`.

    Constructor and state_dict are those of ``BiAttention`` in the authors' ``ban-vqa``, with keys such as
    ``logits.v_net.main.1.weight_v``, and so is the result: weight-normalised projections of both sides with dropout
    before and ReLU after them, dropout of the projected regions in training, and a weight-normalised ``h``.

    Args:
        x_dim: features of a region.
        y_dim: features of a word.
        z_dim: a third of the features that both are projected to.
        glimpse: number of maps.
        dropout: probabilities before the projections, and of the projected regions.
        factor: in place of the three in ``z_dim``.

    Shape:
        v ``(batch, regions, x_dim)`` and q ``(batch, words, y_dim)`` to a pair of maps and logits, both
        ``(batch, glimpse, regions, words)``, the maps with sum 1 over the pairs that count. ``v_mask``, ``q_mask``,
        ``v_lengths`` and ``q_lengths`` say which do, as in the function; ``v_mask=True``, the default, leaves out
        regions that are all zeros, and ``v_mask=None`` none. What does not count may hold NaN.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or a mask is
            not bool.
        ValueError: an argument is out of range; from forward: features, a shape, a device or (on the CPU, or with
            VELM_CHECK=1) a length does not fit.

    Example:
        >>> attention = velm_kernels.BilinearAttention(x_dim=64, y_dim=48, z_dim=32, glimpse=2).eval()
        >>> maps, logits = attention(torch.randn(4, 36, 64), torch.randn(4, 14, 48))
        >>> maps.shape
        torch.Size([4, 2, 36, 14])
        >>> torch.allclose(maps.sum((2, 3)), torch.ones(4, 2), atol=1e-5)
        True
    """

    @checked(factor=1)
    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        z_dim: int,
        glimpse: int,
        dropout: Sequence[float] = (0.2, 0.5),
        *,
        factor: int = 3,
    ) -> None:
        super().__init__()
        self.glimpse = glimpse
        self.logits = _Logits(x_dim, y_dim, z_dim * factor, glimpse, *_checked_dropout(dropout))

    def forward(
        self,
        v: Tensor,
        q: Tensor,
        v_mask: Tensor | bool | None = True,
        q_mask: Tensor | None = None,
        *,
        v_lengths: Tensor | None = None,
        q_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        v, q = _checked("v", v, self.logits.v_net), _checked("q", q, self.logits.q_net)
        mask = ((v != 0).any(-1) if v_mask else None) if isinstance(v_mask, bool) else v_mask
        v, q = _without_padding("v", v, v_lengths, mask), _without_padding("q", q, q_lengths, q_mask)
        maps, logits = self.logits(v, q, v_mask=mask, q_mask=q_mask, v_lengths=v_lengths, q_lengths=q_lengths)
        return maps, logits

    def extra_repr(self) -> str:
        return f"glimpse={self.glimpse}"


class BilinearAttentionPool(nn.Module):
    """The joint features that a map of :class:`BilinearAttention` pools, by
    :func:`velm_kernels.bilinear_attention_pool`: weight-normalised projections of regions and words with dropout before
    and ReLU after them, and their bilinear form with the map.

    state_dict and result are those of the glimpses' ``BCNet`` (``h_out=None``) in the authors' ``ban-vqa``. A network
    has one for each glimpse, and updates q between them::

        maps, _ = attention(v, q)
        for g, (pool, project) in enumerate(zip(pools, projections)):
            q = q + project(pool(v, q, maps[:, g]))[:, None]

    Args:
        v_dim, q_dim: features of a region and of a word.
        h_dim: features of the result.
        dropout: probability before the projections.
        factor: number of products that are summed to one feature of the result.

    Shape:
        v ``(batch, regions, v_dim)``, q ``(batch, words, q_dim)`` and attention ``(batch, regions, words)`` or
        ``(batch, glimpses, regions, words)`` to ``(batch, h_dim)`` or ``(batch, glimpses, h_dim)``. ``v_mask``,
        ``q_mask``, ``v_lengths`` and ``q_lengths`` as in the function.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or a mask is
            not bool.
        ValueError: an argument is out of range; from forward: features, a shape, a device or (on the CPU, or with
            VELM_CHECK=1) a length does not fit.

    Example:
        >>> pool = velm_kernels.BilinearAttentionPool(v_dim=64, q_dim=48, h_dim=32)
        >>> maps = torch.rand(4, 2, 36, 14)  # one map for each of two glimpses
        >>> pool(torch.randn(4, 36, 64), torch.randn(4, 14, 48), maps).shape
        torch.Size([4, 2, 32])
    """

    @checked(factor=1)
    def __init__(self, v_dim: int, q_dim: int, h_dim: int, dropout: float = 0.2, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        dropout, _ = _checked_dropout((dropout, 0.0))
        self.v_net = _Projection(v_dim, h_dim * factor, dropout)
        self.q_net = _Projection(q_dim, h_dim * factor, dropout)

    def forward(
        self,
        v: Tensor,
        q: Tensor,
        attention: Tensor,
        *,
        v_mask: Tensor | None = None,
        q_mask: Tensor | None = None,
        v_lengths: Tensor | None = None,
        q_lengths: Tensor | None = None,
    ) -> Tensor:
        v, q = _checked("v", v, self.v_net), _checked("q", q, self.q_net)
        v, q = _without_padding("v", v, v_lengths, v_mask), _without_padding("q", q, q_lengths, q_mask)
        return bilinear_attention_pool(
            self.v_net(v),
            self.q_net(q),
            attention,
            factor=self.factor,
            v_mask=v_mask,
            q_mask=q_mask,
            v_lengths=v_lengths,
            q_lengths=q_lengths,
        )

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
