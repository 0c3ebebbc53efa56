"""Compact bilinear pooling: the convolution of count sketches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import ON_REQUEST, ORDER, Arguments, reasons_against, register, register_public
from velm_kernels.backends.direct import call, ops
from velm_kernels.backends.library import declare, register_autograd
from velm_kernels.backends.small import ANY, takes_torch, wide
from velm_kernels.fusion.compact_bilinear import reference
from velm_kernels.fusion.count_sketches.op import OPERATOR as COUNT_SKETCHES
from velm_kernels.fusion.count_sketches.reference import count_sketch
from velm_kernels.layout import unit_last_stride

GRAD_X, GRAD_Y = 1, 2
# Elements of sketches of one input that are worked on at a time: enough to hide what a transform costs whatever its
# size, few enough for memory to be used again and not asked of the system anew.
ELEMENTS_ON_CPU, ELEMENTS = 2**21, 2**24
# Elements of x, y and the result up to which torch's steps are the faster ones, see velm_kernels.backends.small.
SMALL = 1 << 18


class Sketch(NamedTuple):
    """The hashes of a count sketch (Charikar et al., 2002): feature i goes to ``bucket[i]`` with ``sign[i]``.

    ``bucket (features,)`` int32 or int64 from 0 to the size of the sketch, ``sign (features,)`` 1 or -1, integer
    or floating point.
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
        generator: where the random numbers come from, by default torch's own for the CPU.
        seed: instead of a generator: the same hashes whenever it is given.
        device: where they are put; they are drawn on the CPU.
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
    """
    small = plain(x, y, sketch_x, sketch_y, dim)
    if small is not None:
        return small
    if isinstance(x, Tensor):
        x, y = checks.autocast(x, y)
    arguments = canonical(x, y, sketch_x, sketch_y, dim)
    out: Tensor = call("compact_bilinear_forward", arguments)
    x, y = _same_dims(x, y)
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
    x = wide(x) * sign
    try:
        # It looks at the indices, in any case.
        sketched = x.new_zeros((*x.shape[:-1], dim)).scatter_add(-1, bucket.expand(x.shape), x)
    except RuntimeError:
        return None
    return torch.fft.rfft(sketched)


def _same_dims(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if {x.dim(), y.dim()} == {2, 3}:
        return x[:, None] if x.dim() == 2 else x, y[:, None] if y.dim() == 2 else y
    return x, y


def canonical(x: Tensor, y: Tensor, sketch_x: Sketch, sketch_y: Sketch, dim: int) -> Arguments:
    """Checks the arguments of :func:`compact_bilinear` and returns those of the operator."""
    checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
    checks.dtype_in("y", checks.tensor("y", y), (x.dtype,))
    checks.same_device("y", y, "x", x)
    checks.integer("dim", dim, 1, 2**31 - 1)
    if x.dim() == 0:
        raise ValueError("x: expected (..., dx), given ()")
    given = tuple(y.shape)
    x, y = _same_dims(x, y)
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
        "x": _rows(x, leading),
        "y": _rows(y, leading),
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
    wide = torch.promote_types(x.dtype, torch.float32)
    return {f"index_{name}": checks.as_int32(index), f"sign_{name}": sign.to(wide).contiguous()}


def _rows(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """``(batch, regions, features)``, or ``(batch, 1, features)`` where it is the same for all regions."""
    regions, batch = leading[-1] if leading else 1, 1
    for size in leading[:-1]:
        batch = batch * size
    if regions != 1 and x.shape[-2:-1] in ((), (1,)) and regions:
        x = x.expand(*leading[:-1], 1, x.shape[-1]).reshape(batch, 1, x.shape[-1])
    else:
        x = x.expand(*leading, x.shape[-1]).reshape(batch, regions, x.shape[-1])
    return unit_last_stride(x)


def _most_regions(x: Tensor, y: Tensor) -> int:
    return max(x.shape[1], y.shape[1])


def _fake_forward(
    x: Tensor, y: Tensor, index_x: Tensor, sign_x: Tensor, index_y: Tensor, sign_y: Tensor, dim: int, backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], _most_regions(x, y), dim))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    grad_mask: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if grad_mask & GRAD_X else (0,)), y.new_empty(y.shape if grad_mask & GRAD_Y else (0,))


def _check_values(arguments: Arguments) -> None:
    for name in ("index_x", "index_y"):
        checks.values_between(f"sketch_{name[-1]}.bucket", arguments[name], 0, arguments["dim"] - 1)


# x: (batch, regions, dx) or (batch, 1, dx), y the same with dy, one dtype, last stride 1; index: int32, sign: float32,
# contiguous, of the features. Results and gradients are contiguous.
_INPUTS = "Tensor x, Tensor y, Tensor index_x, Tensor sign_x, Tensor index_y, Tensor sign_y"
declare("compact_bilinear_forward", f"{_INPUTS}, SymInt dim", "Tensor", fake=_fake_forward, check=_check_values)
declare("compact_bilinear_backward", f"Tensor grad, {_INPUTS}, int grad_mask", "(Tensor, Tensor)", fake=_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, wants_y = ctx.needs[:2]
    grad_x, grad_y = ops.compact_bilinear_backward(
        grad.contiguous(), *ctx.saved_tensors, GRAD_X * wants_x + GRAD_Y * wants_y, ctx.backend
    )
    return grad_x if wants_x else None, grad_y if wants_y else None, *([None] * 6)


def _meaning(
    x: Tensor, y: Tensor, index_x: Tensor, sign_x: Tensor, index_y: Tensor, sign_y: Tensor, dim: int
) -> Tensor:
    wide = sign_x.dtype
    sketches = (index_x.long(), sign_x), (index_y.long(), sign_y)
    if not x.shape[0] * _most_regions(x, y):
        # Transforms do not take nothing.
        a, b = (count_sketch(value.to(wide), *s, dim) for value, s in zip((x, y), sketches, strict=True))
        return (a * b).to(x.dtype)
    return reference.compact_bilinear(x.to(wide), y.to(wide), *sketches, dim).to(x.dtype).contiguous()


def _pieces(batch: int, regions: int, dim: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Which entries and which of their regions are worked on together."""
    rows = max(1, (ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS) // dim)
    entries, some = max(1, rows // max(1, regions)), min(rows, regions)
    for b in range(0, batch, entries):
        for r in range(0, regions, max(1, some)):
            yield slice(b, min(b + entries, batch)), slice(r, min(r + some, regions))


def _piece(x: Tensor, entries: slice, regions: slice, all_regions: int) -> Tensor:
    return x[entries, regions if x.shape[1] == all_regions else slice(0, 1)]


def _forward_by(
    backend: str,
    x: Tensor,
    y: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    dim: int,
) -> Tensor:
    batch, regions = x.shape[0], _most_regions(x, y)
    out = x.new_empty((batch, regions, dim))
    for entries, some in _pieces(batch, regions, dim, x.device):
        a, b = _piece(x, entries, some, regions), _piece(y, entries, some, regions)
        spectrum_a, spectrum_b = _spectra(backend, a, b, (index_x, sign_x), (index_y, sign_y), dim)
        # Written over the larger of the two.
        larger, other = (spectrum_a, spectrum_b) if a.shape[1] >= b.shape[1] else (spectrum_b, spectrum_a)
        result = torch.fft.irfft(larger.mul_(other), n=dim)
        if result.shape == out.shape and result.dtype == out.dtype:
            return result
        out[entries, some] = result
    return out


def _spectra(
    backend: str, x: Tensor, y: Tensor, hashes_x: tuple[Tensor, Tensor], hashes_y: tuple[Tensor, Tensor], dim: int
) -> tuple[Tensor, Tensor]:
    """The transforms of the sketches of ``(entries, regions, features)``: ``(entries, regions, dim // 2 + 1)``."""
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)
    sketches = torch.ops.velm.count_sketches_forward(rows_x, *hashes_x, rows_y, *hashes_y, dim, backend)
    a, b = torch.fft.rfft(sketches).split([len(rows_x), len(rows_y)])
    return a.unflatten(0, x.shape[:2]), b.unflatten(0, y.shape[:2])


def _backward_by(
    backend: str,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    grad_mask: int,
) -> tuple[Tensor, Tensor]:
    batch, regions, dim = grad.shape
    wide = sign_x.dtype
    wanted = [bool(grad_mask & bit) for bit in (GRAD_X, GRAD_Y)]
    totals = [value.new_zeros(value.shape if want else (0,), dtype=wide) for value, want in zip((x, y), wanted)]
    # A transform back of a conjugate is the result from its end.
    places = [(index.neg() % dim).long() for index in (index_x, index_y)]
    for entries, some in _pieces(batch, regions, dim, grad.device):
        inputs = [_piece(value, entries, some, regions) for value in (x, y)]
        spectra = _spectra(backend, inputs[0], inputs[1], (index_x, sign_x), (index_y, sign_y), dim)
        spectrum = torch.fft.rfft(grad[entries, some].to(wide)).conj_physical_()
        counts = [value.shape[0] * value.shape[1] if want else 0 for value, want in zip(inputs, wanted)]
        products = spectrum.new_empty((sum(counts), dim // 2 + 1))
        shares = products.split(counts)
        for share, value, want, other in zip(shares, inputs, wanted, reversed(spectra)):
            if not want:
                continue
            share = share.view(*value.shape[:2], -1)
            if value.shape[1] == spectrum.shape[1]:
                torch.mul(spectrum, other, out=share)
            else:
                torch.sum(spectrum * other, 1, keepdim=True, out=share)
        back = torch.fft.irfft(products, n=dim).split(counts)
        for total, value, want, result, place, sign in zip(totals, inputs, wanted, back, places, (sign_x, sign_y)):
            if want:
                part = result.index_select(1, place).mul_(sign).view(value.shape)
                total[entries, some if total.shape[1] == regions else slice(0, 1)] += part
    return totals[0].to(x.dtype), totals[1].to(y.dtype)


def _register(backend: str) -> None:
    def forward(*args: Any) -> Tensor:
        return _forward_by(backend, *args)

    def backward(*args: Any) -> tuple[Tensor, Tensor]:
        return _backward_by(backend, *args)

    def reasons(arguments: Arguments) -> list[str]:
        names = ("x", "index_x", "sign_x", "y", "index_y", "sign_y")
        return reasons_against(COUNT_SKETCHES.forward, {name: arguments[name] for name in names}, backend)[backend]

    register("compact_bilinear_forward", backend, forward, reasons)
    register("compact_bilinear_backward", backend, backward, reasons)


register_autograd("compact_bilinear_forward", _backward, setup_context=_setup_context, meaning=_meaning)
for _backend in ORDER + ON_REQUEST:
    _register(_backend)
register_public("compact_bilinear", "compact_bilinear_forward", canonical, plain)
