"""Lower bounds on mutual information from the scores of pairs, which never exist all at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, derivatives
from velm_kernels.losses import pairs
from velm_kernels.losses.mutual_information import reference
from velm_kernels.losses.mutual_information.op import OPERATOR
from velm_kernels.losses.sigmoid_loss.op import OPERATOR as SIGMOID_LOSS
from velm_kernels.operator import Operator

BOUNDS = ("infonce", "dv", "nwj", "jsd", "smile")
# Pairs up to which torch's form is the faster one, without and with a gradient, see velm_kernels.backends.small.
SMALL, SMALL_RECORDED = 256, 512


def mutual_information(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, bound: str = "infonce", *, clip: float = 5.0
) -> Tensor:
    """An estimate of the mutual information of x and y, in nats, from the scores ``f_ij = scale * x_i . y_j`` of N
    pairs: a lower bound, which training maximises. A loss is its negative.

    Row i of x and row i of y were drawn together. The negatives are the N (N - 1) other pairs, x_i with y_j for j != i,
    which stand for x and y drawn apart. ``positive`` is the mean of f_ii, ``mean_off`` a mean over the negatives:

    - ``"infonce"`` (van den Oord et al., 2018): ``log N + mean_i (f_ii - logsumexp_j f_ij)``, the sum over all j, i
      among them. At most log N, whatever there is to know; of little variance. It is log N minus the part of
      :func:`velm_kernels.contrastive_loss` that looks for the y of each x.
    - ``"dv"`` (Donsker and Varadhan, 1983; MINE: Belghazi et al., 2018): ``positive - log mean_off exp f_ij``. A number
      that is added to all scores changes nothing. The logarithm of a mean over few negatives is too small on average,
      and the estimate too large.
    - ``"nwj"`` (Nguyen, Wainwright and Jordan, 2010; f-GAN-KL in Nowozin et al., 2016):
      ``positive - mean_off exp(f_ij - 1)``. Unbiased, of much variance. The scores that maximise it are
      ``1 + log (p(x, y) / (p(x) p(y)))``.
    - ``"jsd"`` (Nowozin et al., 2016; Hjelm et al., 2019): ``-mean_i softplus(-f_ii) - mean_off softplus(f_ij)``. It
      bounds ``2 JS - log 4``, JS the Jensen-Shannon divergence of both ways of drawing, and not the mutual information:
      at most 0, and -log 4 where all scores are 0. ``log (p(x, y) / (p(x) p(y)))`` maximises it, so that scores that
      were trained by it can be put into the other bounds.
    - ``"smile"`` (Song and Ermon, 2020): ``"dv"`` with the scores of negatives clipped to [-clip, clip], which limits
      its variance and may lift it above the mutual information. f_ii is not clipped.

    ``"nwj"``, ``"jsd"`` and ``"smile"`` depend on what is added to all scores: a column of ones in x makes a number of
    the same column of y.

    Args:
        x: ``(pairs, d)``, float32, bfloat16, float16, or float64 (computed by the reference backend).
        y: ``(pairs, d)``, dtype of x. Neither is normalised.
        scale: the factor of the scores, a number or a tensor of one element.
        bound: as above.
        clip: of ``"smile"`` alone, the largest magnitude of a score, at least 0; 1 and 5 in the paper.

    Under autocast x and y are cast to its dtype, and the result is float32.

    Returns:
        A scalar in the dtype of x; sums accumulate in float32. 0 for fewer than two pairs, which nothing can be
        compared with.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, the bound has another name, or clip is negative.

    Scores exist one tile at a time, forward and backward: memory grows with the number of pairs and not with its
    square, but in small calls on the CPU, which torch's own operators compute. Gradients are those of what is written
    above, of x, y and scale. That of ``"dv"`` is therefore the one of a batch by itself, where MINE (section 3.2) takes
    a running mean of the denominator; that of ``"smile"`` is 0 at a score that is clipped, where its authors' code
    reports this value and trains by the gradient of ``"jsd"``: ``jsd + (smile - jsd).detach()``.

    Example:
        >>> x = 2 * torch.eye(4)
        >>> velm_kernels.mutual_information(x, x)  # log(4) + 4 - log(e^4 + 3)
        tensor(1.3328)
        >>> velm_kernels.mutual_information(x, x, bound="dv")  # 4 - log(1)
        tensor(4.)
    """
    small = plain(x, y, scale, bound, clip=clip)
    if small is not None:
        return small
    arguments = canonical(x, y, scale, bound, clip=clip)
    if x.shape[0] < 2:
        found = _nothing(arguments)
    elif bound == "jsd":
        found = _jensen_shannon(arguments)
    else:
        positive, others = OPERATOR(arguments)
        found = _from_sums(positive, others, bound)
    return found.to(torch.float32 if checks.autocast_enabled(x.device) else x.dtype)


def plain(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, bound: str = "infonce", *, clip: float = 5.0
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if bound.__class__ is not str or bound not in BOUNDS or clip.__class__ is not float or not 0.0 <= clip < 1e30:
        return None
    scores = pairs.small_scores(x, y, scale, most=SMALL, recorded=SMALL_RECORDED)
    if scores is None or scores.shape[0] < 2:
        return None
    if bound == "jsd":
        of_all = pairs.small_losses(scores).sum() / scores.shape[0]
        return _weighed(of_all, scores.diagonal())
    positive, others = reference.sums_of(scores, clip if bound == "smile" else math.inf)
    return _from_sums(positive, others, bound)


def _nothing(arguments: Arguments) -> Tensor:
    """0, and for everything that has a gradient one of 0, whatever its values are."""
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    unread = [value.masked_fill(torch.ones_like(value, dtype=torch.bool), 0.0).sum() for value in given]
    return torch.stack([one.float() for one in unread]).sum()


def _from_sums(positive: Tensor, others: Tensor, bound: str) -> Tensor:
    """From the score of each pair and, for each x, the logarithm of the mean of the exponentials of the others."""
    count = positive.shape[0]
    if bound != "infonce":
        log_mean = reference.log_mean_exp(others, count)
        return positive.mean() - ((log_mean - 1).exp() if bound == "nwj" else log_mean)
    # Numbers as tensors, which torch.compile lets change.
    log_count, log_others = others.new_full((), count).log(), others.new_full((), count - 1).log()
    # An infinite score of a pair is no number less itself, for which others are not to blame.
    is_infinite = positive == math.inf
    known = torch.where(is_infinite, torch.finfo(positive.dtype).max, positive)
    unknown = positive * torch.where(is_infinite, math.nan, 0.0)
    return log_count - (F.softplus(others + log_others - known) + unknown).mean()


def _jensen_shannon(arguments: Arguments) -> Tensor:
    x, y, scale = arguments["image"], arguments["text"], arguments["logit_scale"]
    positive = scale * (x.to(scale.dtype) * y.to(scale.dtype)).sum(1)
    return _weighed(SIGMOID_LOSS(arguments)[0] / x.shape[0], positive)


def _weighed(of_all: Tensor, positive: Tensor) -> Tensor:
    """``of_all``, the loss of SigLIP, counts a pair like a negative: the rest of its weight is added here."""
    count = positive.shape[0]
    return -(of_all + (count - 2) * F.softplus(-positive).mean()) / (count - 1)


def canonical(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, bound: str = "infonce", *, clip: float = 5.0
) -> Arguments:
    """Checks the arguments of :func:`mutual_information` and returns those of the operator, for ``"jsd"`` those of
    sigmoid_loss."""
    x, y = pairs.rows(x, y, ("x", "y"), ("pairs", "pairs"))
    pairs.as_many(x, y, ("x", "y"))
    factor = pairs.factor("scale", scale, x, "x")
    checks.choice("bound", bound, BOUNDS)
    clip = checks.number("clip", clip, 0.0, 1e30, described="a number that is not negative")
    if bound == "jsd":
        return {
            "image": x,
            "text": y,
            "logit_scale": factor,
            "logit_bias": None,
            "image_labels": None,
            "text_labels": None,
            "normalize": False,
            "of_rows": False,
            "make": derivatives.wanted(x, y, factor),
        }
    return {"x": x, "y": y, "scale": factor, "clip": clip if bound == "smile" else math.inf}


def _operator_for(arguments: Arguments) -> Operator:
    return OPERATOR if "clip" in arguments else SIGMOID_LOSS


OPERATOR.serves("mutual_information", canonical, plain, _operator_for)
