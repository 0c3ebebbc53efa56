"""Pooling over tokens: ``masked_pool`` of padded rows or pixels and ``segment_pool`` of packed ones."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, in_float32, takes_torch, values_of
from velm_kernels.layout import product, unit_last_stride
from velm_kernels.pooling.pool.op import OPERATOR
from velm_kernels.pooling.pool.reference import MODES
from velm_kernels.pooling.tokens import checked_cu_seqlens, checked_integers, checked_mask
from velm_kernels.processors import NEVER

# Elements of x up to which torch's form is the faster one, without a gradient and with one, see
# velm_kernels.backends.small; rows shorter than others.
SMALL = {
    "mean": (1 << 18, 1 << 18),
    "sum": (1 << 18, 1 << 18),
    "max": (1 << 16, 1 << 17),
    "logsumexp": (1 << 15, 1 << 17),
}
# The same where rows of the mean or sum have different lengths: torch's form hides what is not read beforehand.
SMALL_RAGGED = 1 << 13, 1 << 17
FEW_ROWS = 16
# A number would become a tensor at every call.
_ZERO = torch.zeros(())
# The same for segments, and for one alone.
SMALL_SEGMENTS, SMALL_SEGMENT = 1 << 19, 1 << 20


def masked_pool(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Tensor:
    """Pools the tokens of each row that are not padding, in one pass that reads no others.

    - ``"mean"``, ``"sum"``: their mean and sum;
    - ``"max"``: their largest, for each feature; NaN where one of them is NaN. The gradient goes to the first of equal
      ones;
    - ``"logsumexp"``: ``log(sum(exp(x)))``;
    - ``"gem"``: the generalised mean ``mean(max(x, 1e-6)^p)^(1/p)`` (Radenovic et al., 2018, eq. 3), computed as
      ``m mean((max(x, 1e-6) / m)^p)^(1/p)`` with the largest value m, so that no power overflows: ``p`` may be 1000.

    Over no token at all the result is 0 in every mode, and passes nothing back. NaN and infinity in tokens that count
    come out where the formulas have them, in the feature that holds them.

    Args:
        x: ``(..., tokens, dim)``, floating point. With ``channels_first``: ``(batch, dim, *spatial)``, whose tokens are
            the pixels in row-major order; read without a copy, also in ``torch.channels_last``.
        lengths: ``(...)`` (with ``channels_first`` ``(batch,)``), integers from 0 to tokens: the number of leading
            tokens that count.
        mask: bool, broadcastable to ``(..., tokens)`` (``(batch, *spatial)``); tokens where it is False do not count.
            They may hold NaN and get gradient 0.
        mode: as above.
        p: power of ``"gem"``, greater than 0.
        channels_first: see ``x``.

    Returns:
        ``(..., dim)`` (``(batch, dim)``), contiguous, in x's dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device, ``mode``, ``p`` or (on the CPU, or with VELM_CHECK=1) a length is not as above.

    Backward keeps ``x`` for ``"logsumexp"`` and ``"gem"`` alone; for ``"max"`` an index for each element of the result.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [float("nan")]]])  # (batch, tokens, dim)
        >>> velm_kernels.masked_pool(x, torch.tensor([2]))
        tensor([[2.]])
        >>> velm_kernels.masked_pool(x, mask=torch.tensor([[False, True, False]]), mode="max")
        tensor([[3.]])
    """
    small = plain_masked(x, lengths, mask, mode, p, channels_first=channels_first)
    if small is not None:
        return small
    arguments = canonical_masked(x, lengths, mask, mode, p, channels_first=channels_first)
    out, _ = OPERATOR(arguments)
    leading, dim = (x.shape[:1], x.shape[1]) if channels_first else (x.shape[:-2], x.shape[-1])
    return out.view(*leading, dim)


def plain_masked(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Tensor | None:
    if channels_first is not False or p.__class__ is not float or mode.__class__ is not str:
        return None
    limits = SMALL.get(mode)
    if limits is None or not takes_torch(limits[0], x, dtype=ANY, recorded=limits[1]):
        return None
    shape = x.shape
    if len(shape) < 2 or 0 in shape or not x.is_contiguous():
        return None
    if mask is not None:
        # Rows without a token, which cannot be told sooner than computed, have no gradient in the other modes.
        if lengths is not None or mode not in ("mean", "sum") or not takes_torch(NEVER, mask, dtype=torch.bool):
            return None
        if mask.shape != shape[:-1] or x.numel() > SMALL_RAGGED[torch.is_grad_enabled() and x.requires_grad]:
            return None
        return _of_shown(x, mask, mask.sum(-1, keepdim=True).clamp_min_(1), mode)
    if lengths is None:
        return _of_tokens(x, mode)
    known = values_of(lengths)
    if known is None or lengths.shape != shape[:-2]:
        return None
    tokens, least, most = shape[-2], min(known), max(known)
    if least < 0 or most > tokens:
        return None
    if least == most:
        return _of_tokens(x if most == tokens else x.narrow(-2, 0, most), mode if most else "sum")
    if mode in ("mean", "sum"):
        if x.numel() > SMALL_RAGGED[torch.is_grad_enabled() and x.requires_grad]:
            return None
    elif least == 0:
        return None
    short = [(row, length) for row, length in enumerate(known) if length < tokens]
    if len(short) > FEW_ROWS:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        shown = torch.arange(tokens, device=x.device) < lengths.unsqueeze(-1)
        if mode in ("mean", "sum"):
            return _of_shown(x, shown, _counts(lengths, least), mode)
        return _of_tokens(torch.where(shown.unsqueeze(-1), x, -torch.inf), mode)
    # Sooner than any mask.
    filled = x.clone()
    rows, filling = filled.view(-1, *shape[-2:]), 0.0 if mode in ("mean", "sum") else -torch.inf
    for row, length in short:
        rows[row, length:] = filling
    if mode != "mean":
        return _of_tokens(filled, mode)
    return (filled.sum(-2, dtype=torch.float32) / _counts(lengths, least)).to(x.dtype)


def _counts(lengths: Tensor, least: int) -> Tensor:
    """By what the sums of rows of these lengths are divided; the shortest has the length ``least``."""
    return lengths.unsqueeze(-1) if least else lengths.unsqueeze(-1).clamp(min=1)


def _of_shown(x: Tensor, shown: Tensor, counts: Tensor, mode: str) -> Tensor:
    """The mean or sum of the tokens where ``shown`` is True, ``counts`` of them."""
    seen = torch.where(shown.unsqueeze(-1), x, _ZERO)
    if mode == "sum":
        return seen.sum(-2)
    if x.dtype is torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        # As in plain torch, and without gradients in two dtypes.
        return seen.sum(-2) / counts
    return (seen.sum(-2, dtype=torch.float32) / counts).to(x.dtype)


def _of_tokens(x: Tensor, mode: str) -> Tensor:
    if mode == "mean":
        return x.mean(-2)
    if mode == "sum":
        return x.sum(-2)
    if mode == "logsumexp":
        return in_float32(x).logsumexp(-2).to(x.dtype)
    # The gradient goes to the first of equal ones.
    return x.max(-2).values if torch.is_grad_enabled() and x.requires_grad else x.amax(-2)


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor:
    """Pools each run of packed tokens: row s of the result is over ``x[cu_seqlens[s]:cu_seqlens[s + 1]]``.

    Args:
        x: ``(tokens, dim)``, floating point.
        cu_seqlens: ``(segments + 1,)`` integers from 0 to tokens, none less than the one before. Segments may be empty.
        mode, p: as in :func:`masked_pool`.

    Returns:
        ``(segments, dim)``, contiguous, in x's dtype; 0 for empty segments.

    Raises:
        TypeError, ValueError: as :func:`masked_pool`; also for ``cu_seqlens`` that do not fit ``x``.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [5.0]])  # (tokens, dim)
        >>> velm_kernels.segment_pool(x, torch.tensor([0, 2, 2, 3]))  # the second segment is empty
        tensor([[2.],
                [0.],
                [5.]])
    """
    small = plain_segments(x, cu_seqlens, mode, p)
    if small is not None:
        return small
    arguments = canonical_segments(x, cu_seqlens, mode, p)
    out: Tensor = OPERATOR(arguments)[0]
    return out


def plain_segments(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Tensor | None:
    if (
        mode.__class__ is not str
        or mode not in ("mean", "sum")
        or p.__class__ is not float
        or not takes_torch(SMALL_SEGMENT, x, dtype=ANY, recorded=SMALL_SEGMENT)
    ):
        return None
    bounds = values_of(cu_seqlens)
    if bounds is None or x.dim() != 2 or cu_seqlens.dim() != 1 or len(bounds) < 2 or 0 in x.shape:
        return None
    tokens = x.shape[0]
    if bounds[0] != 0 or bounds[-1] != tokens or not all(map(operator.le, bounds, bounds[1:])):
        return None
    if len(bounds) == 2:
        return x.mean(0, True) if mode == "mean" else x.sum(0, True)
    if x.numel() > SMALL_SEGMENTS:
        return None
    lengths = cu_seqlens.diff().long()
    given = in_float32(x)
    index = torch.repeat_interleave(lengths, output_size=tokens)
    out = given.new_zeros(len(lengths), x.shape[1]).index_add(0, index, given)
    if mode == "mean":
        out = out / lengths.clamp(min=1).unsqueeze(-1)
    return out.to(x.dtype)


def checked_mode(mode: str, p: float) -> tuple[int, float]:
    checks.choice("mode", mode, MODES)
    return MODES.index(mode), checks.number("p", p, 1e-3, 1e3, described="a power from 0.001 to 1000")


def canonical_masked(
    x: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "mean",
    p: float = 3.0,
    *,
    channels_first: bool = False,
) -> Arguments:
    """Checks the arguments of :func:`masked_pool` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    number, p = checked_mode(mode, p)
    if checks.flag("channels_first", channels_first):
        if x.dim() < 3:
            raise ValueError(f"x: expected (batch, dim, *spatial), given {tuple(x.shape)}")
        leading, spatial = tuple(x.shape[:1]), tuple(x.shape[2:])
        tokens, dim = product(spatial), x.shape[1]
        rows = x.reshape(x.shape[0], dim, tokens).transpose(1, 2)
    else:
        if x.dim() < 2:
            raise ValueError(f"x: expected (..., tokens, dim), given {tuple(x.shape)}")
        leading, spatial = tuple(x.shape[:-2]), (x.shape[-2],)
        tokens, dim = x.shape[-2:]
        rows = x if len(leading) == 1 else x.reshape(product(leading), tokens, dim)
    if lengths is not None:
        lengths = checked_integers("lengths", lengths, x, "the leading dimensions of x", leading)
    if mask is not None:
        layout = "(batch, *spatial)" if channels_first else "(..., tokens)"
        mask = checked_mask(mask, x, layout, leading + spatial, rows.shape[0], tokens)
    # Which of the two last strides is 1; with one column or one token either may be said to be.
    by_token = False
    if rows.stride(2) != 1 and dim > 1:
        by_token = rows.stride(1) == 1
        if not by_token:
            rows = rows.contiguous()
    return {
        "x": rows,
        "lengths": lengths,
        "mask": mask,
        "cu_seqlens": None,
        "tokens_contiguous": by_token,
        "mode": number,
        "p": p,
    }


def canonical_segments(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", p: float = 3.0) -> Arguments:
    """Checks the arguments of :func:`segment_pool` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x, dims=2, layout="(tokens, dim)"), checks.FLOAT_DTYPES)
    number, p = checked_mode(mode, p)
    return {
        "x": unit_last_stride(x),
        "lengths": None,
        "mask": None,
        "cu_seqlens": checked_cu_seqlens(cu_seqlens, x),
        "tokens_contiguous": False,
        "mode": number,
        "p": p,
    }


OPERATOR.serves("masked_pool", canonical_masked, plain_masked)
OPERATOR.serves("segment_pool", canonical_segments, plain_segments)
