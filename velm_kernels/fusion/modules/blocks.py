"""Fusions of two modalities by a Tucker core: whole, in blocks, and in blocks of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.constructors import checked
from velm_kernels.fusion.bilinear import bilinear
from velm_kernels.fusion.factorized_pool import factorized_pool
from velm_kernels.fusion.modules.pair import PairFusion, project, root_and_norm
from velm_kernels.listeners import is_bare


class Tucker(PairFusion):
    """A bilinear form between projections of two modalities (Ben-younes et al., 2017, before its factorisation), by
    :func:`velm_kernels.bilinear`.

    Constructor and state_dict (``linear0``, ``linear1``, ``bilinear``, ``linear_out``) are those of ``Tucker`` in
    block-bootstrap-pytorch 0.1.6, and so is the result. The core has ``mm_dim ** 3`` weights: 16 GB of them with the
    published default.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features of the projections and of the core.
        shared: without effect, as in the published module, which makes both projections whatever it says.
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
        ValueError: an argument is out of range, or a name unknown; from forward: other features than
            ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.Tucker([300, 512], output_dim=64, mm_dim=20)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    @checked()
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
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
        self.shared, self.normalize = shared, normalize
        self.make_linears(mm_dim, mm_dim)
        self.bilinear = nn.Bilinear(mm_dim, mm_dim, mm_dim)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        z = _applied(self.bilinear, a, b)
        return root_and_norm(z) if self.normalize else z


class _Chunked(PairFusion):
    """Projections cut into chunks, each with a fusion of its own, the results side by side."""

    positions: ClassVar[tuple[str, ...]] = ("before_cat", "after_cat")

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int,
        chunks: int,
        shared: bool,
        dropout_input: float,
        dropout_pre_lin: float,
        dropout_output: float,
        pos_norm: str,
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )
        checks.choice("pos_norm", pos_norm, self.positions)
        self.chunks, self.shared, self.pos_norm = chunks, shared, pos_norm
        self.sizes_list = chunk_sizes(mm_dim, chunks)
        self.make_linears(mm_dim, mm_dim, shared)

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        sides = zip(a.split(self.sizes_list, -1), b.split(self.sizes_list, -1), strict=True)
        z = torch.cat([self.fuse_chunk(chunk, *pair) for chunk, pair in enumerate(sides)], -1)
        return z if self.pos_norm == "before_cat" else root_and_norm(z)

    def fuse_chunk(self, chunk: int, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"chunks={self.chunks}, shared={self.shared}, pos_norm={self.pos_norm!r}"


class BlockTucker(_Chunked):
    """A bilinear form between the chunks of two projections (Ben-younes et al., 2019): a Tucker core of diagonal
    blocks, by :func:`velm_kernels.bilinear`.

    Constructor and state_dict (``linear0``, ``linear1``, ``bilinears.<chunk>``, ``linear_out``) are those of
    ``BlockTucker`` in block-bootstrap-pytorch 0.1.6, and so is the result, also for inputs with regions, of which the
    published one normalises the wrong dimension.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: features of the projections.
        chunks: blocks of the core.
        shared: both modalities, of equal size then, have the same projection.
        dropout_input, dropout_pre_lin, dropout_output: probabilities, after the input projections, before and after
            the output projection, in training.
        pos_norm: signed square root and L2 norm of every chunk (``"before_cat"``) or of all (``"after_cat"``).

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
        >>> fusion = velm_kernels.BlockTucker([300, 512], output_dim=64, mm_dim=100, chunks=10)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 512)]).shape
        torch.Size([16, 64])
    """

    @checked(chunks=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        chunks: int = 20,
        shared: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        pos_norm: str = "before_cat",
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            chunks,
            shared,
            dropout_input,
            dropout_pre_lin,
            dropout_output,
            pos_norm,
        )
        self.bilinears = nn.ModuleList(nn.Bilinear(size, size, size) for size in self.sizes_list)

    def fuse_chunk(self, chunk: int, a: Tensor, b: Tensor) -> Tensor:
        core = cast(nn.Bilinear, self.bilinears[chunk])
        z = _applied(core, a, b)
        return root_and_norm(z) if self.pos_norm == "before_cat" else z


class Block(_Chunked):
    """Block superdiagonal fusion (Ben-younes et al., 2019): in every chunk of two projections a sum of ``rank``
    products, by :func:`velm_kernels.factorized_pool`.

    Constructor and state_dict (``linear0``, ``linear1``, ``merge_linears0.<chunk>``, ``merge_linears1.<chunk>``,
    ``linear_out``) are those of ``Block`` in block-bootstrap-pytorch 0.1.6, and so is the result, also for inputs with
    regions, for which the published one fails.

    Args:
        rank: products in a sum.
        others: as in :class:`BlockTucker`.

    Shape:
        a pair ``(..., d_0)`` and ``(..., d_1)`` to ``(..., output_dim)``, as in :class:`BlockTucker`.

    Inputs have the dtype of the parameters: float32, bfloat16, float16, or float64 (computed by the reference backend);
    under autocast float32, bfloat16 or float16, whatever the parameters have.

    Raises:
        TypeError: an argument has a wrong type; from forward: not two floating-point tensors of the parameters' dtype
            (under autocast, of float32, bfloat16 or float16).
        ValueError: an argument is out of range, or a name unknown, or ``shared`` with two sizes; from forward: other
            features than ``input_dims``, or leading dimensions that do not broadcast.

    Example:
        >>> fusion = velm_kernels.Block([300, 512], output_dim=64, mm_dim=100, chunks=10, rank=5)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 36, 512)]).shape
        torch.Size([16, 36, 64])
    """

    @checked(chunks=1, rank=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        chunks: int = 20,
        rank: int = 15,
        shared: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        pos_norm: str = "before_cat",
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            chunks,
            shared,
            dropout_input,
            dropout_pre_lin,
            dropout_output,
            pos_norm,
        )
        self.rank = rank
        first, second = [], []
        for size in self.sizes_list:
            first.append(nn.Linear(size, size * rank))
            second.append(first[-1] if shared else nn.Linear(size, size * rank))
        self.merge_linears0, self.merge_linears1 = nn.ModuleList(first), nn.ModuleList(second)

    def fuse_chunk(self, chunk: int, a: Tensor, b: Tensor) -> Tensor:
        first, second = cast(nn.Linear, self.merge_linears0[chunk]), cast(nn.Linear, self.merge_linears1[chunk])
        a, b = project(first, a), project(second, b)
        normalized = self.pos_norm == "before_cat"
        return factorized_pool(a, b, self.rank, "outer", normalized, normalized)


def chunk_sizes(dim: int, chunks: int) -> list[int]:
    """The published sizes of the chunks of ``dim`` features: equal ones rounded up, and what is missing taken from the
    last, or, where that would leave nothing of it, from the last ones in turn."""
    if not 1 <= chunks <= dim:
        raise ValueError(f"chunks: expected 1 to mm_dim = {dim}, given {chunks}")
    size = -(-dim // chunks)
    last = dim - size * (chunks - 1)
    if last >= 0:
        return [*[size] * (chunks - 1), last]
    return [size - (chunk >= chunks - (size - last)) for chunk in range(chunks)]


def _applied(layer: nn.Bilinear, a: Tensor, b: Tensor) -> Tensor:
    """The layer on two sets of rows that broadcast, called as what it is where it is more than its parameters."""
    if is_bare(layer, nn.Bilinear):
        return bilinear(a, b, layer.weight, layer.bias)
    rows = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    out: Tensor = layer(a.expand(*rows, a.shape[-1]), b.expand(*rows, b.shape[-1]))
    return out
