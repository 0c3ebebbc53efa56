"""The loss of a language model's head."""

from __future__ import annotations

from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.losses.linear_cross_entropy import REDUCTIONS, linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """:func:`velm_kernels.linear_cross_entropy` with its settings; the weight stays with the model's head.

    Args:
        ignore_index, label_smoothing, softcap, shift, reduction, return_logprobs: as of the function.

    Shape:
        hidden ``(..., dim)``, weight ``(vocabulary, dim)``, targets ``(...)`` and, if given, bias ``(vocabulary,)`` to
        ``()``, or ``(...)`` for ``reduction="none"``.

    hidden, weight and bias have one dtype: float32, bfloat16, float16, or float64 (computed by the reference backend).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument is out of range; from forward: shapes or devices do not fit together, or a target is
            out of range.

    Example:
        >>> head = torch.nn.Linear(64, 1000, bias=False)
        >>> loss = velm_kernels.LinearCrossEntropyLoss(shift=True)
        >>> loss(torch.randn(2, 10, 64), head.weight, torch.randint(0, 1000, (2, 10))).shape
        torch.Size([])
    """

    @checked(ignore_index=-(2**63))
    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        reduction: str = "mean",
        return_logprobs: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.shift, self.return_logprobs = ignore_index, shift, return_logprobs
        self.label_smoothing = checks.probability("label_smoothing", label_smoothing)
        if softcap is not None:
            softcap = checks.number("softcap", softcap, 1e-30, float("inf"), described="a finite number above 0")
        self.softcap = softcap
        self.reduction = checks.choice("reduction", reduction, REDUCTIONS)

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias,
            self.ignore_index,
            self.label_smoothing,
            self.softcap,
            self.shift,
            self.reduction,
            self.return_logprobs,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, softcap={self.softcap}, "
            f"shift={self.shift}, reduction={self.reduction!r}, return_logprobs={self.return_logprobs}"
        )
