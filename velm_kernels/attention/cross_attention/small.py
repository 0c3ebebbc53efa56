"""Attention by torch's own operators, called in place of this library's where they are the faster ones.

Which sizes these are, :mod:`velm_kernels.processors` knows for the processor. There are two forms: torch's kernel, and
the scores one by one, which is faster where a gradient is recorded and there are few of them. A form returns None where
it does not apply, and raises nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks, processors
from velm_kernels.attention.cross_attention.torch_attention import CACHED_KEY, reads_keys_too_often
from velm_kernels.backends import derivatives
from velm_kernels.backends.small import ANY, PLAIN, in_float32, takes_torch

MAX_HEAD_DIM = 512
# Scores up to which forming them is the fastest way on every processor, and elements of 16 bits that become float32
# for it.
SMALL_SCORES, SMALL_WIDENED = 1 << 15, 1 << 16
# Queries times keys times head_dim below which torch's kernel is faster with a gradient than forming the scores, in
# float32 and in bfloat16. Xeon with AMX, 2 threads, 2026-11-30, forward and backward of 12 heads of 64 x 64 x 64 in
# float32: 516 us by the kernel and 633 us by scores, of 8 entries 3.8 and 14.0 ms.
KERNEL_RECORDED, KERNEL_RECORDED_16_BITS = 1 << 19, 1 << 12
# Scores in float32 above which they are too much memory to form: 2.6 ms for 2^18, by this library 2.4 ms.
FORMED_FLOAT32 = 1 << 17
# Multiply-adds, and elements of key, up to which 16 bits become float32 for a gradient.
WIDENED_WORK, WIDENED_KEY = 1 << 21, 1 << 14

_KERNEL_NODE = "ScaledDotProductFlashAttentionForCpuBackward"
_INTEGERS = frozenset(checks.INTEGER_DTYPES)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Attention of which nothing is hidden but by ``bias`` and causality; else None."""
    if torch.compiler.is_compiling():
        return None
    given = (query, key, value) if bias is None else (query, key, value, bias)
    if not takes_torch(processors.NEVER, *given, dtype=ANY) or not _fit(query, key, value, scale):
        return None
    if is_causal.__class__ is not bool or (bias is not None and not _broadcasts(bias, query, key)):
        return None
    (_, heads, _, _), (_, kv_heads, keys, _) = query.shape, key.shape
    recorded = torch.is_grad_enabled() and _needs_gradient(given)
    # Nobody knows here which derivatives a transform or forward mode will ask for.
    other_modes = derivatives.other_modes()
    # Torch's kernel loses NaN in rows shorter than a vector.
    if not other_modes and keys >= processors.TORCH_ATTENTION_KEYS:
        if not recorded:
            if _kernel_is_faster(query, key):
                if bias is None and not is_causal and heads == kv_heads:
                    return F.scaled_dot_product_attention(query, key, value, scale=scale)
                return _by_kernel(query, key, value, is_causal, scale, bias)
        elif bias is None and heads == kv_heads and not is_causal and _recorded_kernel_is_faster(query, key):
            return _recorded_by_kernel(query, key, value, scale)
    if heads != kv_heads or is_causal:
        return None
    is_formed = _formed_is_faster(query, key) if recorded and not other_modes else _is_small(query, key)
    if not is_formed or (bias is not None and not _is_finite(bias)):
        return None
    return formed(query, key, value, scale, bias, widened=_widens(query, key, recorded))


def attend_where_visible(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Any = None,
    *,
    key_lengths: Any = None,
    key_ranges: Any = None,
    key_mask: Any = None,
    mask: Any = None,
) -> Tensor | None:
    """Attention of which keys are hidden, where no gradient is recorded; else None."""
    if key_lengths is key_ranges is key_mask is mask is None:
        return attend(query, key, value, is_causal, scale, bias)
    given = (query, key, value) if bias is None else (query, key, value, bias)
    if torch.compiler.is_compiling() or not takes_torch(processors.NEVER, *given, dtype=ANY):
        return None
    if torch.is_grad_enabled() and _needs_gradient(given):
        return None
    if not _fit(query, key, value, scale) or is_causal is not False or derivatives.other_modes():
        return None
    keys = key.shape[2]
    if keys < processors.TORCH_ATTENTION_KEYS or not _kernel_is_faster(query, key):
        return None
    shown = _visible(query, key, key_lengths, key_ranges, key_mask, mask)
    if shown is None:
        return None
    if bias is not None:
        if not _broadcasts(bias, query, key):
            return None
        shown = torch.where(shown, bias, -torch.inf)
    return _by_kernel(query, key, value, False, scale, shown)


def attend_with_extras(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, return_logsumexp: bool, return_key_mass: bool
) -> tuple[Tensor, ...] | None:
    """Attention, and of its scores the logsumexp and the mass of every key, where they are few; else None."""
    if torch.compiler.is_compiling() or not takes_torch(processors.NEVER, query, key, value, dtype=ANY):
        return None
    if not _fit(query, key, value, scale) or query.shape[1] != key.shape[1] or not _is_small(query, key):
        return None
    if return_logsumexp.__class__ is not bool or return_key_mass.__class__ is not bool:
        return None
    scores = (in_float32(query) * (query.shape[-1] ** -0.5 if scale is None else scale)) @ in_float32(key).transpose(
        -1, -2
    )
    weights = torch.softmax(scores, -1)
    out = weights @ in_float32(value)
    results = [out if out.dtype is query.dtype else out.to(query.dtype)]
    if return_logsumexp:
        results.append(torch.logsumexp(scores, -1))
    if return_key_mass:
        results.append(weights.detach().sum(2))
    return tuple(results)


def formed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    bias: Tensor | None = None,
    *,
    widened: bool = True,
) -> Tensor:
    """Attention by its scores, which torch can differentiate to any order; in float32 where they are ``widened``."""
    dtype = query.dtype
    if widened:
        query, key, value = in_float32(query), in_float32(key), in_float32(value)
        bias = bias if bias is None else in_float32(bias)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    out = torch.softmax(scores if bias is None else scores + bias, -1) @ value
    return out if out.dtype is dtype else out.to(dtype)


def _fit(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    """Whether everything fits together, and nothing is empty."""
    of_query, of_key = query.shape, key.shape
    if len(of_query) != 4 or len(of_key) != 4 or of_key != value.shape:
        return False
    (batch, heads, queries, dim), (key_batch, kv_heads, keys, key_dim) = of_query, of_key
    if batch != key_batch or dim != key_dim or kv_heads == 0 or heads % kv_heads:
        return False
    if not (batch and heads and queries and keys and 0 < dim <= MAX_HEAD_DIM):
        return False
    return scale is None or (scale.__class__ is float and abs(scale) <= 1e30)


def _visible(query: Tensor, key: Tensor, key_lengths: Any, key_ranges: Any, key_mask: Any, mask: Any) -> Tensor | None:
    """The keys that queries see, broadcastable to the scores; None where an argument is unusual or wrong."""
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    shown: Tensor | None = None
    places = None if key_ranges is key_lengths is None else torch.arange(keys)
    if key_ranges is not None:
        if key_ranges.__class__ not in (tuple, list) or len(key_ranges) != 2:
            return None
        start, stop = key_ranges
        if not (_counts(start, (batch, queries), keys) and _counts(stop, (batch, queries), keys)):
            return None
        shown = (places >= start[:, None, :, None]) & (places < stop[:, None, :, None])
    if key_lengths is not None:
        if not _counts(key_lengths, (batch,), keys):
            return None
        shown = _both(shown, places < key_lengths[:, None, None, None])
    if key_mask is not None:
        if not _is_mask(key_mask) or key_mask.shape != (batch, keys):
            return None
        shown = _both(shown, key_mask[:, None, None, :])
    if mask is not None:
        if not _is_mask(mask) or not _broadcasts(mask, query, key):
            return None
        shown = _both(shown, mask)
    return shown


def _needs_gradient(tensors: tuple[Tensor, ...]) -> bool:
    query, key, value, *bias = tensors
    return query.requires_grad or key.requires_grad or value.requires_grad or any(one.requires_grad for one in bias)


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def _is_mask(tensor: Any) -> bool:
    return tensor.__class__ in PLAIN and tensor.dtype is torch.bool and tensor.is_cpu


def _counts(tensor: Any, shape: tuple[int, ...], most: int) -> bool:
    """Whether ``tensor`` has integers of this shape from 0 to ``most``."""
    if tensor.__class__ not in PLAIN or tensor.dtype not in _INTEGERS or not tensor.is_cpu or tensor.shape != shape:
        return False
    least, greatest = tensor.aminmax()
    return bool(least.item() >= 0 and greatest.item() <= most)


def _broadcasts(tensor: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether ``tensor`` broadcasts to the scores."""
    shape = (key.shape[2], query.shape[2], query.shape[1], query.shape[0])
    return tensor.dim() <= 4 and all(size in (1, full) for size, full in zip(reversed(tensor.shape), shape))


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, and so is their sum, which is known at once."""
    return math.isfinite(tensor.detach().sum().item())


def _kernel_is_faster(query: Tensor, key: Tensor) -> bool:
    rules = processors.rules()
    if query.dtype is torch.float32:
        batch, heads, queries, _ = query.shape
        scores = batch * heads * queries * key.shape[2]
        return scores <= rules.attention_scores and key.numel() <= CACHED_KEY
    if query.dtype is not torch.bfloat16 or rules.bfloat16_attention:
        return False
    return not reads_keys_too_often(query, key)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, mask: Tensor | None
) -> Tensor | None:
    """By torch's kernel, without a gradient."""
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    # Torch multiplies what is hidden by 0. A result that is finite has seen nothing that is not.
    return out if (mask is None and not is_causal) or _is_finite(out) else None


def _recorded_kernel_is_faster(query: Tensor, key: Tensor) -> bool:
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    work, rules = queries * keys * dim, processors.rules()
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        # What is kept for second derivatives they would not see.
        return False
    if query.dtype is torch.float32:
        return work < KERNEL_RECORDED and batch * heads * queries * keys <= rules.attention_recorded
    if query.dtype is not torch.bfloat16 or rules.bfloat16_attention:
        return False
    # One query of wide heads waits for memory.
    return work <= KERNEL_RECORDED_16_BITS or (queries == 1 and dim >= 128 and keys >= 512 and key.numel() < 1 << 21)


def _recorded_by_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """By torch's kernel, whose gradients have no derivatives: those come by :func:`formed`, if somebody asks."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    node: Any = out.grad_fn
    # Else torch has composed it of operators that have all derivatives.
    if node.name().startswith(_KERNEL_NODE):
        node.register_hook(_Again(query, key, value, scale))
    return out


class _Again:
    """In place of the gradients that torch's kernel found, those that can be differentiated again.

    Recording is on in backward only where that is asked for (``create_graph=True``).
    """

    __slots__ = ("inputs", "scale")

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
        self.inputs, self.scale = (query, key, value), scale

    def __call__(self, found: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled() or grads[0] is None:
            return None
        # Views, since the same tensor may stand in several places.
        query, key, value = inputs = [tensor.view_as(tensor) for tensor in self.inputs]
        wanted = [tensor for tensor, grad in zip(inputs, found, strict=True) if grad is not None]
        with checks.without_autocast(query.device):
            out = formed(query, key, value, self.scale)
            again = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
        return tuple(None if grad is None else next(again) for grad in found)


def _is_small(query: Tensor, key: Tensor) -> bool:
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if batch * heads * queries * keys > SMALL_SCORES:
        return False
    return query.dtype is torch.float32 or max(query.numel(), key.numel()) <= SMALL_WIDENED


def _formed_is_faster(query: Tensor, key: Tensor) -> bool:
    """With a gradient."""
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    scores, rules = batch * heads * queries * keys, processors.rules()
    if query.dtype is torch.float32:
        most = min(rules.attention_recorded, FORMED_FLOAT32)
        if scores > SMALL_SCORES and key.numel() > CACHED_KEY:
            return False
    elif query.dtype is torch.bfloat16:
        most = rules.bfloat16_attention_recorded
    else:
        return _is_small(query, key)
    if scores <= most and most > SMALL_SCORES:
        # Backward keeps the weights in place of the result: at most an eighth more than query, key, value and that.
        return scores <= 2 * SMALL_SCORES or queries * (keys - dim) <= (queries + keys) * dim // 4
    return _is_small(query, key)


def _widens(query: Tensor, key: Tensor, recorded: bool) -> bool:
    """Whether 16 bits become float32, which rounds less and is faster where there is little."""
    if query.dtype is torch.float32:
        return False
    if not recorded or processors.rules().bfloat16_attention or query.dtype is not torch.bfloat16:
        return True
    work = query.numel() * key.shape[2]
    return work <= WIDENED_WORK and key.numel() <= WIDENED_KEY
