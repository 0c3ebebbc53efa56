"""The operators ``velm::attention_forward`` and ``velm::attention_backward``: schemas, result shapes, autograd.

Tensors arrive as :func:`velm_kernels.cross_attention` describes them, in canonical form: integers as contiguous int32,
mask and bias with four dimensions of which each may be 1, scalars without None (softcap 0 is none).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from velm_kernels import checks
from velm_kernels.backends import Arguments, flops
from velm_kernels.backends.direct import ops
from velm_kernels.backends.library import declare

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? range_start, Tensor? range_stop, "
    "Tensor? key_mask, Tensor? mask, Tensor? bias, Tensor? query_norm_weight, Tensor? key_norm_weight, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_SIZES = "SymInt max_seqlen_q, SymInt max_seqlen_k"
_SCALARS = f"{_SIZES}, bool is_causal, float scale, float softcap, float norm_eps, float dropout_p"
TENSOR_NAMES = tuple(part.split()[-1] for part in _TENSORS.split(", "))
SCALAR_NAMES = tuple(part.split()[-1] for part in _SCALARS.split(", "))

# The tensors that backward can return a gradient for; bit i of grad_mask asks for the i-th.
DIFFERENTIABLE = ("query", "key", "value", "bias", "query_norm_weight", "key_norm_weight")


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


def _check_packing(name: str, cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> int:
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


def empty_like_heads(query: torch.Tensor, last: int) -> torch.Tensor:
    """Memory in the order batch, queries, heads: merging the heads for the output projection is then free."""
    if query.dim() == 3:
        return query.new_empty(*query.shape[:2], last)
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, last).transpose(1, 2)


def _fake_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
    names = TENSOR_NAMES[3:] + SCALAR_NAMES + ("return_key_mass",)
    given = dict(zip(names, rest, strict=False))
    if query.dim() == 3:
        rows: tuple[int, ...] = (query.shape[1], query.shape[0])
        mass: tuple[int, ...] = (query.shape[1], key.shape[0])
    else:
        rows, mass = tuple(query.shape[:3]), (*query.shape[:2], key.shape[2])
    return (
        empty_like_heads(query, value.shape[-1]),
        query.new_empty(rows, dtype=extra_dtype(query)),
        query.new_empty(mass if given["return_key_mass"] else (0,), dtype=extra_dtype(query)),
    )


def extra_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake_backward(grad_out: torch.Tensor, grad_logsumexp: torch.Tensor | None, *rest: Any) -> Any:
    given = dict(zip((*TENSOR_NAMES, "out", "logsumexp", *SCALAR_NAMES, "grad_mask"), rest, strict=False))
    results = []
    for bit, name in enumerate(DIFFERENTIABLE):
        tensor = given[name]
        if not given["grad_mask"] & (1 << bit):
            results.append(grad_out.new_empty((0,)))
        elif bit < 3:
            results.append(empty_like_heads(tensor, tensor.shape[-1]))
        else:
            results.append(tensor.new_empty(tensor.shape))
    return tuple(results)


declare(
    "attention_forward",
    f"{_TENSORS}, {_SCALARS}, bool return_key_mass",
    "(Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    check=_check_values,
)
declare(
    "attention_backward",
    f"Tensor grad_out, Tensor? grad_logsumexp, {_TENSORS}, Tensor out, Tensor logsumexp, {_SCALARS}, int grad_mask",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors = inputs[: len(TENSOR_NAMES)]
    out, logsumexp, _ = output
    ctx.save_for_backward(*tensors, out, logsumexp)
    ctx.scalars = inputs[len(TENSOR_NAMES) : len(TENSOR_NAMES) + len(SCALAR_NAMES)]
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)


def saved_arguments(ctx: Any) -> list[Any]:
    """The arguments of forward, from what :func:`save_for_backward` saved of them."""
    *tensors, _, _ = ctx.saved_tensors
    return [*tensors, *ctx.scalars, False]


def backward(ctx: Any, grad_out: torch.Tensor | None, grad_logsumexp: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    wanted = [ctx.needs[TENSOR_NAMES.index(name)] for name in DIFFERENTIABLE]
    count = len(TENSOR_NAMES) + len(SCALAR_NAMES) + 2
    if (grad_out is None and grad_logsumexp is None) or not any(wanted):
        return (None,) * count
    if grad_out is None:
        grad_out = torch.zeros_like(saved[-2])
    grads = ops.attention_backward(
        grad_out,
        grad_logsumexp,
        *saved,
        *ctx.scalars,
        sum(1 << bit for bit, want in enumerate(wanted) if want),
        ctx.backend,
    )
    results: list[torch.Tensor | None] = [None] * count
    for name, want, grad in zip(DIFFERENTIABLE, wanted, grads, strict=True):
        if want:
            results[TENSOR_NAMES.index(name)] = grad
    return tuple(results)


def _flops_forward(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the two products as if nothing were masked, like torch's formula for its own attention."""
    rows, keys = (query_shape[0] * query_shape[1], key_shape[0])
    if len(query_shape) == 4:
        rows, keys = query_shape[0] * query_shape[1] * query_shape[2], key_shape[2]
    return int(2 * rows * keys * (query_shape[-1] + value_shape[-1]))


def _flops_backward(
    grad_shape: Any, lse_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any
) -> int:
    rows, keys = (query_shape[0] * query_shape[1], key_shape[0])
    if len(query_shape) == 4:
        rows, keys = query_shape[0] * query_shape[1] * query_shape[2], key_shape[2]
    return int(2 * rows * keys * (3 * query_shape[-1] + 2 * value_shape[-1]))


flops.register("attention_forward", _flops_forward)
flops.register("attention_backward", _flops_backward)
