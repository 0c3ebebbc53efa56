"""compact_bilinear by count sketches of one backend and Fourier transforms of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from velm_kernels.backends import cpu

# Elements of sketches of one input that are worked on at a time: enough to hide what a transform costs whatever its
# size, few enough for memory to be used again and not asked of the system anew.
ELEMENTS_ON_CPU, ELEMENTS = 2**21, 2**24


def _pieces(batch: int, regions: int, dim: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Which entries and which of their regions are worked on together."""
    rows = max(1, (ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS) // dim)
    entries, some = max(1, rows // max(1, regions)), min(rows, regions)
    for b in range(0, batch, entries):
        for r in range(0, regions, max(1, some)):
            yield slice(b, min(b + entries, batch)), slice(r, min(r + some, regions))


def _piece(x: Tensor, entries: slice, regions: slice, all_regions: int) -> Tensor:
    return x[entries, regions if x.shape[1] == all_regions else slice(0, 1)]


def compact_bilinear_forward(
    backend: str,
    x: Tensor,
    y: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    dim: int,
) -> Tensor:
    batch, regions = x.shape[0], max(x.shape[1], y.shape[1])
    out = x.new_empty((batch, regions, dim))
    for entries, some in _pieces(batch, regions, dim, x.device):
        a, b = _piece(x, entries, some, regions), _piece(y, entries, some, regions)
        spectrum_a, spectrum_b = _spectra(backend, a, b, (index_x, sign_x), (index_y, sign_y), dim)
        # Written over the larger of the two.
        larger, other = (spectrum_a, spectrum_b) if a.shape[1] >= b.shape[1] else (spectrum_b, spectrum_a)
        result = torch.fft.irfft(_multiply(backend, larger, other, larger), n=dim)
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


def _multiply(backend: str, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The products of spectra ``(entries, regions or 1, frequencies)``, summed where ``out`` has one region alone."""
    if backend == "cpu":
        cpu.op("multiply_spectra")(*(torch.view_as_real(value) for value in (a, b, out)))
    elif out.shape[1] == max(a.shape[1], b.shape[1]):
        torch.mul(a, b, out=out)
    else:
        torch.sum(a * b, 1, keepdim=True, out=out)
    return out


def compact_bilinear_backward(
    backend: str,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    dim: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    batch, regions, _ = grad.shape
    compute_dtype = sign_x.dtype
    totals = [
        value.new_zeros(value.shape if want else (0,), dtype=compute_dtype) for value, want in zip((x, y), wanted)
    ]
    # A transform back of a conjugate is the result from its end.
    places = [(index.neg() % dim).long() for index in (index_x, index_y)]
    for entries, some in _pieces(batch, regions, dim, grad.device):
        inputs = [_piece(value, entries, some, regions) for value in (x, y)]
        spectra = _spectra(backend, inputs[0], inputs[1], (index_x, sign_x), (index_y, sign_y), dim)
        spectrum = torch.fft.rfft(grad[entries, some].to(compute_dtype)).conj_physical_()
        counts = [value.shape[0] * value.shape[1] if want else 0 for value, want in zip(inputs, wanted)]
        products = spectrum.new_empty((sum(counts), dim // 2 + 1))
        shares = products.split(counts)
        for share, value, want, other in zip(shares, inputs, wanted, reversed(spectra)):
            if not want:
                continue
            _multiply(backend, spectrum, other, share.view(*value.shape[:2], -1))
        back = torch.fft.irfft(products, n=dim).split(counts)
        for total, value, want, result, place, sign in zip(totals, inputs, wanted, back, places, (sign_x, sign_y)):
            if want:
                part = result.index_select(1, place).mul_(sign).view(value.shape)
                total[entries, some if total.shape[1] == regions else slice(0, 1)] += part
    return [total.to(x.dtype) if want else None for total, want in zip(totals, wanted)]
