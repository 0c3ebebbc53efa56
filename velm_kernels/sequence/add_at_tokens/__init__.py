"""Features of pictures added to the hidden states of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import register_composed
from velm_kernels.layout import as_matrix
from velm_kernels.sequence import places
from velm_kernels.sequence.add_at_tokens.op import OPERATOR, add_in_place

# Elements of a result up to which torch's index_add is the faster one, see velm_kernels.backends.small.
SMALL = 1 << 18


def add_at_tokens(hidden: Tensor, features: Tensor, mask: Tensor, *, inplace: bool = False) -> Tensor:
    """Adds the rows of ``features``, in order, where ``mask`` is True: DeepStack (Meng et al., 2024), for which
    Qwen3-VL has a clone and two boolean indexings behind each of its first layers.

    Args:
        hidden: ``(batch, tokens, dim)``, or any leading dimensions, float32, bfloat16, float16, or float64 (computed by
            the reference backend).
        features: ``(n, dim)``, or any leading dimensions, floating point; brought to the dtype of hidden.
        mask: bool ``(batch, tokens)``, with n elements that are True.
        inplace: write into ``hidden`` and return it, which touches no other row. Where a gradient of hidden or of
            features is recorded the result is a new tensor all the same: use what is returned.

    Returns:
        the shape and dtype of hidden; a new tensor is contiguous. Sums are computed in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above, or (on the CPU, or with VELM_CHECK=1) the mask has not as many
            elements that are True as there are features. On a GPU nothing waits for the count: to tokens behind the
            last feature nothing is added, and features behind the last token are not used.

    The gradient of hidden is what comes in; that of features is read from it by index. Backward keeps numbers of tokens
    alone.

    Example:
        >>> hidden, features = torch.ones(1, 3, 2), torch.tensor([[1.0, 2.0]])
        >>> velm_kernels.add_at_tokens(hidden, features, torch.tensor([[False, True, False]]))
        tensor([[[1., 1.],
                 [2., 3.],
                 [1., 1.]]])
    """
    small = plain(hidden, features, mask, inplace=inplace)
    if small is not None:
        return small
    places.checked_rows("hidden", hidden)
    features = places.checked_features(features, hidden.shape[-1], "hidden", hidden)
    mask = places.checked_mask(mask, "hidden", hidden)
    checks.flag("inplace", inplace)
    places.few_enough(places.tokens_of(hidden), features.shape[0])
    index, place = places.place_features(mask, features.shape[0])
    if inplace and not (torch.is_grad_enabled() and (hidden.requires_grad or features.requires_grad)):
        if not hidden.is_contiguous():
            return hidden.copy_(add_at_tokens(hidden, features, mask))
        add_in_place(hidden.view(-1, hidden.shape[-1]), features, index, place)
        return hidden
    out: Tensor = OPERATOR({"hidden": as_matrix(hidden), "features": features, "index": index, "place": place})
    return out.view(hidden.shape)


def plain(hidden: Tensor, features: Tensor, mask: Tensor, *, inplace: bool = False) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_contiguous():
        return None
    if inplace is not False and inplace is not True:
        return None
    place = places.small_places(hidden, features, mask, hidden.shape[:-1], SMALL)
    if place is None:
        return None
    dim = hidden.shape[-1]
    rows, features = hidden.view(-1, dim), features.view(-1, dim)
    if inplace and not (torch.is_grad_enabled() and (hidden.requires_grad or features.requires_grad)):
        rows.index_add_(0, place, features)
        return hidden
    return rows.index_add(0, place, features).view(hidden.shape)


register_composed(add_at_tokens, plain)
