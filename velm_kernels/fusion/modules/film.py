"""Feature-wise linear modulation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.film import film
from velm_kernels.linear import apply_linear
from velm_kernels.listeners import is_bare


class FiLM(nn.Module):
    """Modulation of features by a condition: a linear layer makes gamma and beta, :func:`velm_kernels.film` applies
    them (Perez et al., 2018).

    Args:
        condition_dim: features of the condition.
        features: features that are modulated.
        channels_first: whether they are channels of ``(batch, features, *spatial)``.
        device, dtype: of the parameters.

    The state_dict is that of one ``torch.nn.Linear``: ``linear.weight (2 * features, condition_dim)`` and
    ``linear.bias (2 * features,)``, gamma before beta. The weight starts at 0 and the bias at 1 for gamma and 0 for
    beta: the module begins as the identity.

    Shape:
        x ``(batch, ..., features)``, or ``(batch, features, *spatial)``, and condition ``(batch, condition_dim)`` to
        the shape of x.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range; from forward: the batches, features or channels do not fit.

    Example:
        >>> film = velm_kernels.FiLM(condition_dim=300, features=64, channels_first=True)
        >>> film(torch.randn(2, 64, 14, 14), torch.randn(2, 300)).shape
        torch.Size([2, 64, 14, 14])
    """

    @checked()
    def __init__(
        self,
        condition_dim: int,
        features: int,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.channels_first = features, channels_first
        self.linear = nn.Linear(condition_dim, 2 * features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias[: self.features] = 1.0
            self.linear.bias[self.features :] = 0.0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        like = self.linear.weight if is_bare(self.linear, nn.Linear) else None
        checks.features("condition", condition, "(batch, condition_dim)", self.linear.in_features, like, 2)
        checks.dtype_in("x", checks.tensor("x", x), checks.FLOAT_DTYPES)
        if x.dim() < 2 or x.shape[1 if self.channels_first else -1] != self.features or len(x) != len(condition):
            layout = "(batch, features, *spatial)" if self.channels_first else "(batch, ..., features)"
            raise ValueError(
                f"x: expected {layout} with batch = {len(condition)} and features = {self.features}, "
                f"given {tuple(x.shape)}"
            )
        checks.same_device("x", x, "condition", condition)
        gamma, beta = apply_linear(self.linear, condition).chunk(2, -1)
        return film(x, gamma, beta, channels_first=self.channels_first)

    def extra_repr(self) -> str:
        return f"features={self.features}, channels_first={self.channels_first}"
