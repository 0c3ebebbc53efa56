"""Attention over all pairs of two sequences by a bilinear form, and the features of pairs that it pools."""

from __future__ import annotations

from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.fusion.bilinear_attention.op import ATTENTION, POOL
from velm_kernels.layout import unit_last_stride


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
    all glimpses, side by side, and meet v in one product per batch entry.

    Args:
        v: ``(batch, regions, k)``, already projected; float32, bfloat16, float16, or float64 (computed by the
            reference backend).
        q: ``(batch, words, k)``, already projected, dtype of v.
        h: ``(glimpses, k)``, dtype of v.
        bias: ``(glimpses,)``, dtype of v. The softmax does not see it; the logits do.
        v_lengths, q_lengths: ``(batch,)`` integers from 0 to regions and words: the number of leading ones that count.
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

    Example:
        >>> v, q, h = torch.randn(4, 36, 64), torch.randn(4, 14, 64), torch.randn(2, 64)
        >>> maps = velm_kernels.bilinear_attention(v, q, h, q_lengths=torch.tensor([14, 9, 3, 0]))
        >>> maps.shape
        torch.Size([4, 2, 36, 14])
        >>> [round(total) for total in maps[:, 0].sum((1, 2)).tolist()]  # the last entry has no words
        [1, 1, 1, 0]
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
    maps, logits = ATTENTION(arguments)
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
        factor: number of neighbouring features that are summed to one of the result; divides k.
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

    Example:
        >>> v, q, maps = torch.randn(4, 36, 64), torch.randn(4, 14, 64), torch.rand(4, 2, 36, 14)
        >>> velm_kernels.bilinear_attention_pool(v, q, maps).shape
        torch.Size([4, 2, 64])
    """
    if isinstance(v, Tensor):
        v, q, attention = checks.autocast(v, q, attention)
    masks = {"v_lengths": v_lengths, "q_lengths": q_lengths, "v_mask": v_mask, "q_mask": q_mask}
    arguments = canonical_pool(v, q, attention, factor=factor, **masks)
    out: Tensor = POOL(arguments)
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


ATTENTION.serves("bilinear_attention", canonical)
POOL.serves("bilinear_attention_pool", canonical_pool)
