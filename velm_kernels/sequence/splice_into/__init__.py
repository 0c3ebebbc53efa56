"""Features of pictures among the embeddings of a text."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.backends import Arguments, register_composed
from velm_kernels.layout import as_matrix
from velm_kernels.sequence import places
from velm_kernels.sequence.splice_into.op import OPERATOR

# Elements of a result up to which torch's index_copy is the faster one, see velm_kernels.backends.small.
SMALL = 1 << 16


def splice_into(embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """Puts the rows of ``features``, in order, where ``mask`` is True, and the embeddings everywhere else: one pass in
    place of ``embeddings.masked_scatter(mask.unsqueeze(-1).expand_as(embeddings), features)``, as LLaVA (Liu et al.,
    2023) and its followers put pictures into a sequence.

    Args:
        embeddings: ``(batch, tokens, dim)``, or any leading dimensions, float32, bfloat16, float16, or float64
            (computed by the reference backend). Not read where the mask is True.
        features: ``(n, dim)``, or any leading dimensions, floating point; brought to the dtype of embeddings.
        mask: bool ``(batch, tokens)``, with n elements that are True.

    Returns:
        the shape and dtype of embeddings, contiguous.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above, or (on the CPU, or with VELM_CHECK=1) the mask has not as many
            elements that are True as there are features. On a GPU nothing waits for the count: tokens behind the last
            feature keep their embeddings, and features behind the last token are not used.

    The gradient of features is read from what comes in by index, that of embeddings is 0 where the mask is True.
    Backward keeps numbers of tokens alone.

    Example:
        >>> embeddings, features = torch.zeros(1, 4, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> velm_kernels.splice_into(embeddings, features, torch.tensor([[False, True, True, False]]))
        tensor([[[0., 0.],
                 [1., 2.],
                 [3., 4.],
                 [0., 0.]]])
    """
    small = plain(embeddings, features, mask)
    if small is not None:
        return small
    arguments = _canonical(embeddings, features, mask)
    out: Tensor = OPERATOR(arguments)
    return out.view(embeddings.shape)


def plain(embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if not isinstance(embeddings, Tensor) or embeddings.dim() < 2 or not embeddings.is_contiguous():
        return None
    place = places.small_places(embeddings, features, mask, embeddings.shape[:-1], SMALL)
    if place is None:
        return None
    dim = embeddings.shape[-1]
    return embeddings.view(-1, dim).index_copy(0, place, features.view(-1, dim)).view(embeddings.shape)


def _canonical(embeddings: Tensor, features: Tensor, mask: Tensor) -> Arguments:
    places.checked_rows("embeddings", embeddings)
    features = places.checked_features(features, embeddings.shape[-1], "embeddings", embeddings)
    mask = places.checked_mask(mask, "embeddings", embeddings)
    places.few_enough(places.tokens_of(embeddings), features.shape[0])
    index, place = places.place_features(mask, features.shape[0])
    return {"embeddings": as_matrix(embeddings), "features": features, "index": index, "place": place}


register_composed(splice_into, plain)
