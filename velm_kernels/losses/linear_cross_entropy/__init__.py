"""The cross entropy of a projection onto a vocabulary, whose logits never exist whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments, small
from velm_kernels.layout import as_matrix, unit_last_stride
from velm_kernels.losses.linear_cross_entropy import reference
from velm_kernels.losses.linear_cross_entropy.op import BIAS, HIDDEN, LATER, OPERATOR, WEIGHT
from velm_kernels.processors import NEVER
from velm_kernels.products import own_product_of

REDUCTIONS = ("none", "mean", "sum")
# Logits up to which torch's form is the faster one: without a gradient, with one of hidden alone, and with one of
# weight, see velm_kernels.backends.small. What it makes of so many is no more than a chunk.
SMALL, SMALL_OF_HIDDEN, SMALL_OF_WEIGHT = 1 << 21, 1 << 20, 1 << 22
# Rows whose targets are looked at for that.
SMALL_ROWS = 1 << 12
_DTYPES = frozenset((torch.float32, torch.bfloat16))
# Rows up to which a second multiplication of the logits costs less than multiplying a gradient of weight once more: on
# a server of 2 threads with AMX, at 1024 x 32000, backward made 8 rows 3 times as fast, 128 (float32) and 512
# (bfloat16) no slower, and 2048 slower.
FEW_ROWS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    reduction: str = "mean",
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``cross_entropy(hidden @ weight^T + bias, targets)`` without the logits of all rows and of the vocabulary.

    Of a sequence of which a part alone is labelled, as an answer behind a picture and a question, only that part is
    multiplied with the vocabulary.

    Args:
        hidden: ``(..., dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend): the last
            hidden states, one row a token.
        weight: ``(vocabulary, dim)``, dtype of hidden: that of the language model's head.
        targets: ``(...)``, of any integer dtype: the index of each row's label in the vocabulary, or ``ignore_index``.
        bias: ``(vocabulary,)``, dtype of hidden.
        ignore_index: the target of a row without a label. What it holds is not read, NaN too; its loss is 0, and so are
            its gradients.
        label_smoothing: in [0, 1): the share of each label that is spread over the whole vocabulary (Szegedy et al.,
            2016), as in ``torch.nn.functional.cross_entropy``.
        softcap: ``softcap * tanh(logits / softcap)`` in place of the logits (Gemma 2), above 0, or None.
        shift: the targets are the tokens of ``hidden (..., tokens, dim)`` themselves: each position predicts the next
            one's, and the last none. Nothing is copied for that.
        reduction: ``"mean"`` over rows with a label, ``"sum"``, or ``"none"``.
        return_logprobs: returns ``(loss, logprobs, entropy)``: the log-probability of each row's label and the entropy
            of its distribution, both differentiable, as preference and policy training wants them.

    Under autocast hidden, weight and bias are cast to its dtype.

    Returns:
        The loss, ``()`` or for ``"none"`` ``(...)``; logprobs and entropy ``(...)``, 0 without a label. All in
        float32, for float64 in float64. The mean over no label at all is NaN with gradients of 0, as in torch.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, a setting is out of range; on the CPU, or with VELM_CHECK=1,
            a target is neither in the vocabulary nor ``ignore_index`` (else its loss is NaN).

    Logits exist for some rows at a time, 64 MiB; sums accumulate in float32. With a mean or a sum, forward computes
    those gradients that are wanted while it has the logits, and backward multiplies them by what comes in, in float32:
    three products, as many as plain torch has. It gives their memory, so that there is one gradient of weight, unless
    the graph is kept (``retain_graph=True``) or others may hold what is saved (hooks of saved tensors, checkpoints). Of
    few rows (128 in float32, 512 in 16 bits) backward makes them, where weight has one, which is then larger than the
    logits. Per-row results (``"none"``, ``return_logprobs``) have gradients of their own each. Both form the logits a
    second time in backward: a fourth product. On the CPU labelled rows are counted; on a GPU that would wait for it, so
    all rows are multiplied there, those without a label as zeros. The products are torch's: on the CPU their sums of
    about 1000 terms and more have other last bits for other numbers of threads.

    A call of at most 2^20 to 2^22 logits on the CPU, which are less than such a chunk, is computed by torch's own
    ``cross_entropy`` of the rows with a label.

    The formula: ``loss = logsumexp(z) - z[target]``; with ``p = softmax(z)`` the gradient of z is
    ``p - onehot(target)``, by chunks as in Liger Kernel (Hsu et al., 2024) and Cut Your Losses (Wijmans et al., 2024).

    Example:
        >>> hidden, weight = torch.randn(2, 10, 64), torch.randn(1000, 64)
        >>> targets = torch.randint(0, 1000, (2, 10))
        >>> targets[:, :7] = -100  # the picture and the question
        >>> velm_kernels.linear_cross_entropy(hidden, weight, targets, shift=True).shape
        torch.Size([])
    """
    found = plain(
        hidden,
        weight,
        targets,
        bias,
        ignore_index,
        label_smoothing,
        softcap,
        shift,
        reduction,
        return_logprobs,
    )
    if found is not None:
        return found
    if isinstance(hidden, Tensor):
        hidden, weight, bias = checks.autocast(hidden, weight, bias)
    arguments = canonical(
        hidden,
        weight,
        targets,
        bias,
        ignore_index,
        label_smoothing,
        softcap,
        shift,
        reduction,
        return_logprobs,
    )
    if torch.is_grad_enabled():
        wanted = ((hidden, HIDDEN), (weight, WEIGHT), (bias, BIAS))
        records = sum(bit for value, bit in wanted if value is not None and value.requires_grad)
        arguments["records"] = records | LATER if _is_few(arguments["hidden"], records) else records
    loss, logprobs, entropy, *_ = OPERATOR(arguments)
    if reduction == "none":
        loss = loss.view(targets.shape)
    return (loss, logprobs.view(targets.shape), entropy.view(targets.shape)) if return_logprobs else loss


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    reduction: str = "mean",
    return_logprobs: bool = False,
) -> Tensor | None:
    """The result of a small call by torch's own operators, or None."""
    if return_logprobs is not False or shift is not False or reduction.__class__ is not str:
        return None
    if reduction not in REDUCTIONS or ignore_index.__class__ is not int or label_smoothing.__class__ is not float:
        return None
    if not 0.0 <= label_smoothing < 1.0 or not (softcap is None or _is_cap(softcap)):
        return None
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not small.takes_torch(NEVER, *tensors, dtype=_DTYPES) or targets.__class__ is not Tensor:
        return None
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        return None
    vocabulary = weight.shape[0]
    most = SMALL
    if torch.is_grad_enabled():
        if weight.requires_grad:
            most = SMALL_OF_WEIGHT
        elif any(tensor.requires_grad for tensor in tensors):
            most = SMALL_OF_HIDDEN
    dim, bound = hidden.shape[-1], 2**63
    if targets.shape != hidden.shape[:-1] or targets.dtype is not torch.int64 or not -bound <= ignore_index < bound:
        return None
    if vocabulary == 0 or dim == 0 or (bias is not None and bias.shape != (vocabulary,)):
        return None
    labels = small.values_of(targets, SMALL_ROWS)
    if labels is None or own_product_of(len(labels), hidden.dtype):
        return None
    count = len(labels)
    if ignore_index in labels:
        places = [place for place, label in enumerate(labels) if label != ignore_index]
        labels = [labels[place] for place in places]
    if not 0 < len(labels) * vocabulary <= most or min(labels) < 0 or max(labels) >= vocabulary:
        return None
    if len(labels) < count and reduction == "none":
        return None
    rows, of_rows = hidden.reshape(-1, dim), targets.reshape(-1)
    if len(labels) < count:
        # Nothing else is read.
        labelled = torch.tensor(places)
        rows, of_rows = rows.index_select(0, labelled), of_rows.index_select(0, labelled)
    logits = F.linear(rows, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, of_rows, reduction=reduction, label_smoothing=label_smoothing)
    return loss.view(targets.shape) if reduction == "none" else loss


def _is_cap(softcap: Any) -> bool:
    return softcap.__class__ is float and 1e-30 <= softcap < float("inf")


def canonical(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    reduction: str = "mean",
    return_logprobs: bool = False,
) -> Arguments:
    """Checks the arguments of :func:`linear_cross_entropy` and returns those of the operator."""
    checks.dtype_in("hidden", checks.tensor("hidden", hidden), checks.FLOAT_DTYPES)
    if hidden.dim() == 0:
        raise ValueError("hidden: expected (..., dim), given ()")
    checks.dtype_in("weight", checks.tensor("weight", weight, dims=2, layout="(vocabulary, dim)"), (hidden.dtype,))
    checks.same_device("weight", weight, "hidden", hidden)
    vocabulary, dim = weight.shape
    if hidden.shape[-1] != dim:
        raise ValueError(
            f"hidden: expected (..., dim) with dim = {dim} as in weight {tuple(weight.shape)}, "
            f"given {tuple(hidden.shape)}"
        )
    checks.dtype_in("targets", checks.tensor("targets", targets), checks.INTEGER_DTYPES)
    checks.same_device("targets", targets, "hidden", hidden)
    checks.shape("targets", targets, "(...) of hidden (..., dim)", hidden.shape[:-1])
    if bias is not None:
        checks.dtype_in("bias", checks.tensor("bias", bias), (hidden.dtype,))
        checks.same_device("bias", bias, "hidden", hidden)
        checks.shape("bias", bias, "(vocabulary,)", (vocabulary,))
        bias = bias.contiguous()
    checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    label_smoothing = checks.probability("label_smoothing", label_smoothing)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, 1e-30, float("inf"), described="a finite number above 0")
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.flag("return_logprobs", return_logprobs)
    if checks.flag("shift", shift):
        if hidden.dim() < 2:
            raise ValueError(f"hidden: expected (..., tokens, dim) to shift targets, given {tuple(hidden.shape)}")
        targets = reference.shifted(targets, ignore_index)
    return {
        "hidden": as_matrix(hidden),
        "weight": unit_last_stride(weight),
        "bias": bias,
        "targets": _places(targets.reshape(-1).to(torch.int64), ignore_index, vocabulary),
        "label_smoothing": label_smoothing,
        "softcap": softcap or 0.0,
        "reduction": reduction,
        "details": return_logprobs,
        "records": 0,
    }


def _places(targets: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """-1 for what is ignored, and beyond the vocabulary what else is negative."""
    ignored = targets == ignore_index
    return torch.where(targets < 0, vocabulary, targets).masked_fill(ignored, -1)


def _is_few(hidden: Tensor, records: int) -> bool:
    """Of sizes that a compiler lets change nothing is asked."""
    if not small.enabled or not records & WEIGHT or torch.compiler.is_compiling():
        return False
    return hidden.shape[0] <= FEW_ROWS.get(hidden.dtype, 0)


OPERATOR.serves("linear_cross_entropy", canonical, plain)
