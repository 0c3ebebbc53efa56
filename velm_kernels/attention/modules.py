"""Cross-modal attention blocks as ordinary modules, built from the public operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.attention.bidirectional_attention import bidirectional_attention
from velm_kernels.attention.cross_attention import cross_attention
from velm_kernels.attention.gated_residual import gated_residual
from velm_kernels.constructors import checked
from velm_kernels.linear import MLP, Linear


def _divide(name: str, total: int, by_name: str, by: int) -> int:
    if by <= 0 or total % by:
        raise ValueError(f"{name}: expected a multiple of {by_name} = {by}, given {total}")
    return total // by


def _check_streams(
    a: Tensor, b: Tensor, dim_a: int, dim_b: int, mask_a: Tensor | None, mask_b: Tensor | None, like: Any = None
) -> None:
    checks.features("states_a", a, "(batch, a, dim_a)", dim_a, like, 3)
    checks.features("states_b", b, "(batch, b, dim_b)", dim_b, like, 3)
    if b.shape[0] != a.shape[0]:
        raise ValueError(f"states_b: expected (batch, b, dim_b) with batch = {a.shape[0]}, given {tuple(b.shape)}")
    for name, mask, states in (("mask_a", mask_a, a), ("mask_b", mask_b, b)):
        if mask is not None:
            checks.shape(name, checks.tensor(name, mask), f"(batch, {name[-1]})", states.shape[:2])
            checks.dtype_in(name, mask, (torch.bool,))
            checks.same_device(name, mask, name.replace("mask", "states"), states)


def _split(x: Tensor, heads: int) -> Tensor:
    """``(batch, rows, heads * dim)`` to ``(batch, heads, rows, dim)``, without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence over another, with projections (Vaswani et al., 2017, section 3.2.2).

    Args:
        embed_dim: size of the attending features, and of the output.
        num_heads: query heads.
        kv_dim: size of the attended features, by default ``embed_dim``.
        num_kv_heads: key and value heads, a divisor of ``num_heads``, by default ``num_heads``.
        head_dim: by default ``embed_dim / num_heads``.
        bias: whether the four projections have biases.
        qk_norm: RMS norm of every query and key head before the product, with weights, as in Llama 3.2 Vision.
        dropout: probability with which an attention weight is dropped in training.
        norm_eps: added to the mean square in the RMS norms.
        device, dtype: of the parameters.

    Projections start as Xavier uniform with zero biases, norm weights as ones.

    Shape:
        hidden_states ``(batch, queries, embed_dim)`` and encoder_hidden_states ``(batch, keys, kv_dim)`` to
        ``(batch, queries, embed_dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), or another argument is not as in
            :func:`velm_kernels.cross_attention`.
        ValueError: an argument is out of range, or sizes do not divide; from forward: features, a shape, a device or
            (on the CPU, or with VELM_CHECK=1) a length or a range does not fit.

    Example:
        >>> attention = velm_kernels.CrossAttention(64, num_heads=4, kv_dim=96)
        >>> attention(torch.randn(2, 10, 64), torch.randn(2, 50, 96), key_lengths=torch.tensor([50, 20])).shape
        torch.Size([2, 10, 64])
    """

    @checked(num_heads=1, num_kv_heads=1, head_dim=1)
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kv_dim = embed_dim if kv_dim is None else kv_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _divide("num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        self.head_dim = _divide("embed_dim", embed_dim, "num_heads", num_heads) if head_dim is None else head_dim
        self.dropout, self.norm_eps = checks.probability("dropout", dropout), norm_eps
        self.q_proj = Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.k_proj = Linear(self.kv_dim, self.num_kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = Linear(self.kv_dim, self.num_kv_heads * self.head_dim, bias=bias, **factory)
        self.out_proj = Linear(num_heads * self.head_dim, embed_dim, bias=bias, **factory)
        if qk_norm:
            self.q_norm_weight = nn.Parameter(torch.empty(self.head_dim, **factory))
            self.k_norm_weight = nn.Parameter(torch.empty(self.head_dim, **factory))
        else:
            self.register_parameter("q_norm_weight", None)
            self.register_parameter("k_norm_weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            _reset_projection(projection)
        for weight in (self.q_norm_weight, self.k_norm_weight):
            if weight is not None:
                nn.init.ones_(weight)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *,
        key_lengths: Tensor | None = None,
        key_ranges: tuple[Tensor, Tensor] | None = None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        return_key_mass: bool = False,
    ) -> Any:
        """Attends and projects; what restricts the keys is that of :func:`velm_kernels.cross_attention`.

        Args:
            hidden_states: ``(batch, queries, embed_dim)``.
            encoder_hidden_states: ``(batch, keys, kv_dim)``.
            key_lengths: ``(batch,)`` integers.
            key_ranges: ``(start, stop)``, each ``(batch, queries)`` integers.
            key_mask: ``(batch, keys)`` bool, True = may be attended.
            mask: bool, broadcastable to ``(batch, num_heads, queries, keys)``.
            bias: added to the scores, broadcastable to ``(batch, num_heads, queries, keys)``.
            is_causal: query i sees keys up to i.
            return_key_mass: also return the attention that each key received, ``(batch, num_heads, keys)``.

        Returns:
            ``(batch, queries, embed_dim)``, or that and the key mass.
        """
        like = self.q_proj.weight
        checks.features("hidden_states", hidden_states, "(batch, queries, embed_dim)", self.embed_dim, like, 3)
        checks.features("encoder_hidden_states", encoder_hidden_states, "(batch, keys, kv_dim)", self.kv_dim, like, 3)
        results = cross_attention(
            _split(self.q_proj(hidden_states), self.num_heads),
            _split(self.k_proj(encoder_hidden_states), self.num_kv_heads),
            _split(self.v_proj(encoder_hidden_states), self.num_kv_heads),
            key_lengths=key_lengths,
            key_ranges=key_ranges,
            key_mask=key_mask,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            query_norm_weight=self.q_norm_weight,
            key_norm_weight=self.k_norm_weight,
            norm_eps=self.norm_eps,
            dropout_p=self.dropout if self.training else 0.0,
            return_key_mass=return_key_mass,
        )
        if return_key_mass:
            return self.out_proj(_join(results[0])), results[1]
        return self.out_proj(_join(results))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kv_dim={self.kv_dim}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, qk_norm={self.q_norm_weight is not None}, "
            f"dropout={self.dropout}"
        )


def _reset_projection(projection: nn.Module) -> None:
    nn.init.xavier_uniform_(projection.weight)  # type: ignore[arg-type]
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]


class GatedCrossAttention(nn.Module):
    """The gated cross-attention layer of Flamingo (Alayrac et al., 2022, figure 4).

    ``x = x + tanh(attention_gate) * attention(norm(x), media)``, then
    ``x = x + tanh(feed_forward_gate) * feed_forward(norm(x))``. Both gates start at 0, so the layer starts as the
    identity in a pretrained language model.

    Args:
        embed_dim: size of the text features.
        num_heads: attention heads.
        kv_dim: size of the media features, by default ``embed_dim``.
        hidden_dim: width of the feed-forward block, by default ``4 * embed_dim``.
        activation: activation of the feed-forward block, as in :func:`velm_kernels.linear`.
        per_channel_gates: one gate per channel of a branch instead of one per branch.
        layer_norm_eps: added to the variance in both layer norms.
        others: as in :class:`CrossAttention`.

    Shape:
        hidden_states ``(batch, queries, embed_dim)`` and encoder_hidden_states ``(batch, keys, kv_dim)`` to
        ``(batch, queries, embed_dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), or a mask is not bool.
        ValueError: an argument is out of range, sizes do not divide, or ``activation`` is unknown; from forward:
            features, a shape or a device do not fit.

    Example:
        >>> layer = velm_kernels.GatedCrossAttention(64, num_heads=4, kv_dim=96)
        >>> text = torch.randn(2, 10, 64)
        >>> torch.equal(layer(text, torch.randn(2, 50, 96)), text)  # both gates start at 0
        True
    """

    @checked(num_heads=1, num_kv_heads=1, head_dim=1)
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        per_channel_gates: bool = False,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, **factory)
        self.attention = CrossAttention(
            embed_dim, num_heads, kv_dim, num_kv_heads, head_dim, bias, qk_norm, dropout, **factory
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, **factory)
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.feed_forward = MLP(embed_dim, hidden_dim, activation=activation, bias=bias, **factory)
        gates = (embed_dim,) if per_channel_gates else (1,)
        self.attention_gate = nn.Parameter(torch.zeros(gates, **factory))
        self.feed_forward_gate = nn.Parameter(torch.zeros(gates, **factory))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *,
        row_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_ranges: tuple[Tensor, Tensor] | None = None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Adds what the text gathers from the media.

        Args:
            hidden_states: ``(batch, queries, embed_dim)``.
            encoder_hidden_states: ``(batch, keys, kv_dim)``.
            row_mask: bool ``(batch, queries)``: False = a text row that sees no image; the attention branch adds
                nothing to it, also where projections have biases. By default, with ``key_ranges``, the rows with a
                non-empty range.
            key_lengths, key_ranges, key_mask, mask: as in :class:`CrossAttention`.

        Returns:
            ``(batch, queries, embed_dim)``.
        """
        embed_dim, like = self.attention.embed_dim, self.attention_gate
        checks.features("hidden_states", hidden_states, "(batch, queries, embed_dim)", embed_dim, like, 3)
        checks.norm_dtype("hidden_states", hidden_states, self.attention_norm)
        if key_ranges is not None:
            checks.ranges("key_ranges", key_ranges)
            rows = tuple(hidden_states.shape[:2])
            for i, bound in enumerate(key_ranges):
                checks.shape(f"key_ranges[{i}]", bound, "(batch, queries)", rows)
                checks.same_device(f"key_ranges[{i}]", bound, "hidden_states", hidden_states)
            row_mask = key_ranges[1] > key_ranges[0] if row_mask is None else row_mask
        branch = self.attention(
            self.attention_norm(hidden_states),
            encoder_hidden_states,
            key_lengths=key_lengths,
            key_ranges=key_ranges,
            key_mask=key_mask,
            mask=mask,
        )
        hidden_states = gated_residual(hidden_states, branch, self.attention_gate, row_mask)
        branch = self.feed_forward(self.feed_forward_norm(hidden_states))
        return gated_residual(hidden_states, branch, self.feed_forward_gate)


class CoAttention(nn.Module):
    """The co-attention block of ViLBERT (Lu et al., 2019): two streams, each attending over the other.

    ``a' = norm(a + attention(a over b))`` and ``b' = norm(b + attention(b over a))``, both from the same inputs.

    Args:
        dim_a, dim_b: feature sizes of the two streams.
        num_heads: attention heads of both directions.
        inner_dim: total size of the heads, by default the smaller of the two feature sizes.
        bias, dropout: as in :class:`CrossAttention`.
        layer_norm_eps: added to the variance in both layer norms.
        device, dtype: of the parameters.

    Shape:
        states_a ``(batch, a, dim_a)`` and states_b ``(batch, b, dim_b)`` to a pair of the same shapes.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), or a mask is not bool.
        ValueError: an argument is out of range, or ``num_heads`` does not divide the heads' size; from forward:
            features, a shape or a device do not fit.

    Example:
        >>> layer = velm_kernels.CoAttention(64, 48, num_heads=4)
        >>> picture, text = layer(torch.randn(2, 36, 64), torch.randn(2, 10, 48))
        >>> picture.shape, text.shape
        (torch.Size([2, 36, 64]), torch.Size([2, 10, 48]))
    """

    @checked(num_heads=1)
    def __init__(
        self,
        dim_a: int,
        dim_b: int,
        num_heads: int,
        inner_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner_dim = min(dim_a, dim_b) if inner_dim is None else inner_dim
        head_dim = _divide("inner_dim", inner_dim, "num_heads", num_heads)
        more: dict[str, Any] = {"head_dim": head_dim, "bias": bias, "dropout": dropout, **factory}
        self.attention_a = CrossAttention(dim_a, num_heads, kv_dim=dim_b, **more)
        self.attention_b = CrossAttention(dim_b, num_heads, kv_dim=dim_a, **more)
        self.norm_a = nn.LayerNorm(dim_a, eps=layer_norm_eps, **factory)
        self.norm_b = nn.LayerNorm(dim_b, eps=layer_norm_eps, **factory)

    def forward(
        self, states_a: Tensor, states_b: Tensor, *, mask_a: Tensor | None = None, mask_b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams after attending over each other.

        Args:
            states_a: ``(batch, a, dim_a)``.
            states_b: ``(batch, b, dim_b)``.
            mask_a: bool ``(batch, a)``, True = may be attended by b.
            mask_b: bool ``(batch, b)``, True = may be attended by a.

        Returns:
            ``(batch, a, dim_a)`` and ``(batch, b, dim_b)``.
        """
        dim_a, dim_b, like = self.attention_a.embed_dim, self.attention_b.embed_dim, self.norm_a.weight
        _check_streams(states_a, states_b, dim_a, dim_b, mask_a, mask_b, like)
        branch_a = self.attention_a(states_a, states_b, key_mask=mask_b)
        branch_b = self.attention_b(states_b, states_a, key_mask=mask_a)
        return self.norm_a(states_a + branch_a), self.norm_b(states_b + branch_b)


class BidirectionalAttention(nn.Module):
    """The fusion block of GLIP and Grounding DINO (Liu et al., 2023): both directions from one matrix of scores.

    ``norm(a) + scale_a * out_a`` and ``norm(b) + scale_b * out_b``, where ``(out_a, out_b)`` is
    :func:`velm_kernels.bidirectional_attention` of the layer-normed and projected streams, projected back.

    Args:
        dim_a, dim_b: feature sizes of the two streams.
        inner_dim: total size of the heads.
        num_heads: attention heads.
        bias: whether the projections have biases.
        dropout: probability with which an attention weight is dropped in training.
        layer_scale: initial value of the learned factors ``scale_a (dim_a,)`` and ``scale_b (dim_b,)``.
        layer_norm_eps: added to the variance in both layer norms.
        device, dtype: of the parameters.

    Shape:
        states_a ``(batch, a, dim_a)`` and states_b ``(batch, b, dim_b)`` to a pair of the same shapes.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16), or a mask is not bool.
        ValueError: an argument is out of range, or ``num_heads`` does not divide ``inner_dim``; from forward: features,
            a shape or a device do not fit.

    Example:
        >>> layer = velm_kernels.BidirectionalAttention(64, 48, inner_dim=32, num_heads=4)
        >>> picture, text = layer(torch.randn(2, 36, 64), torch.randn(2, 10, 48))
        >>> picture.shape, text.shape
        (torch.Size([2, 36, 64]), torch.Size([2, 10, 48]))
    """

    @checked(num_heads=1)
    def __init__(
        self,
        dim_a: int,
        dim_b: int,
        inner_dim: int,
        num_heads: int,
        bias: bool = True,
        dropout: float = 0.0,
        layer_scale: float = 1e-4,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        _divide("inner_dim", inner_dim, "num_heads", num_heads)
        self.inner_dim, self.num_heads, self.dropout = inner_dim, num_heads, checks.probability("dropout", dropout)
        self.norm_a = nn.LayerNorm(dim_a, eps=layer_norm_eps, **factory)
        self.norm_b = nn.LayerNorm(dim_b, eps=layer_norm_eps, **factory)
        self.query_a = Linear(dim_a, inner_dim, bias=bias, **factory)
        self.query_b = Linear(dim_b, inner_dim, bias=bias, **factory)
        self.value_a = Linear(dim_a, inner_dim, bias=bias, **factory)
        self.value_b = Linear(dim_b, inner_dim, bias=bias, **factory)
        self.out_a = Linear(inner_dim, dim_a, bias=bias, **factory)
        self.out_b = Linear(inner_dim, dim_b, bias=bias, **factory)
        self.scale_a = nn.Parameter(torch.full((dim_a,), float(layer_scale), **factory))
        self.scale_b = nn.Parameter(torch.full((dim_b,), float(layer_scale), **factory))
        for name in ("query_a", "query_b", "value_a", "value_b", "out_a", "out_b"):
            _reset_projection(getattr(self, name))

    def forward(
        self, states_a: Tensor, states_b: Tensor, *, mask_a: Tensor | None = None, mask_b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams after fusion.

        Args:
            states_a: ``(batch, a, dim_a)``.
            states_b: ``(batch, b, dim_b)``.
            mask_a: bool ``(batch, a)``, True = may be attended by b.
            mask_b: bool ``(batch, b)``, True = may be attended by a.

        Returns:
            ``(batch, a, dim_a)`` and ``(batch, b, dim_b)``.
        """
        _check_streams(states_a, states_b, self.scale_a.shape[0], self.scale_b.shape[0], mask_a, mask_b, self.scale_a)
        checks.norm_dtype("states_a", states_a, self.norm_a)
        checks.norm_dtype("states_b", states_b, self.norm_b)
        normed_a, normed_b = self.norm_a(states_a), self.norm_b(states_b)
        out_a, out_b = bidirectional_attention(
            _split(self.query_a(normed_a), self.num_heads),
            _split(self.query_b(normed_b), self.num_heads),
            _split(self.value_a(normed_a), self.num_heads),
            _split(self.value_b(normed_b), self.num_heads),
            mask_a=mask_a,
            mask_b=mask_b,
            dropout_p=self.dropout if self.training else 0.0,
        )
        # Grounding DINO adds to the normed streams, not to the ones that came in.
        return (
            torch.addcmul(normed_a, self.scale_a, self.out_a(_join(out_a))),
            torch.addcmul(normed_b, self.scale_b, self.out_b(_join(out_b))),
        )

    def extra_repr(self) -> str:
        return f"inner_dim={self.inner_dim}, num_heads={self.num_heads}, dropout={self.dropout}"
