"""Modules built on the pooling operators; those known from other packages load their state_dict."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.attention.cross_attention import cross_attention
from velm_kernels.constructors import checked
from velm_kernels.linear import MLP, apply_linear, linear
from velm_kernels.listeners import is_bare
from velm_kernels.pooling.attention_pool import attention_pool
from velm_kernels.pooling.pool import checked_mode, masked_pool, segment_pool
from velm_kernels.pooling.tokens import live_tokens, padded


class MaskedPool(nn.Module):
    """:func:`velm_kernels.masked_pool` as a module without parameters.

    Args:
        mode, p, channels_first: as there.

    Shape:
        ``(..., tokens, dim)`` to ``(..., dim)``, or, with ``channels_first``, ``(batch, dim, *spatial)`` to
        ``(batch, dim)``.

    Raises:
        TypeError: an argument has a wrong type; from forward: as :func:`velm_kernels.masked_pool`.
        ValueError: ``mode`` is unknown or ``p`` out of range; from forward: as :func:`velm_kernels.masked_pool`.

    Example:
        >>> pool = velm_kernels.MaskedPool("max")
        >>> pool(torch.randn(3, 50, 64), lengths=torch.tensor([50, 20, 0])).shape
        torch.Size([3, 64])
    """

    @checked()
    def __init__(self, mode: str = "mean", p: float = 3.0, channels_first: bool = False) -> None:
        super().__init__()
        checked_mode(mode, p)
        self.mode, self.p, self.channels_first = mode, p, channels_first

    def forward(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return masked_pool(x, lengths, mask, self.mode, self.p, channels_first=self.channels_first)

    def extra_repr(self) -> str:
        return f"{self.mode!r}, p={self.p}, channels_first={self.channels_first}"


class SegmentPool(nn.Module):
    """:func:`velm_kernels.segment_pool` as a module without parameters.

    Args:
        mode, p: as there.

    Shape:
        ``(tokens, dim)`` and ``(segments + 1,)`` to ``(segments, dim)``.

    Raises:
        TypeError: an argument has a wrong type; from forward: as :func:`velm_kernels.segment_pool`.
        ValueError: ``mode`` is unknown or ``p`` out of range; from forward: as :func:`velm_kernels.segment_pool`.

    Example:
        >>> pool = velm_kernels.SegmentPool("mean")
        >>> pool(torch.randn(70, 64), torch.tensor([0, 50, 70])).shape
        torch.Size([2, 64])
    """

    @checked()
    def __init__(self, mode: str = "mean", p: float = 3.0) -> None:
        super().__init__()
        checked_mode(mode, p)
        self.mode, self.p = mode, p

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return segment_pool(x, cu_seqlens, self.mode, self.p)

    def extra_repr(self) -> str:
        return f"{self.mode!r}, p={self.p}"


def check_tokens(x: Tensor, cu_seqlens: Tensor | None, dim: int, like: Tensor) -> None:
    if cu_seqlens is None:
        checks.features("x", x, "(batch, tokens, dim)", dim, like, 3)
    else:
        checks.tensor("cu_seqlens", cu_seqlens)
        checks.features("x", x, "(tokens, dim)", dim, like, 2)


def multihead_pool(
    attention: nn.MultiheadAttention, query: Tensor, x: Tensor, *, even: Tensor | None = None, **tokens: Any
) -> Tensor:
    """What ``attention(query, x, x)`` computes, by :func:`velm_kernels.attention_pool`.

    query: ``(queries, d)`` for all rows or ``(batch, queries, d)``; even: bool, ``(batch, 1, 1)``, True for rows whose
    tokens all have the same weight; tokens: lengths, mask (True where a token counts), cu_seqlens as there. Without
    dropout of weights. Where somebody listens to the module, or another one stands in its place, it is called.
    """
    check_tokens(x, tokens.get("cu_seqlens"), attention.kdim, query)
    if even is None and not is_bare(attention, nn.MultiheadAttention):
        return _called(attention, query, x, **tokens)
    if attention.in_proj_weight is not None:
        query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    else:
        query_weight, key_weight, value_weight = (
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        )
    biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    query = linear(query, query_weight, biases[0])
    if even is not None:
        query = query.expand(even.shape[0], *query.shape[-2:]).masked_fill(even, 0.0)
    out = attention_pool(x, query, key_weight, value_weight, biases[1], biases[2], heads=attention.num_heads, **tokens)
    return linear(out, attention.out_proj.weight, attention.out_proj.bias)


def _called(
    attention: nn.MultiheadAttention,
    query: Tensor,
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`multihead_pool` by the module itself, which knows padding but no row without tokens."""
    if cu_seqlens is None:
        live = live_tokens(x.shape[0], x.shape[1], lengths, mask, x.device)
    else:
        x, source = padded(x, cu_seqlens)
        live = source >= 0
    some = live.any(1)
    x = torch.where(live[..., None], x, 0.0)
    query = query.expand(len(x), *query.shape[-2:])
    out = attention(query, x, x, key_padding_mask=~live & some[:, None], need_weights=False)[0]
    bias = attention.out_proj.bias
    return torch.where(some[:, None, None], out, 0.0 if bias is None else bias.to(out.dtype))


def _check_divides(name: str, heads: int, dim_name: str, dim: int) -> None:
    if dim % heads:
        raise ValueError(f"{name}: expected a divisor of {dim_name} = {dim}, given {heads}")


class AttentionPool(nn.Module):
    """Learned queries attend over the tokens: the pooling by multi-head attention of the Set Transformer (Lee et al.,
    2019, section 3.2) without its residual block.

    Args:
        dim: features of the tokens and of the result.
        heads: number of heads.
        queries: number of learned queries.
        bias: whether the projections have biases.
        device, dtype: of the parameters.

    Shape:
        ``(batch, tokens, dim)``, or ``(tokens, dim)`` with ``cu_seqlens``, to ``(batch, queries, dim)``. A row without
        tokens gives the bias of the output projection.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: ``x`` is not a floating-point tensor of the parameters'
            dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or ``mask`` is not bool.
        ValueError: an argument is out of range, or ``heads`` does not divide ``dim``; from forward: a shape, a device
            or (on the CPU, or with VELM_CHECK=1) a length does not fit.

    Example:
        >>> pool = velm_kernels.AttentionPool(64, heads=4, queries=2)
        >>> pool(torch.randn(3, 50, 64), lengths=torch.tensor([50, 20, 0])).shape
        torch.Size([3, 2, 64])
    """

    @checked(heads=1)
    def __init__(
        self,
        dim: int,
        heads: int = 8,
        queries: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_divides("heads", heads, "dim", dim)
        self.query = nn.Parameter(torch.empty(queries, dim, device=device, dtype=dtype))
        nn.init.normal_(self.query, std=dim**-0.5)
        self.attention = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return multihead_pool(self.attention, self.query, x, lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)


class AttentionPool2d(nn.Module):
    """The head of CLIP's residual networks (Radford et al., 2021; ``AttentionPool2d`` of the packages clip and
    open_clip, whose arguments and state_dict these are): the mean of the pixels attends over them and itself.

    Args:
        spacial_dim: height and width of the map.
        embed_dim: channels of the map.
        num_heads: number of heads.
        output_dim: features of the result, by default ``embed_dim``.

    Shape:
        ``(batch, embed_dim, spacial_dim, spacial_dim)`` to ``(batch, output_dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: ``x`` is not a floating-point tensor of the parameters'
            dtype (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or ``num_heads`` does not divide ``embed_dim``; from forward: the map
            has other channels or another number of pixels.

    Example:
        >>> pool = velm_kernels.AttentionPool2d(7, embed_dim=64, num_heads=4, output_dim=32)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 32])
    """

    @checked(spacial_dim=1, num_heads=1, embed_dim=1)
    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None) -> None:
        super().__init__()
        _check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        positions, channels = self.positional_embedding.shape
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
        checks.same_device("x", x, "the parameters", self.positional_embedding)
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] != positions - 1:
            raise ValueError(
                f"x: expected (batch, {channels}, height, width) with height * width = {positions - 1}, "
                f"given {tuple(x.shape)}"
            )
        mean = masked_pool(x, channels_first=True)
        x = torch.cat([mean[:, None], x.flatten(2).transpose(1, 2)], 1) + self.positional_embedding.to(x.dtype)
        query, keys, values = apply_linear(self.q_proj, x[:, :1]), self.k_proj, self.v_proj
        if is_bare(keys, nn.Linear) and is_bare(values, nn.Linear):
            out = attention_pool(x, query, keys.weight, values.weight, keys.bias, values.bias, heads=self.num_heads)
        else:
            by_head = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, keys(x), values(x))]
            out = cross_attention(*by_head).transpose(1, 2).flatten(2)
        return apply_linear(self.c_proj, out[:, 0])


class ProbePool(nn.Module):
    """The pooling head of SigLIP (Zhai et al., 2023) and SigLIP 2: a learned probe attends over the tokens, then a
    feed-forward block with a residual. The state_dict is that of transformers' ``SiglipMultiheadAttentionPoolingHead``.

    Args:
        dim: features of the tokens and of the result.
        heads: number of heads.
        hidden_dim: features inside the feed-forward block.
        activation: of the feed-forward block, as in :class:`velm_kernels.Linear`.
        eps: of the layer norm.

    Shape:
        ``(batch, tokens, dim)``, or ``(tokens, dim)`` with ``cu_seqlens``, to ``(batch, dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: ``x`` is not a floating-point tensor of the parameters'
            dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or ``mask`` is not bool.
        ValueError: an argument is out of range, ``heads`` does not divide ``dim``, or ``activation`` is unknown; from
            forward: a shape, a device or (on the CPU, or with VELM_CHECK=1) a length does not fit.

    Example:
        >>> pool = velm_kernels.ProbePool(64, heads=4, hidden_dim=128)
        >>> pool(torch.randn(2, 49, 64)).shape
        torch.Size([2, 64])
    """

    @checked(heads=1)
    def __init__(self, dim: int, heads: int, hidden_dim: int, activation: str = "gelu_tanh", eps: float = 1e-6) -> None:
        super().__init__()
        _check_divides("heads", heads, "dim", dim)
        # Refuses an activation that there is not.
        MLP(1, 1, activation)
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, hidden_dim)
        self.mlp.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        probe = self.probe.flatten(0, 1)
        out = multihead_pool(self.attention, probe, x, lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)[:, 0]
        hidden = apply_linear(cast(nn.Module, self.mlp.fc1), self.layernorm(out), self.activation)
        return apply_linear(cast(nn.Module, self.mlp.fc2), hidden, residual=out)


class AttentionalPooler(nn.Module):
    """open_clip's ``AttentionalPooler`` (the poolers of CoCa; Yu et al., 2022, section 3.2), with the mask it lacks.
    Arguments and state_dict are the same.

    Args:
        d_model: features of the result.
        context_dim: features of the tokens.
        n_head: number of heads.
        n_queries: number of learned queries.
        norm_layer: makes the layer norms, of ``d_model`` and of ``context_dim``.

    Shape:
        ``(batch, tokens, context_dim)``, or ``(tokens, context_dim)`` with ``cu_seqlens``, to
        ``(batch, n_queries, d_model)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: ``x`` is not a floating-point tensor of the parameters'
            dtype (under autocast, of float32, bfloat16 or float16), lengths are not integers, or ``mask`` is not bool.
        ValueError: an argument is out of range, or ``n_head`` does not divide ``d_model``; from forward: a shape, a
            device or (on the CPU, or with VELM_CHECK=1) a length does not fit.

    Example:
        >>> pool = velm_kernels.AttentionalPooler(64, context_dim=96, n_head=4, n_queries=16)
        >>> pool(torch.randn(2, 50, 96)).shape
        torch.Size([2, 16, 64])
    """

    @checked(n_head=1)
    def __init__(
        self, d_model: int, context_dim: int, n_head: int = 8, n_queries: int = 256, norm_layer: Any = nn.LayerNorm
    ) -> None:
        super().__init__()
        _check_divides("n_head", n_head, "d_model", d_model)
        if not callable(norm_layer):
            raise TypeError(f"norm_layer: expected what makes a layer norm, given {checks.describe(norm_layer)}")
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = nn.MultiheadAttention(d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = norm_layer(d_model)
        self.ln_k = norm_layer(context_dim)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        check_tokens(x, cu_seqlens, self.attn.kdim, self.query)
        checks.norm_dtype("x", x, self.ln_k)
        query = self.ln_q(self.query)
        return multihead_pool(self.attn, query, self.ln_k(x), lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)
