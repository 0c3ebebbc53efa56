"""Compact bilinear pooling: the convolution of count sketches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.backends.small import ANY, in_float32, takes_torch
from velm_kernels.fusion.compact_bilinear.op import OPERATOR
from velm_kernels.layout import as_regions, with_regions

# Elements of x, y and the result up to which torch's steps are the faster ones, see velm_kernels.backends.small.
SMALL = 1 << 18


class Sketch(NamedTuple):
    """The hashes of a count sketch (Charikar et al., 2002): feature i goes to ``bucket[i]`` with ``sign[i]``.

    Attributes:
        bucket: ``(features,)``, int32 or int64, from 0 to the size of the sketch less 1.
        sign: ``(features,)``, 1 or -1, integer or floating point.
    """

    bucket: Tensor
    sign: Tensor


def make_sketch(
    features: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Sketch:
    """Random hashes of ``features`` features into ``dim``: int64 indices and float32 signs.

    Args:
        features: how many features there are.
        dim: size of the sketch.
        generator: where the random numbers come from, by default torch's own for the CPU.
        seed: instead of a generator: the same hashes whenever it is given.
        device: where they are put; they are drawn on the CPU.

    Returns:
        a :class:`Sketch` of ``bucket (features,)`` int64 from 0 to ``dim - 1`` and ``sign (features,)`` float32.

    Raises:
        TypeError: a number is no integer, ``generator`` is no generator of the CPU, or ``device`` no device.
        ValueError: a number is out of range, or both ``generator`` and ``seed`` are given.

    The hashes are those of Charikar et al. (2002): bucket and sign of a feature are drawn independently and uniformly.

    Example:
        >>> sketch = velm_kernels.make_sketch(4, 10, seed=0)
        >>> sketch.bucket.shape, sketch.bucket.dtype, sketch.sign.dtype
        (torch.Size([4]), torch.int64, torch.float32)
        >>> torch.equal(sketch.bucket, velm_kernels.make_sketch(4, 10, seed=0).bucket)
        True
    """
    checks.integer("features", features, 0, 2**31 - 1)
    checks.integer("dim", dim, 1, 2**31 - 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, given {checks.describe(generator)}")
    if seed is not None:
        checks.integer("seed", seed, -(2**63), 2**64 - 1)
        if generator is not None:
            raise ValueError(f"seed: expected None beside a generator, given {checks.describe(seed)}")
        generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, dim, (features,), generator=generator)
    sign = torch.randint(0, 2, (features,), generator=generator) * 2.0 - 1.0
    return Sketch(index.to(device), sign.to(device))


def compact_bilinear(x: Tensor, y: Tensor, sketch_x: Sketch, sketch_y: Sketch, dim: int) -> Tensor:
    """The count sketch of the outer product of x and y, without that product: the circular convolution of theirs.

    Compact bilinear pooling (Gao et al., 2016) and MCB (Fukui et al., 2016). Over random hashes the inner product of
    two results is in the mean that of the outer products: ``E <f(x, y), f(x', y')> = <x, x'> <y, y'>``.

    Args:
        x: ``(..., dx)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        y: ``(..., dy)``, dtype of x. Leading dimensions broadcast, and ``(batch, d)`` goes with ``(batch, regions,
            d)``; what is the same for all regions is transformed once.
        sketch_x, sketch_y: hashes of the features of x and of y, as :func:`velm_kernels.make_sketch` makes them; on the
            device of x.
        dim: size of the result, any.

    Under autocast x and y are cast to its dtype.

    Returns:
        ``(..., dim)`` over the broadcast leading dimensions, contiguous, in x's dtype. Sketches and transforms are
        float32 (float64 for float64).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or (on the CPU, or with VELM_CHECK=1) a bucket is not from 0
            to ``dim - 1``.

    The transforms are those of ``torch.fft``: one call for the spectra of both sketches, one back, and rows in pieces
    of bounded size. They are real ones: one complex transform of ``sketch_x + i sketch_y`` gives the same, but in
    torch it takes longer than two of half its size. The gradients are correlations with the gradient of the result, by
    one call back for both. Backward keeps x and y alone and makes their spectra again.

    Example:
        >>> sketch_x, sketch_y = (velm_kernels.make_sketch(64, 1000, seed=seed) for seed in (0, 1))
        >>> x, y = torch.randn(4, 64), torch.randn(4, 36, 64)
        >>> velm_kernels.compact_bilinear(x, y, sketch_x, sketch_y, 1000).shape
        torch.Size([4, 36, 1000])
    """
    small = plain(x, y, sketch_x, sketch_y, dim)
    if small is not None:
        return small
    if isinstance(x, Tensor):
        x, y = checks.autocast(x, y)
    arguments = canonical(x, y, sketch_x, sketch_y, dim)
    out: Tensor = OPERATOR(arguments)
    x, y = with_regions((x, y), most_dims=3)
    return out.view(*checks.broadcast_shapes(x.shape[:-1], y.shape[:-1]), dim)


def plain(x: Tensor, y: Tensor, sketch_x: Sketch, sketch_y: Sketch, dim: int) -> Tensor | None:
    """The result of a small call by torch's own steps, whose spectra backward keeps, or None."""
    if not takes_torch(SMALL, x, y, dtype=ANY, recorded=SMALL) or dim.__class__ is not int or dim < 1:
        return None
    if not 0 < x.dim() <= y.dim() or 0 in x.shape or 0 in y.shape:
        return None
    if x.shape[:-1] != y.shape[:-1]:
        if x.dim() != 2 or y.dim() != 3 or len(x) != len(y):
            return None
        x = x[:, None]
    if (y.numel() // y.shape[-1]) * dim > SMALL:
        return None
    if not (_is_sketch_of(x, sketch_x) and _is_sketch_of(y, sketch_y)):
        return None
    spectra = [_small_spectrum(*one, dim) for one in ((x, sketch_x), (y, sketch_y))]
    if spectra[0] is None or spectra[1] is None:
        return None
    return torch.fft.irfft(spectra[0] * spectra[1], n=dim).to(x.dtype)


def _is_sketch_of(x: Tensor, sketch: Sketch) -> bool:
    if not isinstance(sketch, tuple) or len(sketch) != 2:
        return False
    bucket, sign = sketch
    if not takes_torch(SMALL, bucket, dtype=torch.int64) or not takes_torch(SMALL, sign):
        return False
    return bucket.shape == sign.shape == x.shape[-1:]


def _small_spectrum(x: Tensor, sketch: Sketch, dim: int) -> Tensor | None:
    bucket, sign = sketch
    x = in_float32(x) * sign
    try:
        # It looks at the indices, in any case.
        sketched = x.new_zeros((*x.shape[:-1], dim)).scatter_add(-1, bucket.expand(x.shape), x)
    except RuntimeError:
        return None
    return torch.fft.rfft(sketched)


def canonical(x: Tensor, y: Tensor, sketch_x: Sketch, sketch_y: Sketch, dim: int) -> Arguments:
    """Checks the arguments of :func:`compact_bilinear` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    checks.dtype_in("y", checks.tensor("y", y), (x.dtype,))
    checks.same_device("y", y, "x", x)
    checks.integer("dim", dim, 1, 2**31 - 1)
    if x.dim() == 0:
        raise ValueError("x: expected (..., dx), given ()")
    given = tuple(y.shape)
    x, y = with_regions((x, y), most_dims=3)
    try:
        if y.dim() == 0:
            raise RuntimeError
        leading = checks.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"y: expected (..., dy) with leading dimensions that broadcast with those of x {tuple(x.shape)}, "
            f"given {given}"
        ) from None
    return {
        "x": as_regions(x, leading[:-1], leading[-1:]),
        "y": as_regions(y, leading[:-1], leading[-1:]),
        **_hashes("x", sketch_x, x),
        **_hashes("y", sketch_y, y),
        "dim": dim,
    }


def _hashes(name: str, sketch: Sketch, x: Tensor) -> dict[str, Tensor]:
    if not isinstance(sketch, tuple) or len(sketch) != 2:
        raise TypeError(f"sketch_{name}: expected a Sketch (bucket, sign), given {checks.describe(sketch)}")
    index, sign = checks.tensor(f"sketch_{name}.bucket", sketch[0]), checks.tensor(f"sketch_{name}.sign", sketch[1])
    checks.dtype_in(f"sketch_{name}.bucket", index, (torch.int32, torch.int64))
    checks.dtype_in(f"sketch_{name}.sign", sign, checks.FLOAT_DTYPES + checks.INTEGER_DTYPES)
    for part, value in (("bucket", index), ("sign", sign)):
        checks.shape(f"sketch_{name}.{part}", value, f"the features of {name}", x.shape[-1:])
        checks.same_device(f"sketch_{name}.{part}", value, name, x)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return {f"index_{name}": checks.as_int32(index), f"sign_{name}": sign.to(compute_dtype).contiguous()}


OPERATOR.serves("compact_bilinear", canonical, plain)
