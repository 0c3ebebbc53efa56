"""Checks of what losses over pairs of images and texts are given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends.small import PLAIN, takes_torch
from velm_kernels.layout import unit_last_stride


def rows(
    image: Any,
    text: Any,
    names: tuple[str, str] = ("image", "text"),
    counts: tuple[str, str] = ("images", "texts"),
) -> tuple[Tensor, Tensor]:
    """``(images, d)`` and ``(texts, d)`` in one dtype, neighbours in a row next to each other."""
    if not checks.ordinary(image, text):
        checks.tensor(names[0], image)
        checks.tensor(names[1], text)
        image, text = checks.autocast(image, text)
        checks.dtype_in(names[0], image, checks.FLOAT_DTYPES)
        checks.dtype_in(names[1], text, (image.dtype,))
        checks.same_device(names[1], text, names[0], image)
    checks.tensor(names[0], image, dims=2, layout=f"({counts[0]}, d)")
    if text.dim() != 2 or text.shape[1] != image.shape[1]:
        raise ValueError(f"{names[1]}: expected ({counts[1]}, d) with d = {image.shape[1]}, given {tuple(text.shape)}")
    return unit_last_stride(image), unit_last_stride(text)


def as_many(image: Tensor, text: Tensor, names: tuple[str, str] = ("image", "text")) -> None:
    """Where each image belongs to one text, there is one for each."""
    if image.shape[0] != text.shape[0]:
        raise ValueError(
            f"{names[1]}: expected as many rows as {names[0]} = {image.shape[0]}, given {tuple(text.shape)}"
        )


def factor(name: str, value: Any, image: Tensor, of: str = "image") -> Tensor:
    """A number, or a tensor of one element, as a scalar tensor in float32 or wider on the device of ``image``."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    if isinstance(value, Tensor):
        checks.tensor(name, value)
        checks.dtype_in(name, value, checks.FLOAT_DTYPES)
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, given {tuple(value.shape)}")
        # As torch's own operators take a scalar tensor of the CPU.
        if value.dim() or not value.is_cpu or image.is_meta:
            checks.same_device(name, value, of, image)
        return value.reshape(()).to(device=image.device, dtype=dtype)
    number = checks.number(name, value, -1e30, 1e30, described="a finite number")
    return torch.full((), number, dtype=dtype, device=image.device)


# Elements of what small calls are given: above, work is that of the products.
_MOST = 1 << 20


def small_scores(
    image: Any, text: Any, scale: Any, bias: Any = None, *, normalize: bool = False, most: int, recorded: int
) -> Tensor | None:
    """``scale * image @ text^T + bias`` by torch for at most ``most`` pairs, ``recorded`` where a gradient is, in a
    small call (:mod:`velm_kernels.backends.small`); else None. It is laid out as ``(images, texts)``, float32."""
    if image.__class__ not in PLAIN or image.dim() != 2 or not 0 < image.shape[0] <= max(most, recorded):
        return None
    tensors = [image, text]
    for value in (scale, 0.0 if bias is None else bias):
        if value.__class__ in PLAIN:
            if value.dim() != 0:
                return None
            tensors.append(value)
        elif value.__class__ not in (float, int) or not abs(value) < 1e9:
            return None
    if not takes_torch(_MOST, *tensors, recorded=_MOST) or text.shape != image.shape:
        return None
    if image.shape[0] > most and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return None
    if normalize is True:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    elif normalize is not False:
        return None
    scores = scale * (image @ text.t())
    return scores if bias is None else scores + bias


def small_losses(scores: Tensor) -> Tensor:
    """``-log sigmoid`` of what matches and of the negative of all others, pairs on the diagonal."""
    return F.softplus(scores * (1.0 - 2.0 * torch.eye(scores.shape[0])))


def labels(given: Any, image: Tensor, sizes: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Labels of images and of texts as int32: numbers from 0 on, the same for the same label; -1 for negative ones."""
    if given is None:
        return None, None
    both = isinstance(given, tuple)
    if both and len(given) != 2:
        raise ValueError(f"labels: expected one tensor or two, given {checks.describe(given)}")
    found = []
    for n, one in enumerate(given if both else (given,)):
        name = f"labels[{n}]" if both else "labels"
        checks.dtype_in(name, checks.tensor(name, one), checks.INTEGER_DTYPES)
        checks.shape(name, one, "(texts,)" if n else "(images,)", (sizes[n],))
        checks.same_device(name, one, "image", image)
        found.append(one.long())
    if not both and sizes[0] != sizes[1]:
        raise ValueError(
            f"labels: expected labels of {sizes[0]} images and of {sizes[1]} texts, given {checks.describe(given)}"
        )
    numbers = _numbered(torch.cat(found) if both else found[0])
    return (numbers[: sizes[0]], numbers[sizes[0] :].contiguous()) if both else (numbers, numbers)


def _numbered(together: Tensor) -> Tensor:
    """Places among the different ones, int32; labels may be hashes of 64 bits."""
    ordered, index = together.sort()
    # Nothing is written in place: what torch.func.linearize traces would be folded without it.
    is_new = torch.cat([torch.ones_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    places = torch.zeros_like(ordered).scatter(0, index, is_new.cumsum(0) - 1)
    return torch.where(together < 0, -1, places).int()


def of_all(given: Any, ring: Any) -> tuple[Tensor, Tensor]:
    """The labels of all processes, as of :func:`labels`, from this one's, which were checked."""
    both = given if isinstance(given, tuple) else (given, given)
    gathered = [ring.gathered(own.long(), side) for side, own in enumerate(both)]
    numbers = _numbered(torch.cat(gathered))
    return numbers[: len(gathered[0])], numbers[len(gathered[0]) :].contiguous()


def in_group(group: Any, image: Tensor, reduction: str) -> None:
    """What can go round a ring."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: expected a process group of torch.distributed or None, given {checks.describe(group)}")
    if image.dtype is torch.float64:
        raise TypeError(f"image: expected dtype float32, bfloat16 or float16 with a group, given {image.dtype}")
    if reduction == "none":
        raise ValueError(f"reduction: expected mean or sum with a group, given {checks.shown(reduction)}")


def same_label(own: Tensor, others: Tensor) -> Tensor:
    """``(own, others)``, bool: which have the same label; one below 0 is like nothing."""
    return (own[:, None] == others[None, :]) & (own[:, None] >= 0)


def partners(own: Tensor, others: Tensor) -> Tensor:
    """How many of ``others`` have the label of each of ``own``, none for a label below 0. Both as of :func:`labels`."""
    most = own.shape[0] + others.shape[0]
    # Those without a label are counted in a place of their own.
    counts = own.new_zeros(most + 1).scatter_add(
        0, torch.where(others < 0, most, others).long(), torch.ones_like(others)
    )
    return torch.where(own < 0, 0, counts.gather(0, own.clamp(min=0).long()))
