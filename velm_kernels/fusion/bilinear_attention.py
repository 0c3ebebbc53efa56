"""Attention over all pairs of two sequences by a bilinear form, and the features of pairs that it pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, cpu, cuda, flops, register, register_public, triton
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import autograd_inside, declare, register_autograd
from velm_kernels.fusion import reference
from velm_kernels.layout import unit_last_stride

GRAD_V, GRAD_Q, GRAD_H, GRAD_BIAS = 1, 2, 4, 8
GRAD_ATTENTION = 4


def bilinear_attention(
    v: Tensor,
    q: Tensor,
    h: Tensor,
    bias: Tensor | None = None,
    *,
    v_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    v_mask: Tensor | None = None,
    q_mask: Tensor | None = None,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention maps of Bilinear Attention Networks (Kim et al., 2018, eq. 6), one for each glimpse::

        logits[b, g, i, j] = sum_k h[g, k] v[b, i, k] q[b, j, k] + bias[g]
        maps[b, g] = softmax over all pairs (i, j) of logits[b, g]

    Neither the products ``h * v`` nor ``v * q`` exist in memory, forward or backward: pieces of q are scaled by h for
    all glimpses, side by side, and meet v in one product a batch entry.

    Args:
        v: ``(batch, regions, k)``, already projected; float32, bfloat16, float16, or float64 (computed by the
            reference backend).
        q: ``(batch, words, k)``, already projected, dtype of v.
        h: ``(glimpses, k)``, dtype of v.
        bias: ``(glimpses,)``, dtype of v. The softmax does not see it; the logits do.
        v_lengths, q_lengths: ``(batch,)`` integers from 0 to regions and words: only the first so many count.
        v_mask, q_mask: bool, broadcastable to ``(batch, regions)`` and ``(batch, words)``: where False, the region or
            word does not count. What does not count is not read, may hold NaN, and gets gradient 0.
        return_logits: the logits too.

    Under autocast v, q, h and bias are cast to its dtype.

    Returns:
        maps ``(batch, glimpses, regions, words)``, contiguous, in v's dtype, computed in float32; 0 for pairs that do
        not count. An entry without pairs is 0 and passes nothing back. With ``return_logits`` a pair ``(maps, logits)``
        of one shape; logits are -inf where a pair does not count.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, a device or (on the CPU, or with VELM_CHECK=1) a length is not as above.

    Backward keeps v, q, h and the maps, computes only what needs a gradient, and takes two products of the size of
    forward's.
    """
    if isinstance(v, Tensor):
        v, q, h, bias = checks.autocast(v, q, h, bias)
    arguments = canonical(
        v,
        q,
        h,
        bias,
        v_lengths=v_lengths,
        q_lengths=q_lengths,
        v_mask=v_mask,
        q_mask=q_mask,
        return_logits=return_logits,
    )
    maps, logits = call("bilinear_attention_forward", arguments)
    return (maps, logits) if return_logits else maps


def bilinear_attention_pool(
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    *,
    factor: int = 1,
    v_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    v_mask: Tensor | None = None,
    q_mask: Tensor | None = None,
) -> Tensor:
    """``sum_ij attention[..., i, j] v[i, k] q[j, k]``: the joint features that the maps of
    :func:`bilinear_attention` pool (Kim et al., 2018, eq. 4), without the products of v and q.

    Args:
        v: ``(batch, regions, k)``, already projected; float32, bfloat16, float16, or float64 (computed by the
            reference backend).
        q: ``(batch, words, k)``, already projected, dtype of v.
        attention: ``(batch, regions, words)`` for one glimpse or ``(batch, glimpses, regions, words)``, dtype of v;
            any numbers, not only maps.
        factor: so many neighbouring features of the result are summed; divides k.
        v_lengths, q_lengths, v_mask, q_mask: as of :func:`bilinear_attention`. Pairs that do not count are not read and
            get gradient 0, whatever their attention.

    Under autocast v, q and attention are cast to its dtype.

    Returns:
        ``(batch, k / factor)`` or ``(batch, glimpses, k / factor)``, in v's dtype, sums in float32.

    Raises:
        TypeError, ValueError: as :func:`bilinear_attention`; also for a factor that does not divide k.

    In the published network glimpse g has projections of its own, and q is updated between glimpses::

        maps = bilinear_attention(project(v), project(q), h, bias)
        for g in range(glimpses):
            pooled = bilinear_attention_pool(project_v[g](v), project_q[g](q), maps[:, g])
            q = q + project_pooled[g](pooled)[:, None]
    """
    if isinstance(v, Tensor):
        v, q, attention = checks.autocast(v, q, attention)
    masks = {"v_lengths": v_lengths, "q_lengths": q_lengths, "v_mask": v_mask, "q_mask": q_mask}
    arguments = canonical_pool(v, q, attention, factor=factor, **masks)
    out: Tensor = call("bilinear_attention_pool_forward", arguments)
    if attention.dim() == 3:
        out = out.squeeze(1)
    return out if factor == 1 else out.unflatten(-1, (out.shape[-1] // factor, factor)).sum(-1)


def canonical(
    v: Tensor,
    q: Tensor,
    h: Tensor,
    bias: Tensor | None = None,
    *,
    v_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    v_mask: Tensor | None = None,
    q_mask: Tensor | None = None,
    return_logits: bool = False,
) -> Arguments:
    """Checks the arguments of :func:`bilinear_attention` and returns those of the operator."""
    _check_pair(v, q)
    checks.tensor("h", h, dims=2, layout="(glimpses, k)")
    checks.shape("h", h, "(glimpses, k)", (h.shape[0], v.shape[2]))
    if bias is not None:
        checks.shape("bias", checks.tensor("bias", bias), "(glimpses,)", (h.shape[0],))
    for name, value in (("h", h), ("bias", bias)):
        if value is not None:
            checks.dtype_in(name, value, (v.dtype,))
            checks.same_device(name, value, "v", v)
    return {
        "v": unit_last_stride(v),
        "q": unit_last_stride(q),
        "h": h.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        **_masks(v, q, v_lengths, q_lengths, v_mask, q_mask),
        "return_logits": checks.flag("return_logits", return_logits),
    }


def canonical_pool(
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    *,
    factor: int = 1,
    v_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    v_mask: Tensor | None = None,
    q_mask: Tensor | None = None,
) -> Arguments:
    """Checks the arguments of :func:`bilinear_attention_pool` and returns those of the operator."""
    _check_pair(v, q)
    batch, regions, k = v.shape
    pairs = (batch, regions, q.shape[1])
    shape = tuple(checks.tensor("attention", attention).shape)
    if len(shape) not in (3, 4) or (shape[0], *shape[-2:]) != pairs:
        raise ValueError(
            "attention: expected (batch, regions, words) or (batch, glimpses, regions, words) with (batch, regions, "
            f"words) = {pairs}, given {shape}"
        )
    checks.dtype_in("attention", attention, (v.dtype,))
    checks.same_device("attention", attention, "v", v)
    if checks.integer("factor", factor, 1) and k % factor:
        raise ValueError(f"factor: expected a positive divisor of {k} features, given {factor}")
    attention = attention.unsqueeze(1) if len(shape) == 3 else attention
    return {
        "v": unit_last_stride(v),
        "q": unit_last_stride(q),
        "attention": attention.contiguous(),
        **_masks(v, q, v_lengths, q_lengths, v_mask, q_mask),
    }


def _check_pair(v: Tensor, q: Tensor) -> None:
    checks.dtype_in("v", checks.tensor("v", v, dims=3, layout="(batch, regions, k)"), checks.FLOAT_DTYPES)
    checks.dtype_in("q", checks.tensor("q", q, dims=3, layout="(batch, words, k)"), (v.dtype,))
    checks.same_device("q", q, "v", v)
    if q.shape[0] != v.shape[0] or q.shape[2] != v.shape[2]:
        raise ValueError(
            f"q: expected (batch, words, k) with batch = {v.shape[0]} and k = {v.shape[2]} as in v {tuple(v.shape)}, "
            f"given {tuple(q.shape)}"
        )


def _masks(
    v: Tensor,
    q: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
) -> Arguments:
    found: Arguments = {}
    for name, lengths in (("v_lengths", v_lengths), ("q_lengths", q_lengths)):
        if lengths is not None:
            lengths = checks.integers(name, lengths, "(batch,)", v.shape[:1], "v", v)
        found[name] = lengths
    for name, mask, layout, like in (
        ("v_mask", v_mask, "(batch, regions)", v),
        ("q_mask", q_mask, "(batch, words)", q),
    ):
        if mask is not None:
            mask = checks.mask(name, mask, layout, like.shape[:2], "v", v).contiguous()
        found[name] = mask
    return found


def _check_values(arguments: Arguments) -> None:
    for name in ("v", "q"):
        lengths = arguments[f"{name}_lengths"]
        if lengths is not None:
            checks.values_between(f"{name}_lengths", lengths, 0, arguments[name].shape[1])


def _pairs(v: Tensor, q: Tensor, glimpses: int) -> tuple[int, ...]:
    return (v.shape[0], glimpses, v.shape[1], q.shape[1])


def _fake_forward(
    v: Tensor,
    q: Tensor,
    h: Tensor,
    bias: Tensor | None,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    return_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = _pairs(v, q, h.shape[0])
    return v.new_empty(shape), v.new_empty(shape if return_logits else (0,))


def _fake_backward(
    grad_maps: Tensor | None,
    grad_logits: Tensor | None,
    maps: Tensor,
    v: Tensor,
    q: Tensor,
    h: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (v.shape, q.shape, h.shape, h.shape[:1])
    return tuple(v.new_empty(shape if grad_mask >> bit & 1 else (0,)) for bit, shape in enumerate(shapes))  # type: ignore[return-value]


def _fake_pool_forward(
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    backend: str,
) -> Tensor:
    return v.new_empty((v.shape[0], attention.shape[1], v.shape[2]))


def _fake_pool_backward(
    grad: Tensor,
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (v.shape, q.shape, attention.shape)
    return tuple(v.new_empty(shape if grad_mask >> bit & 1 else (0,)) for bit, shape in enumerate(shapes))  # type: ignore[return-value]


# v: (batch, regions, k), q: (batch, words, k), last stride 1, other strides arbitrary; h: (glimpses, k), bias:
# (glimpses,), maps, logits, attention and their gradients (batch, glimpses, regions, words), all contiguous and of one
# dtype. lengths: (batch,) int32, masks: bool of the first two dimensions of v or q, contiguous; kernels clamp lengths.
# Gradients contiguous; what grad_mask (GRAD_*) does not ask for has shape (0,), and so have logits.
_MASKS = "Tensor? v_lengths, Tensor? q_lengths, Tensor? v_mask, Tensor? q_mask"
declare(
    "bilinear_attention_forward",
    f"Tensor v, Tensor q, Tensor h, Tensor? bias, {_MASKS}, bool return_logits",
    "(Tensor, Tensor)",
    fake=_fake_forward,
    check=_check_values,
)
declare(
    "bilinear_attention_backward",
    f"Tensor? grad_maps, Tensor? grad_logits, Tensor maps, Tensor v, Tensor q, Tensor h, {_MASKS}, int grad_mask",
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
# out: (batch, glimpses, k) contiguous.
declare(
    "bilinear_attention_pool_forward",
    f"Tensor v, Tensor q, Tensor attention, {_MASKS}",
    "Tensor",
    fake=_fake_pool_forward,
    check=_check_values,
)
declare(
    "bilinear_attention_pool_backward",
    f"Tensor grad, Tensor v, Tensor q, Tensor attention, {_MASKS}, int grad_mask",
    "(Tensor, Tensor, Tensor)",
    fake=_fake_pool_backward,
)


def _chosen(grads: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    v, q, h, _, *masks, return_logits, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    if not return_logits:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[0], v, q, h, *masks)


def _backward(ctx: Any, grad_maps: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs[:4]
    if grad_maps is None and grad_logits is None:
        return (None,) * 10
    grads = ops.bilinear_attention_backward(
        None if grad_maps is None else grad_maps.contiguous(),
        None if grad_logits is None else grad_logits.contiguous(),
        *ctx.saved_tensors,
        sum(1 << bit for bit, want in enumerate(wanted) if want),
        ctx.backend,
    )
    return (*_chosen(grads, wanted), *([None] * 6))


def _setup_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs[:3]
    grad_mask = sum(1 << bit for bit, want in enumerate(wanted) if want)
    grads = ops.bilinear_attention_pool_backward(grad.contiguous(), *ctx.saved_tensors, grad_mask, ctx.backend)
    return (*_chosen(grads, wanted), *([None] * 5))


def live_rows(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which rows of ``x (batch, rows, k)`` count, bool ``(batch, rows)``."""
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    return live if lengths is None else live & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reference_forward(
    v: Tensor,
    q: Tensor,
    h: Tensor,
    bias: Tensor | None,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    return_logits: bool,
) -> tuple[Tensor, Tensor]:
    live = live_rows(v, v_lengths, v_mask), live_rows(q, q_lengths, q_mask)
    maps, logits = reference.bilinear_attention(
        _wide(v), _wide(q), _wide(h), None if bias is None else _wide(bias), *live
    )
    return maps.to(v.dtype).contiguous(), (logits if return_logits else logits.new_empty(0)).to(v.dtype).contiguous()


def _reference_backward(
    grad_maps: Tensor | None,
    grad_logits: Tensor | None,
    maps: Tensor,
    v: Tensor,
    q: Tensor,
    h: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    live = live_rows(v, v_lengths, v_mask), live_rows(q, q_lengths, q_mask)
    with autograd_inside():
        leaves = [_wide(x.detach()).requires_grad_() for x in (v, q, h, h.new_zeros(h.shape[:1]))]
        results = reference.bilinear_attention(leaves[0], leaves[1], leaves[2], leaves[3], *live)
        given = [(x, g) for x, g in zip(results, (grad_maps, grad_logits), strict=True) if g is not None]
        grads = torch.autograd.grad(
            [x for x, _ in given], leaves, [_wide(g) for _, g in given], allow_unused=True, materialize_grads=True
        )
    return tuple(g.to(v.dtype).contiguous() if grad_mask >> bit & 1 else v.new_empty(0) for bit, g in enumerate(grads))  # type: ignore[return-value]


def _reference_pool_forward(
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
) -> Tensor:
    live = live_rows(v, v_lengths, v_mask), live_rows(q, q_lengths, q_mask)
    return reference.bilinear_attention_pool(_wide(v), _wide(q), _wide(attention), *live).to(v.dtype).contiguous()


def _reference_pool_backward(
    grad: Tensor,
    v: Tensor,
    q: Tensor,
    attention: Tensor,
    v_lengths: Tensor | None,
    q_lengths: Tensor | None,
    v_mask: Tensor | None,
    q_mask: Tensor | None,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor]:
    live = live_rows(v, v_lengths, v_mask), live_rows(q, q_lengths, q_mask)
    with autograd_inside():
        leaves = [_wide(x.detach()).requires_grad_() for x in (v, q, attention)]
        out = reference.bilinear_attention_pool(leaves[0], leaves[1], leaves[2], *live)
        grads = torch.autograd.grad(out, leaves, _wide(grad))
    return tuple(g.to(v.dtype).contiguous() if grad_mask >> bit & 1 else v.new_empty(0) for bit, g in enumerate(grads))  # type: ignore[return-value]


def _flops(v: Any, q: Any, glimpses: int) -> int:
    """Those of one product of all regions and all words for every glimpse."""
    return int(2 * v[0] * v[1] * v[2] * q[1] * glimpses)


def _flops_forward(v: Any, q: Any, h: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(v, q, h[0])


def _flops_backward(maps_grad: Any, logits_grad: Any, maps: Any, v: Any, q: Any, *args: Any, **kwargs: Any) -> int:
    grad_mask = args[5]
    return _flops(v, q, maps[1]) * (bool(grad_mask & GRAD_V) + bool(grad_mask & (GRAD_Q | GRAD_H)))


def _flops_pool_forward(v: Any, q: Any, attention: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(v, q, attention[1])


def _flops_pool_backward(grad: Any, v: Any, q: Any, attention: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(v, q, attention[1]) * sum(bool(args[4] & bit) for bit in (GRAD_V, GRAD_Q, GRAD_ATTENTION))


register_autograd("bilinear_attention_forward", _backward, setup_context=_setup_context, meaning=_reference_forward)
register_autograd(
    "bilinear_attention_pool_forward",
    _pool_backward,
    setup_context=_setup_pool_context,
    meaning=_reference_pool_forward,
)
for _name, _function, _formula in (
    ("forward", _reference_forward, _flops_forward),
    ("backward", _reference_backward, _flops_backward),
    ("pool_forward", _reference_pool_forward, _flops_pool_forward),
    ("pool_backward", _reference_pool_backward, _flops_pool_backward),
):
    _operator = f"bilinear_attention_{_name}"
    flops.register(_operator, _formula)
    register(_operator, "reference", _function)
    cpu.register_cpu(_operator)
    cuda.register_cuda(_operator)
    triton.register_triton(_operator, "fusion.triton_bilinear_attention")
register_public("bilinear_attention", "bilinear_attention_forward", canonical)
register_public("bilinear_attention_pool", "bilinear_attention_pool_forward", canonical_pool)
