"""The sigmoid loss of SigLIP, whose scores never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, derivatives
from velm_kernels.losses import pairs
from velm_kernels.losses.sigmoid_loss.op import OPERATOR

REDUCTIONS = ("mean", "sum", "none")
# Pairs up to which torch's form is the faster one, without and with a gradient, see velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 128, 64


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The loss of SigLIP (Zhai et al., 2023): every pair of an image and a text is told apart by itself, as matching or
    not, ``sum_ij -log sigmoid(y_ij * logit_ij)`` with y 1 for a match and -1 else.

    The logits are ``logit_scale * image @ text^T + logit_bias``. They exist one tile at a time. No row has to be known
    before its gradient is, so that where one is wanted the tiles of forward become it: backward multiplies by one
    number.

    Args:
        image: ``(images, d)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        text: ``(texts, d)``, dtype of image.
        logit_scale: the factor itself (``exp`` of what SigLIP learns), a number or a tensor of one element.
        logit_bias: is added to every logit, about -10 where SigLIP begins; a number or a tensor of one element.
        normalize: divide the rows of image and text by their norms, as ``torch.nn.functional.normalize`` does.
        labels: integers ``(n,)``, of pairs: those with the same label all match. Or ``(labels of images, labels of
            texts)``, of different numbers. A negative label matches nothing. None: image i and text i match.
        reduction: ``"mean"``: the sum over all pairs, over the number of images. ``"sum"``: that sum. ``"none"``:
            ``(images,)``, for each its sum over texts.
        group: the processes that the pairs are divided among. Texts go round a ring, in memory that does not grow with
            the number of processes; the result, the loss of all pairs, is the same in each, and its gradient such that
            the mean over processes, as DistributedDataParallel takes it, is the gradient in one process with all pairs.
            Labels stand for the same in all; for ``"mean"`` and ``"sum"``, once differentiable. All processes have to
            call, as for every collective of torch.distributed.

    Under autocast image and text are cast to its dtype, and the result is float32.

    Returns:
        A scalar or ``(images,)``, in the dtype of image; sums accumulate in float32. 0 for no rows.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are different numbers of images and texts without
            labels of both.

    For ``"mean"`` and ``"sum"`` the gradients of image and text are made in forward and kept, beside these; for
    ``"none"`` backward multiplies the scores again. Small calls on the CPU are computed by torch's own operators.

    Example:
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> velm_kernels.sigmoid_loss(image, text, 10.0, -10.0)  # log(2) + 3 * log(1 + e^-10)
        tensor(0.6933)
    """
    given = (image, text, logit_scale, logit_bias)
    small = plain(*given, normalize=normalize, labels=labels, reduction=reduction, group=group)
    if small is not None:
        return small
    arguments = canonical(*given, normalize=normalize, labels=labels, reduction=reduction, group=group)
    if group is not None:
        out = _in_group(arguments, labels, reduction, group)
    else:
        out = OPERATOR(arguments)[0]
        if reduction == "mean":
            out = out / max(1, image.shape[0])
    return out.to(torch.float32 if checks.autocast_enabled(image.device) else image.dtype)


def plain(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Any = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if labels is not None or group is not None or reduction.__class__ is not str or reduction not in REDUCTIONS:
        return None
    given = (image, text, logit_scale, logit_bias)
    scores = pairs.small_scores(*given, normalize=normalize, most=SMALL, recorded=SMALL_RECORDED)
    if scores is None:
        return None
    losses = pairs.small_losses(scores)
    if reduction == "none":
        return losses.sum(1)
    return losses.sum() / scores.shape[0] if reduction == "mean" else losses.sum()


def _in_group(arguments: Arguments, labels: Any, reduction: str, group: Any) -> Tensor:
    from velm_kernels.losses import ring as rings
    from velm_kernels.losses.sigmoid_loss.distributed import SigmoidLoss

    image, text = arguments["image"], arguments["text"]
    ring = rings.Ring(group, image, text)
    of_all = None if labels is None else pairs.of_all(labels, ring)
    given = (image, text, arguments["logit_scale"], arguments["logit_bias"], of_all, arguments["normalize"])
    total = rings.sum_over_processes(SigmoidLoss.apply(*given, ring), ring)
    return total / max(1, ring.total(0)) if reduction == "mean" else total


def canonical(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Arguments:
    """Checks the arguments of :func:`sigmoid_loss` and returns those of the operator."""
    image, text = pairs.rows(image, text)
    checks.choice("reduction", reduction, REDUCTIONS)
    if group is not None:
        pairs.in_group(group, image, reduction)
    of_rows = pairs.labels(labels, image, (image.shape[0], text.shape[0]))
    if of_rows[0] is None:
        pairs.as_many(image, text)
    scale = pairs.factor("logit_scale", logit_scale, image)
    bias = None if logit_bias is None else pairs.factor("logit_bias", logit_bias, image)
    tensors = (image, text, scale) if bias is None else (image, text, scale, bias)
    return {
        "image": image,
        "text": text,
        "logit_scale": scale,
        "logit_bias": bias,
        "image_labels": of_rows[0],
        "text_labels": of_rows[1],
        "normalize": checks.flag("normalize", normalize),
        "of_rows": reduction == "none",
        "make": reduction != "none" and derivatives.wanted(*tensors),
    }


OPERATOR.serves("sigmoid_loss", canonical, plain)
