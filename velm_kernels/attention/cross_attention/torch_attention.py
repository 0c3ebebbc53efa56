"""Plain and causal attention by torch's own kernels: FlashAttention, on Hopper and Blackwell cuDNN's, and one for CPUs.

These are the operators below ``torch.nn.functional.scaled_dot_product_attention``, called directly because they also
give the logsumexp that backward and callers want. Which of them a GPU takes is torch's own choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from velm_kernels import processors
from velm_kernels.backends import Arguments, cpu, failures, implementation
from velm_kernels.backends.cpu import DTYPES
from velm_kernels.layout import empty_like_heads

_aten = torch.ops.aten
# Of the arguments, the tensors that torch's attention knows.
_KNOWN = ("query", "key", "value", "grad_out", "grad_logsumexp", "out", "logsumexp")
# cuDNN's backward has no wider heads on every GPU.
CUDNN_WIDEST = 128
CPU_SHORTEST = processors.TORCH_ATTENTION_KEYS
FEW_QUERIES = 4
# Versions of torch from which on its kernel for CPUs knows heads that share a key head.
KNOWS_GROUPS = (2, 13)
# Elements of key that stay in the cache.
CACHED_KEY = 1 << 20


def why_not(arguments: Arguments) -> list[str]:
    """Why torch's attention cannot serve these arguments, of forward or backward."""
    if arguments.get("return_key_mass"):
        return ["torch's attention has no key_mass"]
    if arguments.get("grad_logsumexp") is not None:
        return ["torch's attention takes no gradient of logsumexp"]
    given = [name for name, value in arguments.items() if isinstance(value, Tensor) and name not in _KNOWN]
    given += ["softcap"] if arguments["softcap"] else []
    if given:
        return [f"torch's attention has no {', '.join(given)}"]
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    found = []
    if query.dtype not in (DTYPES if query.is_cpu else DTYPES[1:]):
        found.append(f"query is {query.dtype}, not " + ("float32, " if query.is_cpu else "") + "bfloat16 or float16")
    if query.shape[3] != value.shape[3]:
        found.append(f"head_dim {query.shape[3]} is not value_dim {value.shape[3]}")
    if 0 in query.shape or 0 in key.shape:
        found.append("a dimension is 0")
    if arguments["scale"] <= 0:
        # The greatest score is looked for before they are scaled.
        found.append(f"scale {arguments['scale']} is not greater than 0")
    if query.is_cpu or found:
        return found
    if query.device.type != "cuda" or torch.version.hip is not None:
        return [f"not tested on {'ROCm' if query.is_cuda else query.device.type}"]
    if query.shape[3] % 8:
        found.append(f"head_dim {query.shape[3]} is not a multiple of 8")
    if arguments["is_causal"] and query.shape[2] != key.shape[2]:
        found.append(f"causal with {query.shape[2]} queries of {key.shape[2]} keys")
    if not found and _kernel(query, key, value, arguments["is_causal"], arguments["scale"]) is None:
        found.append("torch would take neither cuDNN nor FlashAttention")
    return found


def _kernel(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> SDPBackend | None:
    """Which kernel torch takes on a GPU, where it is one of the two."""
    grouped = query.shape[1] != key.shape[1]
    chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    if chosen == SDPBackend.CUDNN_ATTENTION.value and query.shape[3] <= CUDNN_WIDEST:
        return SDPBackend.CUDNN_ATTENTION
    if chosen in (SDPBackend.CUDNN_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value):
        return SDPBackend.FLASH_ATTENTION
    return None


def _of_heads(tensor: Tensor) -> Tensor:
    """``tensor`` in the memory that the operators promise: batch, queries, heads."""
    if tensor.transpose(1, 2).is_contiguous():
        return tensor
    return empty_like_heads(tensor, tensor.shape[3]).copy_(tensor)


@functools.cache
def _knows_groups() -> bool:
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= KNOWS_GROUPS


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values once for every head, where the kernel for CPUs knows no groups."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 or _knows_groups() else tensor.repeat_interleave(groups, 1)


def _summed(grad: Tensor, kv_heads: int) -> Tensor:
    batch, heads, keys, dim = grad.shape
    return grad if heads == kv_heads else grad.view(batch, kv_heads, heads // kv_heads, keys, dim).sum(2)


def _all_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, and so is their sum."""
    return math.isfinite(tensor.sum().item())


def _by_kernels(operator: str, *args: Any) -> tuple[Tensor, ...]:
    """By this library's kernels for CPUs. Torch's multiply the values of later keys by 0, which leaves NaN and infinity
    as they are."""
    found: tuple[Tensor, ...] = implementation(operator, "cpu" if cpu.in_use() else "reference").call(*args)
    return found


def attention_forward(a: Any) -> tuple[Tensor | None, ...]:
    query, key, value, is_causal, scale = a.query, a.key, a.value, a.is_causal, a.scale
    try:
        if query.is_cpu:
            key, value = (_repeated(tensor, query.shape[1]) for tensor in (key, value))
            out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, scale=scale
            )
            if is_causal and not _all_finite(out):
                return _by_kernels("attention_forward", *a)
        elif _kernel(query, key, value, is_causal, scale) == SDPBackend.CUDNN_ATTENTION:
            out, logsumexp, *_ = _aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, is_causal, False, scale=scale
            )
        else:
            out, logsumexp, *_ = _aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, is_causal, False, scale=scale
            )
    except Exception as error:
        failure = failures.of_launch(error, "torch's attention")
        if failure is None:
            raise
        raise failure from error
    return _of_heads(out), logsumexp.reshape(query.shape[:3]).contiguous(), None


def attention_backward(a: Any, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    query, key, value, out, logsumexp = a.query, a.key, a.value, a.out, a.logsumexp
    is_causal, scale, grad_out = a.is_causal, a.scale, a.grad_out
    kv_heads, lengths = key.shape[1], (query.shape[2], key.shape[2])
    if grad_out.stride() != out.stride():
        grad_out = torch.empty_like(out).copy_(grad_out)
    try:
        if query.is_cpu:
            key, value = (_repeated(tensor, query.shape[1]) for tensor in (key, value))
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
            )
            if is_causal and not all(map(_all_finite, grads)):
                mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
                return _by_kernels("attention_backward", *a, mask)
        else:
            # Of dropout, which there is none of.
            seed, offset = query.new_empty((2,), dtype=torch.int64), query.new_empty((), dtype=torch.int64)
            if _kernel(query, key, value, is_causal, scale) == SDPBackend.CUDNN_ATTENTION:
                grads = _aten._scaled_dot_product_cudnn_attention_backward(
                    *(grad_out, query, key, value, out, logsumexp.unsqueeze(-1), offset, offset, None, None, None),
                    *(*lengths, 0.0, is_causal),
                    scale=scale,
                )
            else:
                grads = _aten._scaled_dot_product_flash_attention_backward(
                    *(grad_out, query, key, value, out, logsumexp, None, None, *lengths, 0.0, is_causal, seed, offset),
                    scale=scale,
                )
    except Exception as error:
        failure = failures.of_launch(error, "torch's attention")
        if failure is None:
            raise
        raise failure from error
    grad_query, *others = grads
    found = [grad_query, *(_summed(grad, kv_heads) for grad in others)]
    # It has no other arguments with a gradient.
    return [_of_heads(found[bit]) if want else None for bit, want in enumerate(wanted)]


def reads_keys_too_often(query: Tensor, key: Tensor) -> bool:
    """Whether keys that heads share come from memory for each of them in torch's kernel for CPUs, and time goes there.

    This library's reads them once. Measured on the processors with AMX that :mod:`velm_kernels.processors` knows: one
    query of 32 or 64 heads over 8 in bfloat16 at 11 to 20 % of the read bandwidth by torch.
    """
    if query.dim() != 4 or key.dim() != 4:
        return False
    heads, queries = query.shape[1:3]
    return heads >= 2 * key.shape[1] and queries <= FEW_QUERIES and key.numel() > CACHED_KEY


def _is_wide(query: Tensor, key: Tensor) -> bool:
    """Whether a tile of rows of these heads leaves the first-level cache, which this library's kernels are written for,
    and there is more than one product by a vector to it."""
    if query.dim() != 4 or query.shape[-1] <= processors.rules().attention_widest:
        return False
    return query.shape[-2] > FEW_QUERIES and key.shape[-2] >= CPU_SHORTEST


def is_best_on_cpu(arguments: Arguments) -> bool:
    if arguments["query"].dtype == torch.float32:
        return _is_wide(arguments["query"], arguments["key"]) and not arguments["is_causal"]
    # In shorter rows torch's kernel loses NaN.
    if arguments["query"].dtype != torch.bfloat16 or arguments["key"].shape[-2] < CPU_SHORTEST:
        return False
    if reads_keys_too_often(arguments["query"], arguments["key"]):
        return False
    return not processors.rules().bfloat16_attention


def is_best_backward_on_cpu(arguments: Arguments) -> bool:
    query, rules = arguments["query"], processors.rules()
    if query.dtype == torch.float32:
        return _is_wide(query, arguments["key"])
    if query.dtype != torch.bfloat16 or rules.bfloat16_attention:
        return False
    return query.shape[-2] * arguments["key"].shape[-2] * query.shape[-1] > rules.bfloat16_attention_backward
