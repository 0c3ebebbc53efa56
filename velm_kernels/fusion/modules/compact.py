"""The fusion of two modalities by compact bilinear pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from velm_kernels.constructors import checked
from velm_kernels.fusion.compact_bilinear import Sketch, compact_bilinear, make_sketch
from velm_kernels.fusion.modules.pair import PairFusion, checked_pair


class _CountSketch(nn.Module):
    """The hashes of one modality, under their published names: ``h`` int64 and ``s`` float32."""

    h: Tensor
    s: Tensor

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        index, sign = make_sketch(features, dim)
        self.register_buffer("h", index)
        self.register_buffer("s", sign)

    def sketch(self) -> Sketch:
        return Sketch(self.h, self.s)


class _Hashes(nn.Module):
    def __init__(self, input_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.sketch1 = _CountSketch(input_dims[0], dim)
        self.sketch2 = _CountSketch(input_dims[1], dim)


class MCB(PairFusion):
    """Multimodal compact bilinear pooling (Fukui et al., 2016): :func:`velm_kernels.compact_bilinear` and a linear
    layer.

    Constructor and state_dict are those of ``MCB`` in block-bootstrap-pytorch 0.1.6: ``linear_out``, and the hashes as
    the buffers ``mcb.sketch1.h``, ``mcb.sketch1.s``, ``mcb.sketch2.h`` and ``mcb.sketch2.s``. They are drawn from
    torch's generator, saved, and loaded with trained weights, which mean nothing without them. The published module
    needs ``torch.rfft``, which torch has not had since 1.8; this is what it computed. Unlike there, inputs may have
    more than two dimensions.

    Args:
        input_dims: features of the two modalities.
        output_dim: features of the result.
        mm_dim: size of the sketches.
        activ_output: name of a function of ``torch.nn.functional`` after the linear layer; empty or None for none.
        dropout_output: probability of dropout of the result, in training.

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
        >>> fusion = velm_kernels.MCB([300, 512], output_dim=64, mm_dim=1000)
        >>> fusion([torch.randn(16, 300), torch.randn(16, 36, 512)]).shape
        torch.Size([16, 36, 64])
    """

    @checked(mm_dim=1)
    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 16000,
        activ_output: str | None = "relu",
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(input_dims, output_dim, mm_dim, activ_output=activ_output, dropout_output=dropout_output)
        self.mcb = _Hashes(input_dims, mm_dim)
        self.linear_out = nn.Linear(mm_dim, output_dim)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        a, b = checked_pair(x, self.input_dims)
        return self.result(compact_bilinear(a, b, self.mcb.sketch1.sketch(), self.mcb.sketch2.sketch(), self.mm_dim))

    def extra_repr(self) -> str:
        return f"mm_dim={self.mm_dim}"
