"""The embeddings of a text with features of pictures among them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, register_composed
from velm_kernels.backends.small import PLAIN
from velm_kernels.layout import unit_last_stride
from velm_kernels.sequence import places
from velm_kernels.sequence.splice_tokens.op import OPERATOR

# Elements of a result up to which torch's index_copy is the faster one, see velm_kernels.backends.small.
SMALL = 1 << 16


def splice_tokens(
    token_ids: Tensor,
    embedding_weight: Tensor,
    features: Tensor,
    image_token_id: int | None = None,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """Looks up the embeddings of a text and puts the rows of ``features`` among them, in one pass: what an
    ``nn.Embedding`` followed by :func:`splice_into` gives, without the embeddings of picture tokens.

    Args:
        token_ids: ``(batch, tokens)``, or any leading dimensions, integers.
        embedding_weight: ``(vocabulary, dim)``, float32, bfloat16, float16, or float64 (computed by the reference
            backend).
        features: ``(n, dim)``, or any leading dimensions, floating point; brought to the dtype of embedding_weight.
        image_token_id: tokens with this id take a row of features each, in order. It need not be in the vocabulary.
        positions: in its place, ``(n,)`` integers, the number of the token (counted through all of token_ids) that each
            row of features is put at, each once; the ids there are not looked at.

    Returns:
        ``(batch, tokens, dim)`` in the dtype of embedding_weight, contiguous.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above, both or neither of image_token_id and positions is given, or (on
            the CPU, or with VELM_CHECK=1) there are not as many picture tokens as features, a position is no token or
            given twice, or the id of a text token is not in the vocabulary. On a GPU nothing waits for that: tokens
            behind the last feature have the embedding of their id, ids are clamped to the vocabulary.

    The gradient of features is read from what comes in by index; that of embedding_weight is the sum over text tokens
    alone, in float32 and in their order. Backward keeps ids and numbers of tokens alone.

    Example:
        >>> token_ids, weight = torch.tensor([[1, 99, 99, 0]]), torch.tensor([[0.5], [0.25]])
        >>> velm_kernels.splice_tokens(token_ids, weight, torch.tensor([[10.0], [20.0]]), image_token_id=99).flatten()
        tensor([ 0.2500, 10.0000, 20.0000,  0.5000])
    """
    small = plain(token_ids, embedding_weight, features, image_token_id, positions=positions)
    if small is not None:
        return small
    arguments = _canonical(token_ids, embedding_weight, features, image_token_id, positions)
    out: Tensor = OPERATOR(arguments)
    return out.view(*token_ids.shape, embedding_weight.shape[1])


def plain(
    token_ids: Tensor,
    embedding_weight: Tensor,
    features: Tensor,
    image_token_id: int | None = None,
    *,
    positions: Tensor | None = None,
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if image_token_id.__class__ is not int or positions is not None:
        return None
    if not -(2**63) <= image_token_id < 2**63:
        return None
    if token_ids.__class__ not in PLAIN or token_ids.dtype is not torch.int64 or not token_ids.is_cpu:
        return None
    if token_ids.dim() == 0 or embedding_weight.__class__ not in PLAIN or embedding_weight.dim() != 2:
        return None
    mask = token_ids == image_token_id
    place = places.small_places(embedding_weight, features, mask, token_ids.shape, SMALL)
    if place is None or not embedding_weight.shape[0]:
        return None
    try:
        # The gradient of what is put in the place of the first embedding is 0.
        embeddings = F.embedding(token_ids.masked_fill(mask, 0), embedding_weight)
    except IndexError:
        return None
    dim = embedding_weight.shape[1]
    return embeddings.view(-1, dim).index_copy(0, place, features.view(-1, dim)).view(*token_ids.shape, dim)


def _canonical(
    token_ids: Tensor,
    embedding_weight: Tensor,
    features: Tensor,
    image_token_id: int | None,
    positions: Tensor | None,
) -> Arguments:
    checks.dtype_in("token_ids", checks.tensor("token_ids", token_ids), checks.INTEGER_DTYPES)
    if token_ids.dim() == 0:
        raise ValueError("token_ids: expected (..., tokens), given ()")
    checks.dtype_in(
        "embedding_weight",
        checks.tensor("embedding_weight", embedding_weight, dims=2, layout="(vocabulary, dim)"),
        checks.FLOAT_DTYPES,
    )
    checks.same_device("token_ids", token_ids, "embedding_weight", embedding_weight)
    features = places.checked_features(features, embedding_weight.shape[1], "embedding_weight", embedding_weight)
    count = features.shape[0]
    places.few_enough(token_ids.numel(), count)
    if image_token_id is not None:
        checks.integer("image_token_id", image_token_id, -(2**63), 2**63 - 1)
        if positions is not None:
            raise ValueError(f"positions: expected None beside image_token_id, given {checks.describe(positions)}")
        index, place = places.place_features(token_ids == image_token_id, count)
    elif positions is None:
        raise ValueError("image_token_id: expected an integer, or positions in its place, given None")
    else:
        checks.dtype_in("positions", checks.tensor("positions", positions), checks.INTEGER_DTYPES)
        checks.shape("positions", positions, "one for each row of features", (count,))
        checks.same_device("positions", positions, "features", features)
        index, place = places.place_features_at(positions.long(), token_ids.numel())
    return {
        "token_ids": checks.as_int32(token_ids.reshape(-1)),
        "weight": unit_last_stride(embedding_weight),
        "features": features,
        "index": index,
        "place": place,
    }


register_composed(splice_tokens, plain)
