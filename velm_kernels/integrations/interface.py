"""What replacements share for modules that call the attention interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import velm_kernels

from . import masks
from .calls import WIDEST_HEAD, added_mask, too_wide, weights_wanted
from .patching import is_replaced
from .plain import are_plain, has_listeners, may_read, under_autocast

# Implementations whose meaning the replacements reproduce. Others bring their own masks (lengths, block masks).
SERVED = ("eager", "sdpa", "velm")
# Arguments that change what an attention function computes, as far as these models let them through.
_CHANGING = ("cache", "is_causal", "position_bias", "s_aux", "sliding_window", "softcap")
_RMS_NORMS = frozenset(
    {
        ("transformers.models.mllama.modeling_mllama", "MllamaTextRMSNorm"),
        ("transformers.models.idefics.modeling_idefics", "IdeficsRMSNorm"),
    }
)


def why_original(
    module: nn.Module,
    kwargs: dict[str, Any],
    mask: Any,
    *,
    head_dim: int,
    batch: int,
    queries: int,
    binary: bool = False,
    norms: bool = False,
) -> str | None:
    """Return why this call of an attention module needs the original forward, or None; before anything is computed.

    Args:
        kwargs: what the module would pass on to the attention function.
        mask, batch, queries, binary: see `masks.translate`.
        norms: queries and keys are normed by the operator.
    """
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in SERVED:
        return f"attn_implementation={implementation!r}"
    if weights_wanted(module, kwargs, returned=implementation == "eager"):
        return "output_attentions=True"
    if head_dim > WIDEST_HEAD:
        return too_wide(head_dim)
    if implementation == "eager" and isinstance(mask, Tensor) and not mask.is_floating_point():
        return f"the mask is {mask.dtype}, which eager attention adds to the scores"
    for name in _CHANGING:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    reason = masks.why_not(mask)
    if reason is not None or mask is None or not norms or not torch.is_grad_enabled() or not may_read(mask):
        return reason
    # `_gradient_of_hidden_rows` would need the normed queries and keys.
    hidden_rows = masks.translate(mask, batch, queries, binary).hidden_rows
    return None if hidden_rows is None else "gradient through a row in which every key is masked"


def implied_causal(module: nn.Module, mask: Tensor | None, queries: int) -> bool:
    """Say whether a decoder's self-attention without a mask is causal: transformers leaves the mask out for sdpa."""
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    return mask is None and queries > 1 and implementation == "sdpa" and bool(module.is_causal)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    binary: bool = False,
    **norms: Any,
) -> Tensor:
    """Attention under a mask of the model, with the heads side by side again.

    Args:
        query, key, value: (batch, heads, length, head_dim); a batch of one learned query serves every sample.
        mask: as the model made it, see `masks.translate`, also for `binary`; `masks.why_not` has been asked.
        norms: `query_norm_weight`, `key_norm_weight`, `norm_eps`.

    Returns:
        (batch, queries, heads * head_dim), without a copy.
    """
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))
    arguments, hidden_rows = masks.translate(mask, batch, query.shape[2], binary, query.shape[1])
    if arguments is None:
        assert mask is not None
        bias, hidden_rows = added_mask(masks.four_dims(mask, query.shape[1]), query.dtype)
        arguments = {"bias": bias}
    first_order = None
    if hidden_rows is not None:
        if torch.is_grad_enabled() and mask is not None and may_read(mask):
            first_order = _gradient_of_hidden_rows(query, key, value, scale).masked_fill(~hidden_rows, 0.0)
        query = query.masked_fill(hidden_rows, 0.0)
    out = velm_kernels.cross_attention(
        query, key, value, scale=scale, dropout_p=dropout_p, is_causal=is_causal, **arguments, **norms
    )
    if first_order is not None:
        out = out + (first_order - first_order.detach())
    return out.transpose(1, 2).flatten(2)


def _gradient_of_hidden_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """First-order change of evenly spread attention with its scores, to be differentiated only.

    Where a mask hides every key, the scores vanish beside it in a model's forward, but its backward still passes a
    gradient through them: that of softmax at equal scores, ds = (dp - mean(dp)) / keys. It is linear in the scores, so
    keys and values contract to a matrix of head_dim squared first. Values get theirs from the forward's mean.
    """
    value = value.detach()
    contracted = key.transpose(2, 3) @ (value - value.mean(2, keepdim=True)) * (scale / value.shape[2])
    return query @ contracted.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def rms_norm(
    norm: nn.Module, x: Tensor, other: tuple[Tensor | None, float] = (None, 1e-6)
) -> tuple[Tensor, Tensor | None, float]:
    """Leave an RMS norm over head_dim to the kernel where it is nothing but that, else apply it.

    Args:
        norm: what the model calls on (batch, heads, length, head_dim).
        x: its input.
        other: weight and eps of the other norm of this attention; the operator knows one eps for both.

    Returns:
        (x, weight, eps) with the norm still to be done, or (norm(x), None, eps of the other norm).
    """
    bare = (type(norm).__module__, type(norm).__qualname__) in _RMS_NORMS and not has_listeners(norm)
    # Under autocast the original multiplies by the weight in float32, the operator would round it first.
    if bare and are_plain(norm.weight, x) and norm.weight.dtype == x.dtype and not under_autocast(x):
        eps = float(norm.variance_epsilon)  # type: ignore[arg-type]
        if other[0] is None or other[1] == eps:
            return x, norm.weight, eps  # type: ignore[return-value]
    return norm(x), None, other[1]


def tells(module: nn.Module, replacement: type[nn.Module], **known: Any) -> dict[str, Any]:
    """Return the keyword arguments `known` where `module` is one of `replacement`, and nobody else would see them."""
    return known if isinstance(module, replacement) and is_replaced(module) and not has_listeners(module) else {}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding with the two halves of head_dim as pairs (Su et al., 2021; Llama's layout).

    Args:
        x: (batch, heads, length, head_dim).
        cos, sin: (batch | 1, length, head_dim).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
