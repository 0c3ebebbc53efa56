"""Modules built on :func:`velm_kernels.linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.linear.linear import linear
from velm_kernels.linear.linear.reference import ACTIVATIONS, activate
from velm_kernels.linear.patch_embed import LAYOUTS, patch_embed
from velm_kernels.listeners import is_bare


def apply_linear(layer: nn.Module, x: Tensor, activation: str = "", residual: Tensor | None = None) -> Tensor:
    """``activation(layer(x)) + residual``, in one pass where ``layer`` is a ``torch.nn.Linear`` and nothing more.

    Else the layer is called as what it is: with hooks, an adapter around it, parametrised, sharded, or quantised to a
    module of another class. ``activation`` is a name as in :class:`Linear`, or empty.
    """
    if is_bare(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias, activation or None, residual)  # type: ignore[arg-type]
    out = activate(layer(x), activation)
    return out if residual is None else out + residual


class Linear(nn.Linear):
    """``torch.nn.Linear`` with its activation and residual fused in: ``activation(x W^T + b) + residual``.

    Parameters, state_dict and initialisation are those of ``torch.nn.Linear``, and so is the result without
    ``activation`` and ``residual``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        activation: None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or "tanh".

    Shape:
        ``(..., in_features)`` and, if given, residual ``(..., out_features)`` to ``(..., out_features)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16; ``residual`` may have another floating
            dtype).
        ValueError: an argument is out of range, or ``activation`` unknown; from forward: features or the shape of
            ``residual`` do not fit.

    Example:
        >>> up = velm_kernels.Linear(64, 256, activation="gelu")
        >>> up(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 256])
    """

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = checks.choice("activation", activation, ACTIVATIONS[1:], or_none=True)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        checks.features("input", input, "(..., in_features)", self.in_features)
        return linear(input, self.weight, self.bias, self.activation, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class MLP(nn.Module):
    """The feed-forward block of a transformer layer: ``down(activation(up(x)))``, plus ``residual`` if given.

    Args:
        dim: features of the input and of the output.
        hidden_dim: features between the two projections, by default ``4 * dim``.
        activation: as in :class:`Linear`, applied after ``up``.
        bias, device, dtype: of both projections, as in ``torch.nn.Linear``.

    Shape:
        ``(..., dim)`` and, if given, residual ``(..., dim)`` to ``(..., dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    The block is the position-wise feed-forward network of Vaswani et al. (2017, section 3.3).

    Raises:
        TypeError: an argument has a wrong type; from forward: an input is not a floating-point tensor of the
            parameters' dtype (under autocast, of float32, bfloat16 or float16; ``residual`` may have another floating
            dtype).
        ValueError: an argument is out of range, or ``activation`` unknown; from forward: features or the shape of
            ``residual`` do not fit.

    Example:
        >>> block = velm_kernels.MLP(64, activation="gelu_tanh")
        >>> x = torch.randn(2, 10, 64)
        >>> block(x, residual=x).shape
        torch.Size([2, 10, 64])
    """

    @checked()
    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        activation: str | None = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.dim, hidden = dim, 4 * dim if hidden_dim is None else hidden_dim
        self.up = Linear(dim, hidden, activation=activation, **options)
        self.down = Linear(hidden, dim, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        checks.features("x", x, "(..., dim)", self.dim)
        out: Tensor = self.down(self.up(x), residual)
        return out


class PatchEmbed(nn.Module):
    """The patch embedding of a vision transformer: a convolution whose stride is its kernel, as one product.

    Parameters, state_dict and initialisation are those of a ``torch.nn.Conv2d``, or for three sizes of a
    ``torch.nn.Conv3d``, with ``stride=kernel_size``.

    Args:
        in_channels: of the pictures.
        embed_dim: features of a token.
        patch_size: one size for height and width, or a sequence of one to three: (height, width), or of films (frames,
            height, width).
        bias, device, dtype: as in ``torch.nn.Conv2d``.
        layout: ``"tokens"`` or ``"channels_first"``, as of :func:`velm_kernels.patch_embed`.

    Shape:
        ``(batch, in_channels, *sizes)`` to ``(batch, tokens, embed_dim)`` or ``(batch, embed_dim, *counts)``; or
        patches that are rows, ``(..., in_channels * prod(patch_size))`` with another number of dimensions, to
        ``(..., embed_dim)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type or dtype; from forward: pixels are not of the parameters' dtype.
        ValueError: an argument is out of range; from forward: channels or sizes do not fit.

    Example:
        >>> embed = velm_kernels.PatchEmbed(3, 64, patch_size=16)
        >>> embed(torch.randn(2, 3, 64, 48)).shape
        torch.Size([2, 12, 64])
    """

    @checked(in_channels=1, embed_dim=1)
    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | Sequence[int] = 16,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: str = "tokens",
    ) -> None:
        super().__init__()
        self.in_channels, self.embed_dim, self.patch_size = in_channels, embed_dim, _sizes(patch_size)
        self.layout = checks.choice("layout", layout, LAYOUTS)
        shape = (embed_dim, in_channels, *self.patch_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws as torch's convolutions do (He et al., 2015, of the fan in)."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_module(cls, convolution: nn.Module, layout: str = "channels_first") -> PatchEmbed:
        """This module with the parameters of a convolution: the same ones, no copies.

        Args:
            convolution: a ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d`` whose stride is its kernel, without padding,
                dilation and groups.
            layout: by default that of the convolution, so that it can take its place.

        Raises:
            TypeError: ``convolution`` is of another class, or parametrised.
            ValueError: it is no patch embedding.

        Example:
            >>> embed = velm_kernels.PatchEmbed.from_module(torch.nn.Conv2d(3, 8, kernel_size=4, stride=4))
            >>> embed(torch.randn(1, 3, 8, 8)).shape
            torch.Size([1, 8, 2, 2])
        """
        if type(convolution) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            raise TypeError(f"convolution: expected a Conv1d, Conv2d or Conv3d, given {checks.describe(convolution)}")
        reason = why_no_patch_embedding(convolution)
        if reason is not None:
            raise ValueError(f"convolution: expected a patch embedding, given one where {reason}")
        sizes = convolution.in_channels, convolution.out_channels, convolution.kernel_size
        made = cls(*sizes, bias=convolution.bias is not None, device="meta", layout=layout)  # type: ignore[arg-type]
        made.weight, made.bias = convolution.weight, convolution.bias  # type: ignore[assignment]
        return made.train(convolution.training)

    def forward(self, pixels: Tensor) -> Tensor:
        return patch_embed(pixels, self.weight, self.bias, self.layout)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        sizes = f"{self.in_channels}, {self.embed_dim}, patch_size={self.patch_size}"
        return f"{sizes}{bias}, layout={self.layout!r}"


def _sizes(given: int | Sequence[int]) -> tuple[int, ...]:
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if not several and (isinstance(given, bool) or not isinstance(given, int)):
        raise TypeError(f"patch_size: expected an integer or one to three, given {checks.describe(given)}")
    sizes = tuple(given) if several else (given, given)  # type: ignore[arg-type]
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"patch_size: expected an integer or one to three, given {checks.describe(given)}")
    return tuple(checks.integer("patch_size", size, 1, 2**31 - 1) for size in sizes)


def why_no_patch_embedding(convolution: Any) -> str | None:
    """Why a convolution of torch is more than a product of patches that do not overlap, or None."""
    ones = (1,) * len(convolution.kernel_size)
    padding = convolution.padding
    if convolution.stride != convolution.kernel_size:
        return f"stride {convolution.stride} is not kernel_size {convolution.kernel_size}"
    if not (padding == "valid" or not any(_padded(padding, convolution.kernel_size))):
        return f"padding is {padding}"
    if convolution.dilation != ones and convolution.kernel_size != ones:
        return f"dilation is {convolution.dilation}"
    if convolution.groups != 1:
        return f"there are {convolution.groups} groups"
    return None


def _padded(padding: Any, kernel_size: Sequence[int]) -> Sequence[int]:
    # "same" adds nothing around a kernel of one pixel, but torch refuses it with a stride, which is 1 there.
    return [size - 1 for size in kernel_size] if padding == "same" else padding
