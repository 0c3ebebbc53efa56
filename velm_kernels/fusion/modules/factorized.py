"""Fusions of two modalities by a product of their projections, summed over a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.factorized_pool import factorized_pool
from velm_kernels.fusion.modules.pair import PairFusion, checked_pair, project


class MFB(PairFusion):
    """Multi-modal factorised bilinear pooling (Yu et al., 2017): projections of two modalities are multiplied, summed
    over ``factor`` neighbours, normalised where asked for, and projected. The tail is
    :func:`velm_kernels.factorized_pool`.

    Constructor and state_dict (``linear0``, ``linear1``, ``linear_out``) are those of ``MFB`` in
    block-bootstrap-pytorch 0.1.6, and so is the result; unlike there, inputs may have more than two dimensions.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features after the sum.
        factor: products in a sum.
        activ_input, activ_output: name of a function of ``torch.nn.functional`` after the input and the output
            projections; empty or None for none.
        normalize: signed square root and L2 norm before the output projection.
        dropout_input, dropout_pre_norm, dropout_output: probabilities, after the input projections, of the products
            and of the result, in training.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``. Leading dimensions broadcast, and
        ``(batch, d)`` goes with ``(batch, regions, d)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.MFB([300, 512], output_dim=64, mm_dim=100, factor=5, normalize=True)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    @checked(factor=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        factor: int = 2,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_norm: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(input_dims, output_dim, mm_dim, activ_input, activ_output, dropout_input, 0.0, dropout_output)
        self.factor, self.normalize = factor, normalize
        self.dropout_pre_norm = checks.probability("dropout_pre_norm", dropout_pre_norm)
        self.make_linears(mm_dim * factor, mm_dim)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        dropout_p = self.dropout_pre_norm if self.training else 0.0
        return factorized_pool(a, b, self.factor, "inner", self.normalize, self.normalize, dropout_p)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, normalize={self.normalize}"


class MLB(MFB):
    """Multi-modal low-rank bilinear pooling (Kim et al., 2017): :class:`MFB` with one product per feature.

    Constructor and state_dict are those of ``MLB`` in block-bootstrap-pytorch 0.1.6.

    Args:
        dropout_pre_lin: probability of dropout after the normalisation, in training.
        others: as in :class:`MFB`.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``, as in :class:`MFB`.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.MLB([300, 512], output_dim=64, mm_dim=128)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 36, 512)]).shape  # a question with 36 regions
        torch.Size([16, 36, 64])
    """

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(
            input_dims, output_dim, mm_dim, 1, activ_input, activ_output, normalize, dropout_input, 0.0, dropout_output
        )
        self.dropout_pre_lin = checks.probability("dropout_pre_lin", dropout_pre_lin)


class MFH(PairFusion):
    """Multi-modal factorised high-order pooling (Yu et al., 2018): two blocks of :class:`MFB`, the second on the
    products of the first, their sums side by side.

    Constructor and state_dict (``linear0_0``, ``linear1_0``, ``linear0_1``, ``linear1_1``, ``linear_out``) are those
    of ``MFH`` in block-bootstrap-pytorch 0.1.6, and so is the result.

    Args:
        dropout_pre_lin: probability of dropout of the products of either block, in training.
        others: as in :class:`MFB`.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``, as in :class:`MFB`.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.MFH([300, 512], output_dim=64, mm_dim=100, factor=5)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    linear0_0: nn.Linear
    linear1_0: nn.Linear
    linear0_1: nn.Linear
    linear1_1: nn.Linear

    @checked(factor=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        factor: int = 2,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            activ_input,
            activ_output,
            dropout_input,
            dropout_pre_lin,
            dropout_output,
        )
        self.factor, self.normalize = factor, normalize
        for block in (0, 1):
            for side, dim in enumerate(self.input_dims):
                setattr(self, f"linear{side}_{block}", nn.Linear(dim, mm_dim * factor))
        self.linear_out = nn.Linear(2 * mm_dim, output_dim)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        a, b = checked_pair(x, self.input_dims)
        first = self.projected(self.linear0_0, a) * self.projected(self.linear1_0, b)
        first = self.dropped(first, self.dropout_pre_lin)
        second = self.projected(self.linear0_1, a) * first
        dropout_p = self.dropout_pre_lin if self.training else 0.0
        sums = [
            self._sums(first, first.new_ones(first.shape[-1]), 0.0),
            self._sums(second, self.projected(self.linear1_1, b), dropout_p),
        ]
        return self.result(torch.cat(sums, -1))

    def _sums(self, a: Tensor, b: Tensor, dropout_p: float) -> Tensor:
        return factorized_pool(a, b, self.factor, "inner", self.normalize, self.normalize, dropout_p)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, normalize={self.normalize}"


class Mutan(PairFusion):
    """Multimodal Tucker fusion (Ben-younes et al., 2017): a bilinear form whose core is a sum of ``rank`` products,
    ``z = sum_r (M_r a) * (N_r b)`` on projections a and b.

    Constructor and state_dict (``linear0``, ``linear1``, ``merge_linear0``, ``merge_linear1``, ``linear_out``) are
    those of ``Mutan`` in block-bootstrap-pytorch 0.1.6, and so is the result; unlike there, inputs with regions come
    back with them instead of as flattened rows.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features of the projections and after the sum.
        rank: products in a sum.
        shared: both modalities, of equal size then, have the same projections.
        normalize: signed square root and L2 norm before the output projection.
        dropout_input, dropout_pre_lin, dropout_output: probabilities, after the input projections, before and after
            the output projection, in training.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``. Leading dimensions broadcast, and
        ``(batch, d)`` goes with ``(batch, regions, d)``.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown, or ``shared`` with two sizes; from forward: other
            features than ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.Mutan([300, 512], output_dim=64, mm_dim=100, rank=5)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    @checked(rank=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        rank: int = 15,
        shared: bool = False,
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )
        self.rank, self.shared, self.normalize = rank, shared, normalize
        self.make_linears(mm_dim, mm_dim, shared)
        self.merge_linear0 = nn.Linear(mm_dim, mm_dim * rank)
        self.merge_linear1 = self.merge_linear0 if shared else nn.Linear(mm_dim, mm_dim * rank)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = project(self.merge_linear0, a), project(self.merge_linear1, b)
        return factorized_pool(a, b, self.rank, "outer", self.normalize, self.normalize)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, shared={self.shared}, normalize={self.normalize}"
