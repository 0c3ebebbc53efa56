"""The counter-based random numbers of dropout: what every backend computes, written in plain torch.

Philox4x32-10 of J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``constant * word``; by halves, since the product does not fit a signed 64-bit."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words (as int64 tensors) for a 64-bit ``seed`` and a counter of four 32-bit words."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep_at(
    seed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """:func:`dropout_keep` of the weights of queries to keys, tensors of their numbers that broadcast; ``row`` is that
    of the entry and head, ``b * heads + h``."""
    query, quad, row, word = torch.broadcast_tensors(query, key // 4, row, key % 4)
    drawn = torch.stack(philox4x32(seed, (query, quad, row, torch.zeros_like(row))))
    return drawn.gather(0, word[None])[0] >= int(dropout_p * 2**32)


def dropout_keep(
    seed: torch.Tensor,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dropout_p: float,
    first_batch: int = 0,
    direction: int = 0,
) -> torch.Tensor:
    """Bool ``(batch, heads, queries, keys)``: which attention weights dropout with probability ``dropout_p`` keeps.

    Weight ``(b, h, i, j)`` takes word ``j % 4`` of the counter ``(i, j // 4, b * heads + h, direction)`` and is
    dropped if the word is less than ``dropout_p * 2^32``.
    """
    device = seed.device

    def index(size: int, *shape: int) -> torch.Tensor:
        return torch.arange(size, dtype=torch.int64, device=device).view(shape)

    quads = (keys + 3) // 4
    row = index(batch * heads, batch, heads, 1, 1) + first_batch * heads
    words = philox4x32(
        seed,
        torch.broadcast_tensors(
            index(queries, 1, 1, -1, 1), index(quads, 1, 1, 1, -1), row, row.new_full((), direction)
        ),
    )
    drawn = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return drawn >= int(dropout_p * 2**32)
