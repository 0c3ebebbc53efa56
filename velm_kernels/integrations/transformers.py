"""`attn_implementation="velm"` for models of transformers that go through its attention interface."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .calls import merged_attention

NAME = "velm"

# Model packages whose every attention layer goes through the interface and was compared with eager attention here.
# Models with hand-written attention accept any registered name and never call it, so they must be refused by name.
SUPPORTED = ("bridgetower", "clip", "idefics2", "llama", "mistral", "mllama", "siglip")


def register() -> None:
    """Make `attn_implementation="velm"` available to the models of `SUPPORTED`.

    Use it as in `AutoModel.from_config(config, attn_implementation="velm")`, or later with
    `model.set_attn_implementation("velm")`; parts of a larger model take it as in
    `set_attn_implementation({"vision_config": "velm"})`. Attention weights are not returned (as with sdpa); `patch`
    is what keeps `output_attentions=True` working.

    The attention function comes with a mask function: transformers gives a registered name without one no mask at all.
    The mask is boolean and always there where a model is causal, so that no mask means that everything may be attended
    to, and a cross-attention layer is not taken for a causal one.

    Raises:
        ValueError: later, when the name is asked for by a model that is not in `SUPPORTED`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import PreTrainedModel

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    original = PreTrainedModel.get_correct_attn_implementation
    if getattr(original, "_velm_guard", False):
        return

    @functools.wraps(original)
    def guarded(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention == NAME:
            _refuse_unsupported(type(self))
        return original(self, requested_attention, *args, **kwargs)

    guarded._velm_guard = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = guarded


def attention_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Build the boolean mask (batch, 1, queries, keys), True = may be attended, or None where that is everything."""
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve one call of the interface; shapes as in `velm_kernels.cross_attention`.

    Returns:
        ((batch, queries, heads, head_dim), None).
    """
    _refuse_unsupported(type(module))
    for name in ("position_bias", "cache", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not know the argument {name!r}")
    added = mask = None
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        mask = attention_mask
    else:
        added = attention_mask
    # Only when the call itself says so: modules without the attribute would count as causal, cross-attention too.
    causal = attention_mask is None and is_causal is True and query.shape[2] > 1
    out = merged_attention(
        query,
        key,
        value,
        added=added,
        mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal,
        softcap=softcap,
    )
    return out.unflatten(-1, (query.shape[1], -1)), None


def _refuse_unsupported(cls: type) -> None:
    package = cls.__module__.split(".")
    if package[:2] != ["transformers", "models"] or package[2] not in SUPPORTED:
        raise ValueError(
            f"attn_implementation={NAME!r} is not available for {cls.__module__}.{cls.__qualname__}; it is for the "
            f"models {', '.join(SUPPORTED)}. velm_kernels.patch(model) serves models with hand-written attention."
        )
