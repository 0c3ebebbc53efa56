"""What the modules that fuse a pair of modalities share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.dropout_residual import dropout_residual
from velm_kernels.fusion.factorized_pool import factorized_pool
from velm_kernels.layout import with_regions
from velm_kernels.linear import ACTIVATIONS, apply_linear


class PairFusion(nn.Module):
    """Projections ``linear0`` and ``linear1`` of a pair of tensors, what a subclass makes of the two, and
    ``linear_out``: the frame of the fusions of block-bootstrap-pytorch 0.1.6, whose options are attributes here.

    ``activ_*`` are names of functions of ``torch.nn.functional``; ``dropout_*`` are probabilities that count in
    training alone.
    """

    linear0: nn.Linear
    linear1: nn.Linear
    linear_out: nn.Linear
    normalize = False

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int,
        activ_input: str | None = None,
        activ_output: str | None = None,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__()
        checked_dims(input_dims)
        self.input_dims, self.output_dim, self.mm_dim = list(input_dims), output_dim, mm_dim
        self.activ_input = checked_activation("activ_input", activ_input)
        self.activ_output = checked_activation("activ_output", activ_output)
        self.dropout_input = checks.probability("dropout_input", dropout_input)
        self.dropout_pre_lin = checks.probability("dropout_pre_lin", dropout_pre_lin)
        self.dropout_output = checks.probability("dropout_output", dropout_output)

    def make_linears(self, width: int, joint: int, shared: bool = False) -> None:
        """The projections to ``width`` features, the same one twice if shared, and the one from ``joint`` features."""
        if shared and self.input_dims[0] != self.input_dims[1]:
            given = f"{self.input_dims[0]} and {self.input_dims[1]}"
            raise ValueError(f"shared: expected equal input_dims for a shared projection, given {given}")
        self.linear0 = nn.Linear(self.input_dims[0], width)
        self.linear1 = self.linear0 if shared else nn.Linear(self.input_dims[1], width)
        self.linear_out = nn.Linear(joint, self.output_dim)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        a, b = checked_pair(x, self.input_dims)
        z = self.fuse(self.projected(self.linear0, a), self.projected(self.linear1, b))
        return self.result(self.dropped(z, self.dropout_pre_lin))

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def projected(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self.dropped(project(layer, x, self.activ_input), self.dropout_input)

    def result(self, z: Tensor) -> Tensor:
        return self.dropped(project(self.linear_out, z, self.activ_output), self.dropout_output)

    def dropped(self, x: Tensor, p: float) -> Tensor:
        return dropout_residual(x, dropout_p=p) if p > 0 and self.training else x

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


def checked_pair(x: Sequence[Tensor], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both tensors; every row of a matrix goes with all regions of its entry in three dimensions beside it."""
    x = checks.tensors("x", x, 2, 2)
    for m, (value, dim) in enumerate(zip(x, dims, strict=True)):
        checks.features(f"x[{m}]", value, f"(..., d_{m})", dim)
    a, b = x
    checks.same_device("x[1]", b, "x[0]", a)
    if a.dtype != b.dtype and not checks.autocast_enabled(a.device):
        raise TypeError(f"x[1]: expected dtype {a.dtype} as x[0], given {b.dtype}")
    a, b = with_regions((a, b), most_dims=3)
    checks.leading("x[1]", x[1], "x[0]", x[0], a.shape[:-1], b.shape[:-1])
    return a, b


def checked_dims(input_dims: Sequence[int]) -> list[int]:
    """The features of two modalities."""
    if len(input_dims) != 2:
        raise ValueError(f"input_dims: expected 2 sizes, given {checks.describe(list(input_dims))}")
    return list(input_dims)


def checked_activation(name: str, value: str | None) -> str:
    if value and not callable(getattr(F, value, None)):
        given = checks.shown(value)
        raise ValueError(f"{name}: expected the name of a function of torch.nn.functional or None, given {given}")
    return value or ""


def project(layer: nn.Linear, x: Tensor, activation: str = "") -> Tensor:
    """The layer with an activation of ``torch.nn.functional``, in one pass where it is one of ours."""
    if activation and activation not in ACTIVATIONS:
        out: Tensor = getattr(F, activation)(apply_linear(layer, x))
        return out
    return apply_linear(layer, x, activation)


def root_and_norm(z: Tensor) -> Tensor:
    """The signed square root of z divided by its L2 norm over the last dimension."""
    return factorized_pool(z, z.new_ones(z.shape[-1]), power_norm=True, l2_norm=True)
