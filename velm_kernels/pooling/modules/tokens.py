"""Modules that make image tokens fewer: by merging, and by latents that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.attention.cross_attention import cross_attention
from velm_kernels.constructors import checked
from velm_kernels.linear import ACTIVATIONS, apply_linear
from velm_kernels.pooling.merge_tokens import MergedTokens, merge_tokens


class TokenMerge(nn.Module):
    """:func:`velm_kernels.merge_tokens` between the layers of a transformer, which keeps what was merged before.

    ToMe (Bolya et al., 2023) merges in every layer, between attention and feed-forward block, by the keys of the
    attention, and lets the attention weigh each token by its size (proportional attention, its eq. 1)::

        merge, merged = TokenMerge(r=8, protected=1), None
        for layer in layers:
            bias = None if merged is None else merge.attention_bias(merged)
            out, keys = layer.attention(x, bias=bias)      # cross_attention(query, key, value, bias=bias)
            merged = merge(x + out, keys.mean(1), merged)  # keys (batch, heads, tokens, head_dim)
            x = merged.tokens + layer.mlp(merged.tokens)
        pixels = unmerge_tokens(x, merged.indices)         # one row for each token of the first layer

    Args:
        r: how many tokens become fewer in each call; at most half of those that are not protected.
        ratio: the same as a fraction of the tokens of the call, greater than 0 and at most 0.5, rounded down. One of
            ``r`` and ``ratio`` is given.
        protected: how many leading tokens are left alone.

    Raises:
        TypeError, ValueError: not exactly one of ``r`` and ``ratio`` is given, or one is out of range.

    Shape:
        ``(..., tokens, dim)`` to a :class:`velm_kernels.MergedTokens` of ``(..., tokens - r, dim)``.

    Example:
        >>> merge = velm_kernels.TokenMerge(r=8, protected=1)
        >>> merged = merge(torch.randn(2, 50, 64), metric=torch.randn(2, 50, 16))
        >>> merged.tokens.shape
        torch.Size([2, 42, 64])
        >>> merge(merged.tokens, torch.randn(2, 42, 16), merged).tokens.shape  # the next layer
        torch.Size([2, 34, 64])
    """

    @checked()
    def __init__(self, r: int | None = None, ratio: float | None = None, protected: int = 0) -> None:
        super().__init__()
        if (r is None) == (ratio is None):
            raise ValueError(f"r: expected one of r and ratio, given {r} and {ratio}")
        if ratio is not None and not 0 < ratio <= 0.5:
            raise ValueError(f"ratio: expected a number greater than 0 and at most 0.5, given {ratio}")
        self.r, self.ratio, self.protected = r, ratio, protected

    def forward(self, x: Tensor, metric: Tensor | None = None, previous: MergedTokens | None = None) -> MergedTokens:
        """Merges the most similar tokens.

        Args:
            x: ``(..., tokens, dim)``.
            metric: ``(..., tokens, metric_dim)``, by default ``x``.
            previous: what the call before this one returned, whose ``tokens`` have become ``x``: its sizes go on, and
                the indices returned are those of the tokens that the first call got.
        """
        if checks.tensor("x", x).dim() < 2:
            raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
        if previous is not None and not isinstance(previous, MergedTokens):
            raise TypeError(f"previous: expected MergedTokens or None, given {checks.describe(previous)}")
        tokens = x.shape[-2]
        wanted = self.r if self.r is not None else int(self.ratio * tokens)  # type: ignore[operator]
        r = min(wanted, max(tokens - self.protected, 0) // 2)
        size = None if previous is None else previous.size
        merged = merge_tokens(x, x if metric is None else metric, r, size, min(self.protected, tokens))
        if previous is None:
            return merged
        return merged._replace(indices=merged.indices.gather(-1, previous.indices))

    @staticmethod
    def attention_bias(merged: MergedTokens) -> Tensor:
        """The logarithm of the sizes, ``(..., 1, 1, tokens)``: as ``bias`` of :func:`velm_kernels.cross_attention` each
        token counts as often as it has been merged."""
        return merged.size.log()[..., None, None, :]

    def extra_repr(self) -> str:
        given = f"r={self.r}" if self.ratio is None else f"ratio={self.ratio}"
        return f"{given}, protected={self.protected}"


class _PerceiverAttention(nn.Module):
    """Latents attend over themselves and the tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: bool, **factory: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.context_layer_norm = nn.LayerNorm(dim, **factory)
        self.latents_layer_norm = nn.LayerNorm(dim, **factory)
        if qk_norm:
            self.q_layer_norm = nn.LayerNorm(head_dim, **factory)
            self.k_layer_norm = nn.LayerNorm(head_dim, **factory)
        self.qk_norm = qk_norm
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(dim, heads * head_dim, bias=False, **factory) for _ in range(3)
        )
        self.output_proj = nn.Linear(heads * head_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor, latents: Tensor, **visible: Any) -> Tensor:
        of_latents = self.latents_layer_norm(latents)
        # The latents in front: how many keys count is then one number.
        states = torch.cat([of_latents, self.context_layer_norm(x)], 1)
        query, key, value = (
            apply_linear(projection, rows).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for rows, projection in ((of_latents, self.q_proj), (states, self.k_proj), (states, self.v_proj))
        )
        if self.qk_norm:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        out = cross_attention(query, key, value, **visible)
        return apply_linear(self.output_proj, out.transpose(1, 2).flatten(2), residual=latents)


class _PerceiverMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, activation: str, **factory: Any) -> None:
        super().__init__()
        self.activation = activation
        self.ln = nn.LayerNorm(dim, **factory)
        self.fc = nn.Linear(dim, hidden_dim, bias=False, **factory)
        self.c_proj = nn.Linear(hidden_dim, dim, bias=False, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = apply_linear(self.fc, self.ln(latents), self.activation)
        return apply_linear(self.c_proj, hidden, residual=latents)


class PerceiverResampler(nn.Module):
    """Any number of tokens to ``n_latents``: learned latents attend, block by block, over the tokens and themselves
    (the Perceiver Resampler of Flamingo, Alayrac et al., 2022, section 3.1.1).

    state_dict and result are those of ``IdeficsPerceiverResampler`` of transformers, with the lengths and the mask that
    it lacks. The state_dict holds ``latents`` ``(n_latents, dim)``; for block i of the attention
    ``blocks.i.0.`` with ``context_layer_norm``, ``latents_layer_norm`` (and, with ``qk_norm``, ``q_layer_norm`` and
    ``k_layer_norm``), ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``, of the feed-forward ``blocks.i.1.`` with
    ``ln``, ``fc``, ``c_proj``; and ``layer_norm``. No projection has a bias. OpenFlamingo's resampler, after its time
    embeddings, is the same with ``activation="gelu"`` and other names: ``layers.i.0.`` with ``norm_media``,
    ``norm_latents``, ``to_q``, ``to_kv`` (the weight of the keys, then that of the values) and ``to_out``;
    ``layers.i.1.`` with ``0``, ``1`` and ``3``; and ``norm``.

    Args:
        dim: features of the tokens and of the latents.
        depth: number of blocks.
        heads, head_dim: of the attention; head_dim at most 512.
        n_latents: number of latents.
        hidden_dim: features inside the feed-forward blocks, by default ``4 * dim``.
        qk_norm: whether queries and keys are normalised (LayerNorm over head_dim).
        activation: of the feed-forward blocks, as in :class:`velm_kernels.Linear`.
        device, dtype: of the parameters.

    Shape:
        ``(batch, tokens, dim)`` to ``(batch, n_latents, dim)``. A row without tokens has its latents to attend to.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have. Tokens in 16 bits also go with
    float32 parameters.

    Raises:
        TypeError: an argument has a wrong type; from forward: ``x`` is not a floating-point tensor of the parameters'
            dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or ``mask`` is not bool.
        ValueError: an argument is out of range, or ``activation`` is unknown; from forward: a shape, a device or (on
            the CPU, or with VELM_CHECK=1) a length does not fit.

    Example:
        >>> resampler = velm_kernels.PerceiverResampler(64, depth=2, heads=4, head_dim=16, n_latents=8)
        >>> resampler(torch.randn(2, 50, 64), lengths=torch.tensor([50, 20])).shape
        torch.Size([2, 8, 64])
    """

    @checked(heads=1, head_dim=1)
    def __init__(
        self,
        dim: int,
        depth: int = 6,
        heads: int = 16,
        head_dim: int = 96,
        n_latents: int = 64,
        hidden_dim: int | None = None,
        qk_norm: bool = False,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS[1:])
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.randn(n_latents, dim, **factory))
        hidden = 4 * dim if hidden_dim is None else hidden_dim
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    _PerceiverAttention(dim, heads, head_dim, qk_norm, **factory),
                    _PerceiverMLP(dim, hidden, activation, **factory),
                ]
            )
            for _ in range(depth)
        )
        self.layer_norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``(batch, tokens, dim)``.
            lengths: ``(batch,)`` integers: the number of leading tokens that count.
            mask: ``(batch, tokens)`` bool; tokens where it is False do not count. What does not count may be NaN.
        """
        checks.features("x", x, "(batch, tokens, dim)", self.latents.shape[1], self.latents, 3)
        checks.norm_dtype("x", x, self.layer_norm)
        if lengths is not None:
            lengths = checks.integers("lengths", lengths, "(batch,)", x.shape[:1], "x", x)
            checks.values_between("lengths", lengths, 0, x.shape[1])
        if mask is not None:
            mask = checks.mask("mask", mask, "(batch, tokens)", x.shape[:2], "x", x)
        latents = self.latents.expand(x.shape[0], *self.latents.shape)
        count = self.latents.shape[0]
        if lengths is not None or mask is not None:
            live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            if lengths is not None:
                live = live & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
            # The gradients of the projections would hold 0 * NaN.
            x = torch.where(live[..., None], x, 0.0)
        visible = {
            "key_lengths": None if lengths is None else lengths + count,
            "key_mask": None if mask is None else torch.nn.functional.pad(mask, (count, 0), value=True),
        }
        for block in self.blocks:
            attention, feed_forward = block.children()
            latents = feed_forward(attention(x, latents, **visible))
        out: Tensor = self.layer_norm(latents)
        return out
