"""Around a sequence of tokens: rotary embeddings, pictures among the embeddings of a text, DeepStack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Function, Inputs, published


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers has it for text."""
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _rotated_in_float32(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers has it for vision towers."""
    if query.dtype == torch.float64:
        return _rotated(query, key, cos, sin)
    found = _rotated(query.float(), key.float(), cos.float(), sin.float())
    return found[0].to(query.dtype), found[1].to(key.dtype)


def rotary_case(name: str, eager: Function, kv_heads: int, batch: int, heads: int, tokens: int, head_dim: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        """Views of a packed projection."""
        packed = _randn(generator, batch, tokens, heads + 2 * kv_heads, head_dim).transpose(1, 2)
        table = _randn(generator, batch, tokens, head_dim)
        query, key, _ = packed.split((heads, kv_heads, kv_heads), 1)
        return {"query": query, "key": key, "cos": table.cos(), "sin": table.sin()}

    size = float(batch * (heads + kv_heads) * tokens * head_dim)
    return Case(
        operator="rotary",
        name=name,
        shape=f"B{batch} H{heads} kv{kv_heads} N{tokens} D{head_dim}",
        make=make,
        wanted=("query", "key"),
        ways={"eager": eager, "velm": velm_kernels.rotary},  # type: ignore[dict-item]
        flops=3 * size,
        traffic=2 * size,
        backward_flops=3 * size,
        backward_traffic=2 * size,
        work=size,
    )


def _picture(batch: int, tokens: int) -> tuple[Tensor, int]:
    """Three quarters of the tokens are those of one picture."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[:, tokens // 8 : tokens // 8 + 3 * tokens // 4] = True
    return mask, batch * (3 * tokens // 4)


def _masked_scatter(embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """As transformers has it."""
    return embeddings.masked_scatter(mask[..., None].expand_as(embeddings), features)


def splice_into_case(batch: int, tokens: int, dim: int) -> Case:
    mask, count = _picture(batch, tokens)

    def index_copy(embeddings: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        where = mask.view(-1).nonzero()[:, 0]
        return embeddings.view(-1, dim).index_copy(0, where, features).view_as(embeddings)

    size = float(batch * tokens * dim)
    return Case(
        operator="splice_into",
        name="splice-into",
        shape=f"{count} of {batch} x {tokens} x {dim}",
        make=lambda generator: {
            "embeddings": _randn(generator, batch, tokens, dim),
            "features": _randn(generator, count, dim),
            "mask": mask,
        },
        wanted=("embeddings", "features"),
        ways={"eager": _masked_scatter, "index_copy": index_copy, "velm": velm_kernels.splice_into},
        flops=0.0,
        traffic=2 * size,
        backward_flops=0.0,
        backward_traffic=2 * size + float(count * dim),
        work=size,
    )


def splice_tokens_case(batch: int, tokens: int, vocabulary: int, dim: int) -> Case:
    mask, count = _picture(batch, tokens)

    def make(generator: torch.Generator) -> Inputs:
        token_ids = torch.randint(0, vocabulary - 1, (batch, tokens), generator=generator)
        return {
            "token_ids": token_ids.masked_fill(mask, vocabulary - 1),
            "weight": _randn(generator, vocabulary, dim),
            "features": _randn(generator, count, dim),
        }

    def eager(token_ids: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        return _masked_scatter(F.embedding(token_ids, weight), features, token_ids == vocabulary - 1)

    size = float(batch * tokens * dim)
    return Case(
        operator="splice_tokens",
        name="splice-tokens",
        shape=f"{count} of {batch} x {tokens} x {dim}, vocabulary {vocabulary}",
        make=make,
        # Of pictures alone: a language model's embeddings are frozen, or their gradient is that of the whole table.
        wanted=("features",),
        ways={
            "eager": eager,
            "velm": lambda token_ids, weight, features: velm_kernels.splice_tokens(
                token_ids, weight, features, vocabulary - 1
            ),
        },
        flops=0.0,
        traffic=2 * size,
        backward_flops=0.0,
        backward_traffic=2 * float(count * dim),
        work=size,
    )


def deepstack_case(inplace: bool, batch: int, tokens: int, dim: int) -> Case:
    mask, count = _picture(batch, tokens)

    def eager(hidden: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """As Qwen3-VL has it."""
        hidden = hidden.clone()
        hidden[mask, :] = hidden[mask, :].clone() + features
        return hidden

    def index_add(hidden: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        where = mask.view(-1).nonzero()[:, 0]
        return hidden.view(-1, dim).index_add(0, where, features).view_as(hidden)

    def velm(hidden: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return velm_kernels.add_at_tokens(hidden, features, mask)

    def in_place(hidden: Tensor, features: Tensor, mask: Tensor, scratch: Tensor) -> Tensor:
        # Adds to the same memory again and again: only the first result, which is checked, is that of hidden.
        if scratch.data_ptr() not in filled:
            filled.add(scratch.data_ptr())
            scratch.copy_(hidden)
        return velm_kernels.add_at_tokens(scratch, features, mask, inplace=True)

    filled: set[int] = set()

    def make(generator: torch.Generator) -> Inputs:
        hidden, features = _randn(generator, batch, tokens, dim), _randn(generator, count, dim)
        given: Inputs = {"hidden": hidden, "features": features, "mask": mask}
        return given | ({"scratch": torch.zeros_like(hidden)} if inplace else {})

    def without_scratch(way: Function) -> Function:
        return (lambda hidden, features, mask, scratch: way(hidden, features, mask)) if inplace else way

    size, added = float(batch * tokens * dim), float(count * dim)
    ways: dict[str, Any] = {"eager": without_scratch(eager), "index_add": without_scratch(index_add)}
    return Case(
        operator="add_at_tokens",
        name="deepstack-in-place" if inplace else "deepstack",
        shape=f"{count} of {batch} x {tokens} x {dim}",
        make=make,
        wanted=("hidden", "features"),
        ways=ways | {"velm": in_place if inplace else velm},
        flops=added,
        traffic=3 * added if inplace else 2 * size + added,
        backward_flops=None if inplace else 0.0,
        backward_traffic=2 * added,
        work=size,
    )


def cases() -> list[Case]:
    size = published()
    return [
        rotary_case("rotary-text", _rotated, 8, **size["rotary-text"]),
        rotary_case("rotary-tower", _rotated_in_float32, 16, **size["rotary-tower"]),
        splice_into_case(**size["splice-into"]),
        splice_tokens_case(**size["splice-tokens"]),
        deepstack_case(False, **size["deepstack"]),
        deepstack_case(True, **size["deepstack"]),
    ]
