"""The operators bilinear_attention and bilinear_attention_pool, over pairs of rows of v and rows of q."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.fusion.bilinear_attention import reference
from velm_kernels.operator import Operator

MASKS = "Tensor? v_lengths, Tensor? q_lengths, Tensor? v_mask, Tensor? q_mask"
MASK_NAMES = ("v_lengths", "q_lengths", "v_mask", "q_mask")


def check_values(arguments: Arguments) -> None:
    for name in ("v", "q"):
        lengths = arguments[f"{name}_lengths"]
        if lengths is not None:
            checks.values_between(f"{name}_lengths", lengths, 0, arguments[name].shape[1])


def _live(
    v: Tensor,
    q: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.live_rows(v, v_lengths, v_mask), reference.live_rows(q, q_lengths, q_mask)


def meaning(
    v: Tensor, q: Tensor, h: Tensor, bias: Tensor | None, *masks_and_return_logits: Any
) -> tuple[Tensor, Tensor | None]:
    *masks, return_logits = masks_and_return_logits
    maps, logits = reference.bilinear_attention(v, q, h, bias, *_live(v, q, *masks))
    return maps, logits if return_logits else None


def gradients(a: Any, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Those of the meaning, by the maps that forward computed: backward is not given the bias, which is in them."""

    def near(v: Tensor, q: Tensor, h: Tensor, bias: Tensor | None, *masks_and_return_logits: Any) -> Any:
        *masks, _ = masks_and_return_logits
        v_live, q_live = _live(v, q, *masks)
        _, products = reference.bilinear_attention(v, q, h, None, v_live, q_live)
        pairs = v_live[:, None, :, None] & q_live[:, None, None]
        scores = torch.where(pairs, products, 0.0)
        # What scores that differ a little add to a softmax that is these maps.
        maps = a.maps * (scores - (a.maps * scores).sum((-2, -1), keepdim=True))
        logits = scores if bias is None else scores + bias[:, None, None]
        return torch.where(pairs, maps, 0.0), torch.where(pairs, logits, -torch.inf)

    return ATTENTION.differentiated(a, wanted, near)


def pool_meaning(v: Tensor, q: Tensor, attention: Tensor, *masks: Tensor | None) -> Tensor:
    return reference.bilinear_attention_pool(v, q, attention, *_live(v, q, *masks))


def _empty_pairs(a: Any) -> Tensor:
    pairs: Tensor = a.v.new_empty((a.v.shape[0], a.h.shape[0], a.v.shape[1], a.q.shape[1]))
    return pairs


def _product(v: Any, q: Any, glimpses: int) -> int:
    """The operations of one product of all regions and all words for every glimpse, from shapes."""
    return int(2 * v[0] * v[1] * v[2] * q[1] * glimpses)


def _wanted_products(a: Any) -> int:
    of_v, of_q, of_h = (bool(a.wanted >> bit & 1) for bit in range(3))
    return of_v + (of_q or of_h)


# v: (batch, regions, k), q: (batch, words, k), last stride 1, other strides arbitrary; h: (glimpses, k), bias:
# (glimpses,), maps, logits, attention and their gradients (batch, glimpses, regions, words), out (batch, glimpses, k),
# all contiguous and of one dtype. lengths: (batch,) int32, masks: bool of the first two dimensions of v or q,
# contiguous; kernels clamp lengths. Gradients contiguous.
ATTENTION = Operator(
    "bilinear_attention",
    f"Tensor v, Tensor q, Tensor h, Tensor? bias, {MASKS}, bool return_logits",
    shapes=lambda a: (_empty_pairs(a), _empty_pairs(a) if a.return_logits else None),
    reference=meaning,
    results=("maps", "logits"),
    may_be_absent=("logits",),
    differentiable=("v", "q", "h", "bias"),
    may_lack=("maps", "logits"),
    saves=("v", "q", "h", *MASK_NAMES, "maps"),
    gradients=gradients,
    gradient_shapes={"bias": lambda a: a.h.new_empty(a.h.shape[:1])},
    triton="fusion.bilinear_attention.triton",
    check=check_values,
    flops=lambda a: _product(a.v, a.q, a.h[0]),
    backward_flops=lambda a: _product(a.v, a.q, a.h[0]) * _wanted_products(a),
)
POOL = Operator(
    "bilinear_attention_pool",
    f"Tensor v, Tensor q, Tensor attention, {MASKS}",
    shapes=lambda a: a.v.new_empty((a.v.shape[0], a.attention.shape[1], a.v.shape[2])),
    reference=pool_meaning,
    differentiable=("v", "q", "attention"),
    saves=("v", "q", "attention", *MASK_NAMES),
    triton="fusion.bilinear_attention.triton",
    check=check_values,
    flops=lambda a: _product(a.v, a.q, a.attention[1]),
    backward_flops=lambda a: _product(a.v, a.q, a.attention[1]) * int(a.wanted).bit_count(),
)
