"""The embedding of patches of pictures and films, as the product that it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import register_composed
from velm_kernels.backends.small import ANY, takes_torch
from velm_kernels.linear.linear import linear
from velm_kernels.processors import NEVER
from velm_kernels.products import own_product_of

LAYOUTS = ("tokens", "channels_first")


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor | None = None, layout: str = "tokens") -> Tensor:
    """The convolution whose stride is its kernel, by which vision transformers embed patches, as one product.

    Args:
        pixels: pictures ``(batch, channels, height, width)``, or films ``(batch, channels, frames, height, width)``, of
            any strides, with as many dimensions as weight; what is left over behind the last whole patch is not read,
            as in a convolution without padding. Or, with any other number of dimensions, patches that are rows already,
            ``(..., channels * prod(patch))``, as the processors of Qwen2-VL and SigLIP 2 hand them over. float32,
            bfloat16, float16, or float64 (computed by the reference backend).
        weight: ``(embed, channels, *patch)``, dtype of pixels: that of a ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``
            with ``stride = kernel_size``. ``(embed, features)``, as of a ``torch.nn.Linear``, for patches that are
            rows.
        bias: ``(embed,)``, dtype of pixels.
        layout: ``"tokens"``: ``(batch, tokens, embed)``, patches row by row, of films frame by frame.
            ``"channels_first"``: that of the convolution, ``(batch, embed, height / patch, width / patch)``; a view of
            the tokens, with the strides of ``torch.channels_last``. Only of pictures and films.

    Under autocast pixels, weight and bias are cast to its dtype.

    Returns:
        The embeddings in the dtype of pixels: of pictures and films in ``layout``, of rows ``(..., embed)``. Products
        accumulate in float32.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, a picture is smaller than a patch, or ``layout`` is unknown.

    This is the embedding of Dosovitskiy et al. (2021, section 3.1), and of films that of Arnab et al. (2021, section
    3.2). Patches of pictures are gathered by one copy, which takes 6 to 8 % of the time of the product in float32 and a
    quarter in bfloat16; it is kept for the gradient of weight. Patches that lie in memory as rows are not copied. Then
    it is :func:`velm_kernels.linear`, with its gradients.

    Example:
        >>> pictures, weight = torch.randn(2, 3, 224, 224), torch.randn(768, 3, 16, 16)
        >>> velm_kernels.patch_embed(pictures, weight).shape
        torch.Size([2, 196, 768])
    """
    found = plain(pixels, weight, bias, layout)
    if found is not None:
        return found
    checks.choice("layout", layout, LAYOUTS)
    if checks.tensor("weight", weight).dim() not in (2, 3, 4, 5):
        raise ValueError(
            f"weight: expected (embed, channels, *patch) or (embed, features), given {tuple(weight.shape)}"
        )
    pixels, weight, bias = checks.autocast(pixels, weight, bias)
    checks.dtype_in("pixels", checks.tensor("pixels", pixels), checks.FLOAT_DTYPES)
    checks.dtype_in("weight", weight, (pixels.dtype,))
    checks.same_device("weight", weight, "pixels", pixels)
    if bias is not None:
        checks.dtype_in("bias", checks.tensor("bias", bias), (pixels.dtype,))
        checks.same_device("bias", bias, "pixels", pixels)
        checks.shape("bias", bias, "(embed,)", weight.shape[:1])
    patch = weight.shape[2:]
    if not patch or pixels.dim() != weight.dim():
        if layout != "tokens":
            raise ValueError(f'layout: expected "tokens" of patches that are rows, given "{layout}"')
        if pixels.dim() == 0 or pixels.shape[-1] != math.prod(weight.shape[1:]):
            also = f", or (batch, channels, *sizes) with {weight.dim()} dimensions" if patch else ""
            raise ValueError(
                f"pixels: expected (..., {math.prod(weight.shape[1:])}) of weight {tuple(weight.shape)}{also}, "
                f"given {tuple(pixels.shape)}"
            )
        return linear(pixels, weight.flatten(1), bias)
    if pixels.shape[1] != weight.shape[1] or any(size < least for size, least in zip(pixels.shape[2:], patch)):
        raise ValueError(
            f"pixels: expected (batch, {weight.shape[1]}, *sizes) with sizes of at least {tuple(patch)} of weight "
            f"{tuple(weight.shape)}, given {tuple(pixels.shape)}"
        )
    if 0 in patch:
        raise ValueError(f"weight: expected a patch without 0, given {tuple(weight.shape)}")
    # Channels last where weight has them so, which then is a matrix as it lies; pixels often are in the same memory.
    last = weight.dim() > 3 and weight.stride(1) == 1 and not weight.is_contiguous()
    rows, counts = gathered(pixels, patch, last)
    out = linear(rows, weight.movedim(1, -1).flatten(1) if last else weight.flatten(1), bias)
    return out if layout == "tokens" else out.transpose(1, 2).unflatten(2, counts)


def gathered(pixels: Tensor, patch: Sequence[int], channels_last: bool = False) -> tuple[Tensor, list[int]]:
    """The patches of ``pixels (batch, channels, *sizes)`` as rows ``(batch, tokens, channels * prod(patch))``, and how
    many there are along each size. A view where memory has them so."""
    batch, channels, *sizes = pixels.shape
    counts = [size // one for size, one in zip(sizes, patch)]
    tokens, features = 1, channels
    # From behind: an unflattened dimension moves what follows it.
    for place in reversed(range(len(counts))):
        count, one = counts[place], patch[place]
        tokens, features = tokens * count, features * one
        pixels = pixels.narrow(2 + place, 0, count * one).unflatten(2 + place, (count, one))
    order = [1, *range(3, pixels.dim(), 2)]
    if channels_last:
        order = [*order[1:], 1]
    return pixels.permute(0, *range(2, pixels.dim(), 2), *order).reshape(batch, tokens, features), counts


def plain(pixels: Tensor, weight: Tensor, bias: Tensor | None = None, layout: str = "tokens") -> Tensor | None:
    """The convolution itself where it is faster than a copy of all patches, or None: see :func:`_convolves`."""
    tensors = (pixels, weight) if bias is None else (pixels, weight, bias)
    if not takes_torch(NEVER, *tensors, dtype=ANY) or layout.__class__ is not str or layout not in LAYOUTS:
        return None
    if pixels.dim() != weight.dim() or weight.dim() != 4 or pixels.shape[1] != weight.shape[1]:
        return None
    patch = height, width = weight.shape[2:]
    if not (0 < height <= pixels.shape[2] and 0 < width <= pixels.shape[3]) or 0 in weight.shape:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if not _convolves(pixels, weight, torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return None
    out = torch.nn.functional.conv2d(pixels, weight, bias, patch)
    return out if layout == "channels_first" else out.flatten(2).transpose(1, 2).contiguous()


def _convolves(pixels: Tensor, weight: Tensor, recorded: bool) -> bool:
    """Whether a convolution by torch takes less time than a copy and a product.

    Of more channels a copy of few pixels at a time takes longer than what the product saves. A convolution reads
    channels_last where it lies, and where there are few pixels, or without a gradient few features, that is more than
    the product saves.
    """
    embed, channels, _, width = weight.shape
    if own_product_of(pixels.shape[0], pixels.dtype):
        return False
    if channels > 1 and pixels.stride(1) == 1:
        # A patch of a pixel is a row as it lies.
        return 1 < width < (8 if recorded or embed >= 768 else NEVER)
    return channels > 4 and 1 < width < (4 if recorded else 8)


register_composed(patch_embed, plain)
