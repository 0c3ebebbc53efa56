"""Which token takes which feature: what the operators that put features at tokens share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import derivatives
from velm_kernels.backends.library import LIBRARY
from velm_kernels.backends.small import ANY, PLAIN, may_read, takes_torch
from velm_kernels.layout import as_matrix, product
from velm_kernels.processors import NEVER

# mask: bool, of any shape. For each of its elements in order, the number of the feature that it takes, and for each
# feature the number of the token that takes it, int32, -1 for none. On the CPU, and under VELM_CHECK=1, an error where
# there are not as many features as there are elements that are True; else tokens behind the last feature take none.
LIBRARY.define("place_features(Tensor mask, SymInt features) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
# positions: int64 numbers of tokens, one for each feature; the same of these.
LIBRARY.define(
    "place_features_at(Tensor positions, SymInt tokens) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)


def _place_features(mask: Tensor, features: int) -> tuple[Tensor, Tensor]:
    flat = mask.reshape(-1)
    index = torch.full(flat.shape, -1, dtype=torch.int32, device=mask.device)
    numbers = torch.arange(features, dtype=torch.int32, device=mask.device)
    if checks.reads_values(mask):
        place = flat.nonzero().view(-1)
        if place.shape[0] != features:
            raise ValueError(
                f"features: expected {place.shape[0]} rows, one for each token that takes a feature, given {features}"
            )
        return index.scatter_(0, place, numbers), place.int()
    rank = flat.cumsum(0) - 1
    taken = flat & (rank < features)
    # One row more, for what is written nowhere.
    place = torch.full((features + 1,), -1, dtype=torch.int32, device=mask.device)
    token = torch.arange(flat.shape[0], dtype=torch.int32, device=mask.device)
    place.scatter_(0, torch.where(taken, rank, features), token)
    return torch.where(taken, rank, -1).int(), place[:features].clone()


def _place_features_at(positions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    checks.values_between("positions", positions, 0, tokens - 1)
    inside = (positions >= 0) & (positions < tokens)
    index = torch.full((tokens + 1,), -1, dtype=torch.int32, device=positions.device)
    numbers = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    index.scatter_(0, torch.where(inside, positions, tokens), numbers)
    index = index[:tokens].clone()
    if checks.reads_values(positions) and (count := int((index >= 0).sum())) != positions.shape[0]:
        raise ValueError(f"positions: expected {positions.shape[0]} different tokens, given {count} that are different")
    return index, torch.where(inside, positions, -1).int()


def _fake_place_features(mask: Tensor, features: int) -> tuple[Tensor, Tensor]:
    return mask.new_empty((mask.numel(),), dtype=torch.int32), mask.new_empty((features,), dtype=torch.int32)


def _fake_place_features_at(positions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    return positions.new_empty((tokens,), dtype=torch.int32), positions.new_empty(positions.shape, dtype=torch.int32)


for _name, _run, _fake in (
    ("place_features", _place_features, _fake_place_features),
    ("place_features_at", _place_features_at, _fake_place_features_at),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"velm::{_name}", _fake, lib=LIBRARY)
    derivatives.register_vmap(LIBRARY, _name)

place_features = torch.ops.velm.place_features.default
place_features_at = torch.ops.velm.place_features_at.default


def small_places(rows: Any, features: Any, mask: Any, tokens: tuple[int, ...], most: int) -> Tensor | None:
    """In a small call the numbers of the tokens that take a feature, as many as features ``(..., dim)``; else None.
    ``rows`` are what they are put into, or an embedding's weight, ``tokens`` the shape of the mask, ``most`` elements
    are in the result of a small call."""
    if rows.__class__ not in PLAIN or features.__class__ not in PLAIN:
        return None
    # Rows without features are left to the operators.
    if not 0 < product(tokens) * rows.shape[-1] <= most:
        return None
    if not takes_torch(NEVER, rows, features, dtype=ANY) or not may_read():
        return None
    if mask.__class__ not in PLAIN or mask.dtype is not torch.bool or not mask.is_cpu or mask.shape != tokens:
        return None
    if features.dim() < 2 or features.shape[-1] != rows.shape[-1] or not features.is_contiguous():
        return None
    place = mask.reshape(-1).nonzero()[:, 0]
    return place if product(features.shape[:-1]) == place.shape[0] else None


def checked_rows(name: str, value: Any) -> Tensor:
    """``(..., tokens, dim)``, floating point."""
    checks.dtype_in(name, checks.tensor(name, value), checks.FLOAT_DTYPES)
    if value.dim() < 2:
        raise ValueError(f"{name}: expected (..., tokens, dim), given {tuple(value.shape)}")
    rows: Tensor = value
    return rows


def checked_features(value: Any, dim: int, like_name: str, like: Tensor) -> Tensor:
    """``(n, dim)`` of ``(..., dim)`` in the dtype of ``like``."""
    checks.dtype_in("features", checks.tensor("features", value), checks.FLOAT_DTYPES)
    checks.same_device("features", value, like_name, like)
    if value.dim() < 2 or value.shape[-1] != dim:
        raise ValueError(f"features: expected (n, dim) with dim {dim} like {like_name}, given {tuple(value.shape)}")
    return as_matrix(value.to(like.dtype))


def checked_mask(mask: Any, like_name: str, like: Tensor) -> Tensor:
    """A mask of the tokens of ``like``, (..., tokens, dim)."""
    checks.dtype_in("mask", checks.tensor("mask", mask), (torch.bool,))
    checks.same_device("mask", mask, like_name, like)
    checks.shape("mask", mask, f"the shape of {like_name} without dim", like.shape[:-1])
    of_tokens: Tensor = mask
    return of_tokens


def few_enough(*counts: int) -> None:
    """Kernels count tokens and features in 32 bits."""
    if any(not isinstance(count, torch.SymInt) and count >= 2**31 for count in counts):
        raise ValueError(f"features: expected fewer than 2**31 tokens and features, given {max(counts)}")


def tokens_of(x: Tensor) -> int:
    return product(x.shape[:-1])


def text_by_id(token_ids: Tensor, index: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The tokens in the order of their ids, of one id in their own: (ids, numbers of tokens), int32. Behind those of
    text come those that take a feature, with ``vocabulary`` as their id."""
    keys = torch.where(index < 0, token_ids.clamp(0, max(vocabulary - 1, 0)), vocabulary)
    keys, order = keys.sort(stable=True)
    return keys, order.int()


def placeholders(batch: int, tokens: int) -> tuple[Tensor, int]:
    """A mask for cases, (batch, tokens), of which two thirds are True, and how many: no value is read."""
    number = torch.arange(batch * tokens).view(batch, tokens)
    return number % 3 != 1, sum(n % 3 != 1 for n in range(batch * tokens))
