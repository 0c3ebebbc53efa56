"""The attention operators on the ``reference`` backend: the written meaning, and its gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels.attention.cross_attention import reference
from velm_kernels.attention.cross_attention.op import (
    DIFFERENTIABLE,
    SCALAR_NAMES,
    TENSOR_NAMES,
    empty_like_heads,
    extra_dtype,
)
from velm_kernels.backends import Arguments, derivatives
from velm_kernels.backends.library import autograd_inside
from velm_kernels.philox import dropout_keep_at


def _sequences(given: Arguments, not_finite: bool) -> list[tuple[Arguments, slice, slice]]:
    """The keyword arguments of the reference for each packed sequence (or for the one batch), with its tokens."""
    common: Arguments = {
        "is_causal": given["is_causal"],
        "scale": given["scale"],
        "softcap": given["softcap"] or None,
        "norm_eps": given["norm_eps"],
        "dropout_p": given["dropout_p"],
        "seed": given["seed"],
        "not_finite": not_finite,
    }
    start, stop = given["range_start"], given["range_stop"]
    if given["cu_seqlens_q"] is None:
        common |= {name: given[name] for name in ("key_lengths", "key_mask", "mask", "bias")}
        common["key_ranges"] = None if start is None else (start, stop)
        return [(common, slice(None), slice(None))]
    sequences = []
    offsets_q, offsets_k = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for sequence in range(len(offsets_q) - 1):
        rows = slice(offsets_q[sequence], offsets_q[sequence + 1])
        cols = slice(offsets_k[sequence], offsets_k[sequence + 1])
        ranges = None if start is None else (start[None, rows], stop[None, rows])
        sequences.append((common | {"key_ranges": ranges, "first_batch": sequence}, rows, cols))
    return sequences


def _call(given: Arguments, not_finite: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator by :mod:`reference`, in float32 at least, differentiable in the tensors of ``given``."""
    compute_dtype = torch.promote_types(given["query"].dtype, torch.float32)

    def widened(name: str) -> Any:
        return None if given[name] is None else given[name].to(compute_dtype)

    query, key, value = widened("query"), widened("key"), widened("value")
    norms = {name: widened(name) for name in ("query_norm_weight", "key_norm_weight")}
    if given["cu_seqlens_q"] is None:
        ((arguments, _, _),) = _sequences(given, not_finite)
        arguments["bias"] = widened("bias")
        return reference.cross_attention(query, key, value, **(arguments | norms))
    if not (derivatives.readable(given["cu_seqlens_q"]) and derivatives.readable(given["cu_seqlens_k"])):
        return _all_at_once(given, query, key, value, norms)
    outs = [query.new_zeros(0, query.shape[1], value.shape[2])]
    logsumexps, masses = [query.new_zeros(query.shape[1], 0)], [query.new_zeros(query.shape[1], 0)]
    for arguments, rows, cols in _sequences(given, not_finite):
        packed = [tensor.transpose(0, 1)[None] for tensor in (query[rows], key[cols], value[cols])]
        out, logsumexp, mass = reference.cross_attention(*packed, **(arguments | norms))
        outs.append(out[0].transpose(0, 1))
        logsumexps.append(logsumexp[0])
        masses.append(mass[0])
    return torch.cat(outs), torch.cat(logsumexps, 1), torch.cat(masses, 1)


def _all_at_once(
    given: Arguments, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, norms: Arguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed sequences without reading where they begin: all queries and all keys, masked beyond their sequence."""
    (of_query, i), (of_key, j) = (
        _within(given[name].long(), tokens.shape[0])
        for name, tokens in (("cu_seqlens_q", query), ("cu_seqlens_k", key))
    )
    i, of_query = i[:, None], of_query[:, None]
    mask = of_query == of_key
    if given["is_causal"]:
        mask = mask & (j <= i)
    if given["range_start"] is not None:
        mask = mask & (j >= given["range_start"][:, None]) & (j < given["range_stop"][:, None])
    keep = None
    if given["dropout_p"] > 0:
        heads = torch.arange(query.shape[1], device=query.device)[:, None, None]
        keep = dropout_keep_at(given["seed"], i, j, of_query * query.shape[1] + heads, given["dropout_p"])[None]
    packed = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    settings: Arguments = {name: given[name] for name in ("scale", "norm_eps", "dropout_p")} | norms
    settings |= {"mask": mask[None, None], "keep": keep, "softcap": given["softcap"] or None}
    out, logsumexp, mass = reference.cross_attention(*packed, **settings)
    return out[0].transpose(0, 1), logsumexp[0], mass[0]


def _within(bounds: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token its sequence, and its place in it."""
    token = torch.arange(tokens, device=bounds.device)
    sequence = (token[:, None] >= bounds[1:]).sum(1)
    return sequence, token - bounds[sequence]


def attention_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = dict(zip((*TENSOR_NAMES, *SCALAR_NAMES, "return_key_mass"), args, strict=True))
    query = given["query"]
    out, logsumexp, key_mass = _call(given)
    out = out.to(query.dtype)
    extra = extra_dtype(query)
    return (
        # As empty_like_heads has it in memory.
        out.contiguous() if out.dim() == 3 else out.transpose(1, 2).contiguous().transpose(1, 2),
        logsumexp.to(extra).contiguous(),
        key_mass.to(extra).contiguous() if given["return_key_mass"] else query.new_empty((0,), dtype=extra),
    )


def attention_backward(grad_out: torch.Tensor, grad_logsumexp: torch.Tensor | None, *args: Any) -> Any:
    given = dict(zip((*TENSOR_NAMES, "out", "logsumexp", *SCALAR_NAMES, "grad_mask"), args, strict=True))
    wanted = [name for bit, name in enumerate(DIFFERENTIABLE) if given["grad_mask"] & (1 << bit)]
    with autograd_inside():
        for name in wanted:
            given[name] = given[name].detach().requires_grad_()
        not_finite = grad_out.device.type == "cpu" and not bool(grad_out.isfinite().all())
        out, logsumexp, _ = _call(given, not_finite)
        outputs, grads = [out], [grad_out.to(out.dtype)]
        # It does not depend on values.
        if grad_logsumexp is not None and logsumexp.requires_grad:
            outputs.append(logsumexp)
            grads.append(grad_logsumexp.to(logsumexp.dtype))
        found: tuple[torch.Tensor | None, ...] = (None,) * len(wanted)
        if out.requires_grad:  # there is at least one sequence
            found = torch.autograd.grad(outputs, [given[name] for name in wanted], grads, allow_unused=True)
    by_name = dict(zip(wanted, found, strict=True))
    results = []
    for bit, name in enumerate(DIFFERENTIABLE):
        if name not in by_name:
            results.append(grad_out.new_empty((0,)))
            continue
        tensor, grad = given[name], by_name[name]
        result = (
            empty_like_heads(tensor, tensor.shape[-1])
            if bit < 3
            else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        )
        results.append(result.detach().zero_() if grad is None else result.detach().copy_(grad))
    return tuple(results)
