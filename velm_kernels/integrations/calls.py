"""What the replaced forwards of several families share: attention, masks, projections."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import velm_kernels

from .plain import DROPOUTS, may_read, remembered


class AddedMask(NamedTuple):
    """What `cross_attention` needs in place of a mask that a model adds to its scores.

    Attributes:
        bias: 4-D, float; -inf where a key is hidden.
        hidden_rows: bool, (batch or 1, heads or 1, queries or 1, 1), True for rows in which every key is hidden and
            whose bias is 0 instead; None when there is none for certain.
    """

    bias: Tensor
    hidden_rows: Tensor | None


def added_mask(mask: Tensor, dtype: torch.dtype) -> AddedMask:
    """Translate a mask that a model adds to its scores.

    The models mark hidden keys with the smallest finite number of their dtype. Values up to half of that number hide a
    key, everything else is added as it is. A row in which every key is hidden attends to all of them evenly in the
    models, because the scores vanish beside that number; a zero query and a zero bias make `merged_attention` do so.

    The layers of one forward share the result where that is safe, see `plain.remembered`.

    Args:
        mask: additive, broadcastable to (batch, heads, queries, keys); an integer or boolean one is added too, as the
            models do.
        dtype: the dtype of the query.
    """
    return remembered(_translate, mask, dtype)


def _translate(mask: Tensor, dtype: torch.dtype) -> AddedMask:
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if not mask.is_floating_point():
        return AddedMask(mask.to(dtype), None)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if mask.dtype not in (dtype, torch.float32):
        mask = mask.to(torch.float64 if dtype is torch.float64 else torch.float32)
    bias = mask.masked_fill(hidden, -torch.inf)
    rows = hidden.all(-1, keepdim=True)
    if may_read(rows) and not bool(rows.any()):
        return AddedMask(bias, None)
    return AddedMask(bias.masked_fill(rows, 0.0), rows)


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    added: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Attention with the heads side by side again.

    Args:
        query, key, value: (batch, heads, length, head_dim), any strides.
        added: what the model would add to its scores, see `added_mask`.
        mask: bool, broadcastable to (batch, heads, queries, keys), True = may be attended; a row that may attend to
            nothing gives zeros.

    Returns:
        (batch, queries, heads * head_dim), without a copy.
    """
    bias = None
    if added is not None:
        bias, hidden_rows = added_mask(added, query.dtype)
        if hidden_rows is not None:
            query = query.masked_fill(hidden_rows, 0.0)
    out = velm_kernels.cross_attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return out.transpose(1, 2).flatten(2)


# Columns of a head that `cross_attention` takes.
WIDEST_HEAD = 512


def too_wide(head_dim: int) -> str | None:
    """Return why `cross_attention` cannot serve heads of so many columns, or None."""
    return f"head_dim {head_dim} is above {WIDEST_HEAD}" if head_dim > WIDEST_HEAD else None


def unsupported(head_dim: int, *masks: Any) -> str | None:
    """Return why `cross_attention` cannot serve a call with this head_dim and these masks, or None.

    Through rows in which every key is hidden the models pass a gradient to queries and keys, although such a row does
    not depend on them. It is reproduced by leaving the call to the original, where that can be known without waiting
    for a device; on a GPU and under a compiler these rows pass nothing to queries and keys.
    """
    if head_dim > WIDEST_HEAD:
        return too_wide(head_dim)
    for mask in masks:
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            return f"the mask is a {type(mask).__name__}"
        if mask.dim() > 4:
            return f"the mask has {mask.dim()} dimensions"
        checked = mask.is_floating_point() and torch.is_grad_enabled() and may_read(mask)
        if checked and added_mask(mask, mask.dtype).hidden_rows is not None:
            return "gradient through a row in which every key is masked"
    return None


def interface_reason(module: nn.Module, kwargs: dict[str, Any], *masks: Any) -> str | None:
    """Return why a call of a module that goes through transformers' attention interface must stay there, or None."""
    implementation = getattr(module.config, "_attn_implementation", None) or "eager"
    if weights_wanted(module, kwargs, returned=implementation == "eager"):
        return "output_attentions=True"
    if implementation not in ("eager", "sdpa"):
        return f"attn_implementation={implementation!r}"
    return unsupported(getattr(module, "head_dim", None) or module.attention_head_size, *masks)  # type: ignore[arg-type]


def interface_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout_p: float,
    scale: float,
    is_causal: bool | None,
) -> Tensor:
    """Attention with the meaning of the implementation that `module.config` names, "eager" or "sdpa".

    "eager" adds whatever mask there is and knows no causality of its own. "sdpa" reads a boolean mask as "may be
    attended", and without a mask it is causal when `is_causal` says so, which for None means `module.is_causal`.
    Shapes as in `merged_attention`.
    """
    if (getattr(module.config, "_attn_implementation", None) or "eager") == "eager":
        return merged_attention(query, key, value, added=attention_mask, dropout_p=dropout_p, scale=scale)
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and query.shape[2] > 1
        return merged_attention(query, key, value, dropout_p=dropout_p, scale=scale, is_causal=causal)
    if attention_mask.dtype is torch.bool:
        return merged_attention(query, key, value, mask=attention_mask, dropout_p=dropout_p, scale=scale)
    return merged_attention(query, key, value, added=attention_mask, dropout_p=dropout_p, scale=scale)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """View (..., length, heads * head_dim) as (..., heads, length, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def dropout_p(module: nn.Module, dropout: nn.Module | float) -> float:
    """Return the probability with which `module` would drop now; `dropout` is a number, or its submodule of one of
    `plain.DROPOUTS` (`velm_absorbs` of the replacement has seen to that)."""
    if isinstance(dropout, nn.Module):
        assert isinstance(dropout, DROPOUTS)
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return float(dropout) if module.training else 0.0


def weights_wanted(module: nn.Module, kwargs: dict[str, Any] | None = None, returned: bool = True) -> bool:
    """Say whether someone will read the attention weights that `module` returns.

    The caller asks (`output_attentions` in `kwargs`), transformers records them with a forward hook while an output
    collector is active, or another forward hook sees what the module returns.

    Args:
        returned: the original returns weights also when nobody asks for them.
    """
    if kwargs and kwargs.get("output_attentions"):
        return True
    if returned and torch_module._global_forward_hooks:
        return True
    if not module._forward_hooks:
        return False
    if returned and not all(map(_leaves_weights, module._forward_hooks.values())):
        return True
    output_capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    collected = output_capturing and output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def _leaves_weights(hook: Any) -> bool:
    """Say whether a forward hook is known not to look at attention weights: transformers' recorder, which is asked
    whether it records, and torch's wrappers for distributed training."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith(("transformers.utils.output_capturing", "torch.distributed."))
