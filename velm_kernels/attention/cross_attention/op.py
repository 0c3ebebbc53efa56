"""The operator attention, which cross_attention and cross_attention_varlen call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.cross_attention import reference, torch_attention
from velm_kernels.backends import Arguments, cuda, order, triton
from velm_kernels.backends.schemas import parameters
from velm_kernels.layout import empty_heads_last, empty_like_heads, product
from velm_kernels.operator import Operator

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? range_start, Tensor? range_stop, "
    "Tensor? key_mask, Tensor? mask, Tensor? bias, Tensor? rel_pos_height, Tensor? rel_pos_width, "
    "Tensor? query_norm_weight, Tensor? key_norm_weight, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool is_causal, float scale, float softcap, float norm_eps, "
    "float dropout_p, bool return_key_mass"
)


def _check_values(arguments: Arguments) -> None:
    """The checks that read values, inside the operator so that torch.compile does not trace them."""
    query, key = arguments["query"], arguments["key"]
    if arguments["cu_seqlens_q"] is None:
        keys = key.shape[2]
    else:
        keys = _check_packing("cu_seqlens_k", arguments["cu_seqlens_k"], key.shape[0], arguments["max_seqlen_k"])
        _check_packing("cu_seqlens_q", arguments["cu_seqlens_q"], query.shape[0], arguments["max_seqlen_q"])
    if arguments["key_lengths"] is not None:
        checks.values_between("key_lengths", arguments["key_lengths"], 0, keys)
    for name, ranges in (("key_ranges[0]", "range_start"), ("key_ranges[1]", "range_stop")):
        if arguments[ranges] is not None:
            checks.values_between(name, arguments[ranges], 0, keys)


def _check_packing(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> int:
    """The length of the longest sequence, where it may be read."""
    if not checks.reads_values(cu_seqlens):
        return max_seqlen
    offsets = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != tokens or any(length < 0 for length in lengths):
        wrong = next((i for i, length in enumerate(lengths) if length < 0), None)
        fall = "" if wrong is None else f", falling from {offsets[wrong]} to {offsets[wrong + 1]}"
        given = f"{offsets}" if len(offsets) <= 8 else f"{len(offsets)} from {offsets[0]} to {offsets[-1]}{fall}"
        raise ValueError(f"{name}: expected offsets that rise from 0 to the {tokens} packed tokens, given {given}")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen_{name[-1]}: expected at least the longest sequence {longest}, given {max_seqlen}")
    return longest


def _results(a: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    query, value_dim = a.query, a.value.shape[-1]
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    if query.dim() == 3:
        tokens, heads, _ = query.shape
        shape, rows, keys = (tokens, heads, value_dim), (heads, tokens), a.key.shape[0]
    else:
        batch, heads, queries, _ = query.shape
        shape, rows, keys = (batch, heads, queries, value_dim), (batch, heads, queries), a.key.shape[2]
    mass = _sums(query, (*rows[:-1], keys)) if a.return_key_mass else None
    return empty_heads_last(query, shape), _sums(query, rows), mass


def _sums(query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, in float32 beside 16 bits."""
    # A dtype takes half of the time once more.
    is_float32_or_64 = query.dtype is torch.float32 or query.dtype is torch.float64
    return query.new_empty(shape) if is_float32_or_64 else query.new_empty(shape, dtype=torch.float32)


# Columns of a row of query, key or value that the CUDA kernels are compiled for.
WIDEST_IN_CUDA = 256


def _too_wide(arguments: Arguments) -> list[str]:
    widths = {"head_dim": arguments["query"].shape[-1], "value_dim": arguments["value"].shape[-1]}
    return [f"{name} {width} is above {WIDEST_IN_CUDA}" for name, width in widths.items() if width > WIDEST_IN_CUDA]


def meaning(*values: Any, not_finite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    a, _ = OPERATOR.named(values)
    return reference.attention(a, not_finite)


def gradients(a: Any, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    not_finite = a.grad_out.device.type == "cpu" and not bool(a.grad_out.isfinite().all())
    found: Sequence[Tensor | None] = OPERATOR.differentiated(
        a, wanted, functools.partial(meaning, not_finite=not_finite)
    )
    return found


def _incoming(grad: Tensor, a: Any) -> Tensor:
    is_of_out = grad.dim() == a.query.dim()
    if not is_of_out or grad.stride(-1) == 1 or grad.shape[-1] <= 1:
        return grad
    return torch.empty_like(a.out).copy_(grad)


def _pairs(a: Any) -> int:
    """Pairs of queries and keys as if nothing were masked, like torch's formula for its own attention."""
    return product(a.query[:-1]) * (a.key[0] if len(a.query) == 3 else a.key[2])


def _no_rel_pos(arguments: Arguments) -> list[str]:
    return [] if arguments["rel_pos_height"] is None else ["it has no rel_pos_height and rel_pos_width"]


# query, key, value: any strides, as torch's attention takes them; the other backends see to neighbours in memory.
# key_lengths, range_*, cu_seqlens_*: contiguous int32. key_mask: contiguous bool. mask, bias: four dimensions, of which
# each may be 1, any strides. rel_pos_*: both or neither, of every query, last stride 1; the others may be 0.
# *_norm_weight: contiguous. softcap: 0 for none. seed: int64 scalar, given iff dropout_p > 0. out and the gradients of
# query, key and value: in memory (batch, rows, heads, dim), or as packed ones; what else there is contiguous. grad_out:
# last stride 1; grad_logsumexp: any strides.
_TENSORS = tuple(parameter.name for parameter in parameters(ARGUMENTS) if parameter.is_tensor)
OPERATOR = Operator(
    "attention",
    ARGUMENTS,
    shapes=_results,
    reference=meaning,
    results=("out", "logsumexp", "key_mass"),
    may_be_absent=("key_mass",),
    differentiable=(
        "query",
        "key",
        "value",
        "bias",
        "rel_pos_height",
        "rel_pos_width",
        "query_norm_weight",
        "key_norm_weight",
    ),
    without_gradient=("key_mass",),
    may_lack=("logsumexp",),
    saves=(*_TENSORS, "out", "logsumexp"),
    forward_only=("return_key_mass",),
    gradients=gradients,
    gradient_shapes={
        name: lambda a, name=name: empty_like_heads(getattr(a, name), getattr(a, name).shape[-1])
        for name in ("query", "key", "value")
    },
    incoming=_incoming,
    triton="attention.cross_attention.triton",
    cpu="attention.cross_attention.rows",
    cuda="attention.cross_attention.rows",
    torch_gives="attention.cross_attention.torch_attention",
    reasons={
        "torch": torch_attention.why_not,
        "triton": lambda a: triton.too_wide(a, "query", "value"),
        **dict.fromkeys(cuda.NAMESPACES, lambda a: [*_no_rel_pos(a), *_too_wide(a)]),
    },
    check=_check_values,
    flops=lambda a: 2 * _pairs(a) * (a.query[-1] + a.value[-1]),
    backward_flops=lambda a: 2 * _pairs(a) * (3 * a.query[-1] + 2 * a.value[-1]),
)
order.prefer_torch(OPERATOR.forward, on_cpu=torch_attention.is_best_on_cpu)
order.prefer_torch(OPERATOR.backward, on_cpu=torch_attention.is_best_backward_on_cpu)
