"""The contrastive loss of CLIP, whose scores never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.losses import pairs
from velm_kernels.losses.contrastive_loss import reference
from velm_kernels.losses.contrastive_loss.op import OPERATOR

REDUCTIONS = ("mean", "sum", "none")
# Pairs up to which torch's form is the faster one, without and with a gradient, see velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 256, 96


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    soft_targets: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The loss of CLIP (Radford et al., 2021), InfoNCE in both directions: half the cross-entropy of every image over
    all texts plus half that of every text over all images.

    The logits are ``logit_scale * image @ text^T + logit_bias``. They exist one tile at a time, forward and backward,
    so that memory grows with the number of rows and not with its square: with G the gradient of the logits, made of
    the two softmaxes, ``grad_image = logit_scale * G @ text``, and nothing of size images x texts is kept.

    Args:
        image: ``(images, d)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        text: ``(texts, d)``, dtype of image.
        logit_scale: the factor itself (``exp`` of what CLIP learns), a number or a tensor of one element.
        logit_bias: is added to every logit, which changes neither the loss nor a gradient: what a model that was made
            for :func:`velm_kernels.sigmoid_loss` hands over; a number or a tensor of one element.
        normalize: divide the rows of image and text by their norms, as ``torch.nn.functional.normalize`` does.
        labels: integers ``(n,)``, of pairs: those with the same label all belong together, and the weight of a row is
            shared equally among its targets (Yang et al., 2022). Or ``(labels of images, labels of texts)``, of
            different numbers. A row whose label is negative, or is that of nothing on the other side, is a negative
            for the others and has no loss itself. None: image i belongs to text i.
        label_smoothing: this share of a row's weight is spread over all columns, in [0, 1).
        soft_targets: ``(images, texts)``, the weight of every text for every image and the other way round; or that
            and ``(texts, images)``, the weights of images for texts. Floating point, in place of labels. As in
            ``torch.nn.functional.cross_entropy`` rows need not sum to 1.
        reduction: ``"mean"``: the mean over images and the mean over texts, halved. Of rows without a target there is
            none. ``"sum"``: sums in place of means. ``"none"``: ``(n,)``, for every pair the mean of its two losses;
            for as many images as texts.
        group: the processes that the pairs are divided among. Texts go round a ring, in memory that does not grow with
            the number of processes; the result, the loss of all pairs, is the same in each, and its gradient such that
            the mean over processes, as DistributedDataParallel takes it, is the gradient in one process with all pairs.
            Labels stand for the same in all; for ``"mean"`` and ``"sum"``, once differentiable. All processes have to
            call, as for every collective of torch.distributed.

    Under autocast image and text are cast to its dtype, and the result is float32.

    Returns:
        A scalar or ``(n,)``, in the dtype of image; sums accumulate in float32. 0 for no rows.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are different numbers of images and texts without
            labels or targets of both.

    Backward multiplies the scores again, and keeps image, text and four numbers a row. Where a column is the row's own
    pair, 1 minus its softmax is computed as the share of the others, so that gradients are exact to the last places
    where a model is nearly right. Small calls on the CPU, of a few pairs in float32, are computed by torch's own
    ``cross_entropy``, whose gradients are not. The gradient of ``soft_targets`` is that of the written meaning, all
    logits at once.

    Example:
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> velm_kernels.contrastive_loss(image, text, 1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """
    small = plain(
        image,
        text,
        logit_scale,
        logit_bias,
        normalize=normalize,
        labels=labels,
        label_smoothing=label_smoothing,
        soft_targets=soft_targets,
        reduction=reduction,
        group=group,
    )
    if small is not None:
        return small
    arguments = canonical(
        image,
        text,
        logit_scale,
        logit_bias,
        normalize=normalize,
        labels=labels,
        label_smoothing=label_smoothing,
        soft_targets=soft_targets,
        reduction=reduction,
        group=group,
    )
    if group is not None:
        out = _in_group(arguments, labels, reduction, group)
        return out.to(torch.float32 if checks.autocast_enabled(image.device) else image.dtype)
    targets = arguments["image_targets"], arguments["text_targets"]
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in targets):
        losses = _by_meaning(arguments)
    else:
        losses = OPERATOR(arguments)[:2]
    out = _reduced(losses, arguments, reduction)
    return out.to(torch.float32 if checks.autocast_enabled(image.device) else image.dtype)


def plain(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Any = None,
    label_smoothing: float = 0.0,
    soft_targets: Any = None,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if labels is not None or soft_targets is not None or group is not None:
        return None
    if label_smoothing.__class__ is not float or not 0.0 <= label_smoothing < 1.0:
        return None
    if reduction.__class__ is not str or reduction not in REDUCTIONS:
        return None
    given = (image, text, logit_scale, logit_bias)
    scores = pairs.small_scores(*given, normalize=normalize, most=SMALL, recorded=SMALL_RECORDED)
    if scores is None:
        return None
    own = torch.arange(scores.shape[0])
    of_image = F.cross_entropy(scores, own, reduction=reduction, label_smoothing=label_smoothing)
    of_text = F.cross_entropy(scores.t(), own, reduction=reduction, label_smoothing=label_smoothing)
    return (of_image + of_text) / 2


def _in_group(arguments: Arguments, labels: Any, reduction: str, group: Any) -> Tensor:
    from velm_kernels.losses import ring as rings
    from velm_kernels.losses.contrastive_loss.distributed import ContrastiveLosses

    image, text = arguments["image"], arguments["text"]
    ring = rings.Ring(group, image, text)
    of_all = None
    counts: list[Any] = [max(1, ring.total(side)) for side in (0, 1)]
    if labels is not None:
        of_all = pairs.of_all(labels, ring)
        if reduction == "mean":
            counts = [(pairs.partners(*both) > 0).sum().clamp(min=1) for both in (of_all, of_all[::-1])]
    given = (image, text, arguments["logit_scale"], arguments["logit_bias"], of_all)
    losses = ContrastiveLosses.apply(*given, arguments["normalize"], arguments["label_smoothing"], ring)
    if reduction == "sum":
        counts = [1, 1]
    return rings.sum_over_processes((losses[0].sum() / counts[0] + losses[1].sum() / counts[1]) / 2, ring)


def _by_meaning(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Targets with a gradient have one as large as all logits."""
    wide = torch.promote_types(arguments["image"].dtype, torch.float32)
    rows = {name: arguments[name].to(wide) for name in ("image", "text")}
    others = ("logit_scale", "logit_bias", "image_targets", "text_targets", "normalize", "label_smoothing")
    with checks.without_autocast(arguments["image"].device):
        return reference.contrastive_loss(**rows, **{name: arguments[name] for name in others})


def _reduced(losses: tuple[Tensor, Tensor], arguments: Arguments, reduction: str) -> Tensor:
    of_image, of_text = losses
    if reduction == "none":
        return (of_image + of_text) / 2
    if reduction == "sum":
        return (of_image.sum() + of_text.sum()) / 2
    labels = arguments["image_labels"], arguments["text_labels"]
    if labels[0] is None:
        return (of_image.sum() / max(1, of_image.shape[0]) + of_text.sum() / max(1, of_text.shape[0])) / 2
    counts = (pairs.partners(*labels), pairs.partners(*labels[::-1]))
    with_target = [(count > 0).sum().clamp(min=1) for count in counts]
    return (of_image.sum() / with_target[0] + of_text.sum() / with_target[1]) / 2


def canonical(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = True,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    soft_targets: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Arguments:
    """Checks the arguments of :func:`contrastive_loss` and returns those of the operator."""
    image, text = pairs.rows(image, text)
    sizes = image.shape[0], text.shape[0]
    of_rows: Any = (None, None)
    targets: Any = (None, None)
    checks.choice("reduction", reduction, REDUCTIONS)
    if group is not None:
        pairs.in_group(group, image, reduction)
        if soft_targets is not None:
            raise ValueError(f"soft_targets: expected None with a group, given {checks.describe(soft_targets)}")
    if soft_targets is not None:
        targets = _targets(soft_targets, image, sizes)
        if labels is not None:
            raise ValueError(f"labels: expected None beside soft_targets, given {checks.describe(labels)}")
    else:
        of_rows = pairs.labels(labels, image, sizes)
    if (of_rows[0] is None and targets[0] is None) or reduction == "none":
        pairs.as_many(image, text)
    return {
        "image": image,
        "text": text,
        "logit_scale": pairs.factor("logit_scale", logit_scale, image),
        "logit_bias": None if logit_bias is None else pairs.factor("logit_bias", logit_bias, image),
        "image_labels": of_rows[0],
        "text_labels": of_rows[1],
        "image_targets": targets[0],
        "text_targets": targets[1],
        "normalize": checks.flag("normalize", normalize),
        "label_smoothing": checks.probability("label_smoothing", label_smoothing),
    }


def _targets(given: Any, image: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    both = isinstance(given, tuple)
    if both and len(given) != 2:
        raise ValueError(f"soft_targets: expected one tensor or two, given {checks.describe(given)}")
    found = []
    for n, one in enumerate(given if both else (given,)):
        name, shape = f"soft_targets[{n}]" if both else "soft_targets", sizes[::-1] if n else sizes
        checks.dtype_in(name, checks.tensor(name, one), checks.FLOAT_DTYPES)
        checks.shape(name, one, "(texts, images)" if n else "(images, texts)", shape)
        checks.same_device(name, one, "image", image)
        found.append(one.to(torch.promote_types(image.dtype, torch.float32)))
    return found[0], found[1] if both else found[0].t()


OPERATOR.serves("contrastive_loss", canonical, plain)
