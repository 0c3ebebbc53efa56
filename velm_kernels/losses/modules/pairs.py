"""The losses of open_clip: of pairs of images and texts, and of captions beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.losses import pairs
from velm_kernels.losses.contrastive_loss import contrastive_loss
from velm_kernels.losses.sigmoid_loss import sigmoid_loss

_NAMES = ("image_features", "text_features")
_EXCHANGES = ("bidir", "shift", "reduce", "gather")


def _checked(
    image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any, output_dict: bool
) -> None:
    """In the names that the modules have."""
    image, text = pairs.rows(image_features, text_features, _NAMES)
    pairs.as_many(image, text, _NAMES)
    pairs.factor("logit_scale", logit_scale, image)
    if logit_bias is not None:
        pairs.factor("logit_bias", logit_bias, image)
    checks.flag("output_dict", output_dict)


def _group(world_size: int, group: Any) -> Any:
    """The process group of a call: the default one where there are several processes and none was given."""
    return torch.distributed.group.WORLD if group is None and world_size > 1 else group


class ContrastiveLoss(nn.Module):
    """CLIP's loss with the arguments of open_clip's ``ClipLoss``, by :func:`velm_kernels.contrastive_loss`: a training
    loop of open_clip takes it unchanged.

    Args:
        local_loss, gather_with_grad, cache_labels: are taken and make no difference. With several processes features go
            round a ring, and the gradient is that of one process with all pairs.
        rank: taken; the group knows it.
        world_size: the number of processes; of more than one the loss is over the pairs of all.
        use_horovod: False; processes are those of torch.distributed.
        group: the process group, if not the default one.

    Shape:
        image_features ``(n, d)`` and text_features ``(n, d)``, normalised, logit_scale and logit_bias numbers or scalar
        tensors, to ``()``; with ``output_dict`` to ``{"contrastive_loss": ()}``.

    The features have one dtype: float32, bfloat16, float16, or float64 (computed by the reference backend).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument is out of range; from forward: shapes or devices do not fit together.

    Example:
        >>> loss = velm_kernels.ContrastiveLoss()
        >>> loss(torch.eye(4), torch.eye(4), logit_scale=1.0)
        tensor(0.7437)
    """

    @checked()
    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False, given True")
        self.rank, self.world_size = checks.integer("rank", rank, 0), checks.integer("world_size", world_size, 1)
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _checked(image_features, text_features, logit_scale, logit_bias, output_dict)
        given = (image_features, text_features, logit_scale, logit_bias)
        loss = contrastive_loss(*given, normalize=False, group=_group(self.world_size, self.group))
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class SigmoidLoss(nn.Module):
    """SigLIP's loss with the arguments of open_clip's ``SigLipLoss``, by :func:`velm_kernels.sigmoid_loss`.

    Args:
        cache_labels: is taken and makes no difference.
        rank: taken; the group knows it.
        world_size: the number of processes; of more than one the loss is over the pairs of all.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``: taken, texts always go round a ring.
        group: the process group, if not the default one.

    Shape:
        image_features ``(n, d)`` and text_features ``(n, d)``, normalised, logit_scale and logit_bias numbers or scalar
        tensors, to ``()``; with ``output_dict`` to ``{"contrastive_loss": ()}``.

    The features have one dtype: float32, bfloat16, float16, or float64 (computed by the reference backend).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument is out of range; from forward: shapes or devices do not fit together.

    Example:
        >>> loss = velm_kernels.SigmoidLoss()
        >>> loss(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-10.0)
        tensor(0.6933)
    """

    @checked()
    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        checks.choice("dist_impl", dist_impl, _EXCHANGES, or_none=True)
        self.rank, self.world_size = checks.integer("rank", rank, 0), checks.integer("world_size", world_size, 1)
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _checked(image_features, text_features, logit_scale, logit_bias, output_dict)
        given = (image_features, text_features, logit_scale, logit_bias)
        loss = sigmoid_loss(*given, normalize=False, group=_group(self.world_size, self.group))
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class CoCaLoss(ContrastiveLoss):
    """The two losses of CoCa (Yu et al., 2022) with the arguments of open_clip's ``CoCaLoss``: that of pairs, by
    :func:`velm_kernels.contrastive_loss`, and the cross-entropy of captions.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; with the second 0 there is no loss of pairs.
        pad_id: the label of tokens that have no loss.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group: as of
            :class:`velm_kernels.ContrastiveLoss`.

    Shape:
        image_features ``(n, d)`` and text_features ``(n, d)``, normalised, logits ``(n, tokens, vocabulary)``, labels
        ``(n, tokens)``, integers, logit_scale a number or a scalar tensor, to ``()`` and ``()``, the loss of pairs and
        that of captions; with ``output_dict`` to ``{"contrastive_loss": (), "caption_loss": ()}``.

    The features have one dtype: float32, bfloat16, float16, or float64 (computed by the reference backend).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument is out of range; from forward: shapes or devices do not fit together.

    Example:
        >>> loss = velm_kernels.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> logits, labels = torch.zeros(4, 3, 10), torch.ones(4, 3, dtype=torch.long)
        >>> loss(torch.eye(4), torch.eye(4), logits, labels, logit_scale=1.0)  # and 2 * log(10)
        (tensor(0.7437), tensor(4.6052))
    """

    @checked(pad_id=-(2**63))
    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group)
        finite = "a finite number"
        self.caption_loss_weight = checks.number(
            "caption_loss_weight", caption_loss_weight, -1e30, 1e30, described=finite
        )
        self.clip_loss_weight = checks.number("clip_loss_weight", clip_loss_weight, -1e30, 1e30, described=finite)
        self.pad_id = pad_id

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        _checked(image_features, text_features, logit_scale, None, output_dict)
        checks.dtype_in("logits", checks.tensor("logits", logits, dims=3), checks.FLOAT_DTYPES)
        checks.dtype_in("labels", checks.tensor("labels", labels), checks.INTEGER_DTYPES)
        checks.same_device("logits", logits, "image_features", image_features)
        checks.same_device("labels", labels, "logits", logits)
        checks.shape("labels", labels, "(n, tokens)", logits.shape[:2])
        if logits.shape[2] and checks.reads_values(labels):
            checks.values_between("labels", labels.where(labels != self.pad_id, 0), 0, logits.shape[2] - 1)
        if self.clip_loss_weight:
            group = _group(self.world_size, self.group)
            of_pairs = contrastive_loss(image_features, text_features, logit_scale, normalize=False, group=group)
            of_pairs = self.clip_loss_weight * of_pairs
        else:
            of_pairs = torch.tensor(0, device=logits.device)
        of_captions = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=self.pad_id)
        of_captions = self.caption_loss_weight * of_captions
        if output_dict:
            return {"contrastive_loss": of_pairs, "caption_loss": of_captions}
        return of_pairs, of_captions

    def extra_repr(self) -> str:
        return (
            f"caption_loss_weight={self.caption_loss_weight}, clip_loss_weight={self.clip_loss_weight}, "
            f"pad_id={self.pad_id}, {super().extra_repr()}"
        )
